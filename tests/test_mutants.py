"""The tests are tested: each one-line break of the core must fail the test file of the module it breaks.

A copy of `core` and `nn` and of their tests is broken and run apart, under an otherwise empty package. A mutant whose
text no longer occurs exactly once is an error, so the list cannot rot.
"""

import multiprocessing
import runpy
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Mutant:
    """A break: in dllmquant/`module`.py, `old` becomes `new`; the module's test file must fail."""

    name: str
    module: str
    old: str
    new: str

    @property
    def test_file(self) -> str:
        folder, _, leaf = self.module.rpartition("/")
        return f"tests/{folder}/test_{leaf}.py"


MUTANTS = [
    Mutant("feedback-sign", "core/gptq", "w[:, q + 1 : end] -= ", "w[:, q + 1 : end] += "),
    Mutant("feedback-dropped", "core/gptq", "-= torch.outer(error,", "-= 0 * torch.outer(error,"),
    Mutant("lazy-update-dropped", "core/gptq", "-= errors @ upper", "-= 0 * errors @ upper"),
    Mutant("lazy-update-sign", "core/gptq", "w[:, end:] -= errors", "w[:, end:] += errors"),
    Mutant("inverse-is-identity", "core/gptq", "torch.cholesky_inverse(lower)", "identity"),
    Mutant("hessian-not-inverted", "core/gptq", "torch.cholesky_inverse(lower)", "lower @ lower.T"),
    Mutant("error-not-divided", "core/gptq", "rounded[:, 0]) / upper[q, q]", "rounded[:, 0])"),
    Mutant("order-not-undone", "core/gptq", "codes[:, torch.argsort(order)]", "codes"),
    Mutant("order-applied-twice", "core/gptq", "codes[:, torch.argsort(order)]", "codes[:, order]"),
    Mutant("order-ascending", "core/gptq", "descending=True", "descending=False"),
    Mutant("order-without-hessian", "core/gptq", "h[order][:, order]", "h"),
    Mutant("group-beyond-block-stale", "core/gptq", " - errors[:, : q - start] @ upper[start:q, end:stop]", ""),
    Mutant("groups-fitted-up-front", "core/gptq", "not act_order and q % width == 0", "False"),
    Mutant("damping-doubled", "core/gptq", "hessian + relative * mean", "hessian + 2 * relative * mean"),
    Mutant("dead-channel-is-one", "core/gptq", "dead.to(hessian.dtype) * mean", "dead.to(hessian.dtype)"),
    Mutant("dead-channel-kept", "core/gptq", "w = torch.where(dead, 0.0, original)", "w = original.clone()"),
    Mutant("loss-without-hessian", "core/gptq", "(delta @ hessian) * delta", "delta * delta"),
    Mutant("weight-not-rooted", "core/stats", "rows * w.sqrt()[:, None]", "rows * w[:, None]"),
    Mutant("weights-ignored", "core/stats", "rows * w.sqrt()[:, None]", "rows"),
    Mutant("padding-not-excluded", "core/stats", "used = w > 0", "used = w >= 0"),
    Mutant("padding-weight-ignored", "core/stats", "weights.reshape(-1).to(self._sum)", "torch.ones_like(rows[:, 0])"),
    Mutant("mean-over-tokens", "core/stats", "self._sum / self.total_weight", "self._sum / self.tokens"),
    Mutant("merge-forgets", "core/stats", "self.total_weight += other.total_weight", "pass"),
    Mutant("state-is-shared", "core/stats", ".to(self._sum, copy=True)", ".to(self._sum)"),
    Mutant(
        "zero-point-off-by-one",
        "core/grid",
        "torch.round(-low / scale.to(low))",
        "torch.round(1 - low / scale.to(low))",
    ),
    Mutant("middle-off-by-one", "core/grid", "scale, grid.levels // 2,", "scale, grid.levels // 2 - 1,"),
    Mutant("scale-off-by-one-level", "core/grid", "(high - low) / (grid.levels - 1)", "(high - low) / grid.levels"),
    Mutant("clip-worse-accepted", "core/grid", "better = error < best_error", "better = error > best_error"),
    Mutant("importance-ignored", "core/grid", "square() * importance)", "square())"),
    Mutant("range-without-zero", "core/grid", "groups.amin(-1).clamp(max=0)", "groups.amin(-1)"),
    Mutant(
        "scale-wider-than-stored",
        "core/grid",
        ".clamp(min=_SMALLEST_SCALE).to(torch.float16)",
        ".clamp(min=_SMALLEST_SCALE)",
    ),
    Mutant(
        "zero-point-not-subtracted", "core/grid", "grouped.to(wide) - self.zero[..., None].to(wide)", "grouped.to(wide)"
    ),
    Mutant(
        "narrow-weight-not-widened", "core/grid", "torch.promote_types(weight.dtype, torch.float32)", "weight.dtype"
    ),
    Mutant("rtn-ignores-clip", "core/rtn", "clip=clip, importance=importance", "importance=importance"),
    Mutant("bases-swapped", "core/cgq", "torch.full_like(c, masked_base),", "torch.full_like(c, unmasked_base),"),
    Mutant("decoded-confidence-kept", "core/cgq", "torch.where(masked, c, 0.0)", "c"),
    Mutant("confidence-not-rooted", "core/cgq", "(m + c.sqrt())", "(m + c)"),
    Mutant("weight-not-squared", "core/cgq", "(m + c.sqrt()).square()", "(m + c.sqrt())"),
    Mutant("segment-shift", "core/tmas", "(valid.cumsum(1) - 1) * len", "valid.cumsum(1) * len"),
    Mutant("segments-by-column", "core/tmas", "(valid.cumsum(1) - 1) * len", "torch.arange(valid.shape[1]) * len"),
    Mutant("segments-of-padded-length", "core/tmas", "* len(quotas) // steps", "* len(quotas) // valid.shape[1]"),
    Mutant("smallest-remainder", "core/tmas", "(counts[i] - exact[i], i)", "(exact[i] - counts[i], i)"),
    Mutant("lowest-ratio-drawn", "core/tmas", "(int(used[where[i, 0]]), i)", "int(used[where[i, 0]])"),
    Mutant("prompts-repeat", "core/tmas", "used[where[pick, 0]] += 1", "used[where[pick, 0]] += 0"),
    Mutant("not-stratified", "core/tmas", "(float(ratio[i]), int(blocks[i]))", "i"),
    Mutant("notes-forgotten", "core/tmas", "if have < want", "if have < 0"),
    Mutant("bit-offset", "nn/packing", "codes[..., None] >> shifts", "codes[..., None] >> (shifts + 1)"),
    Mutant("big-endian-bits", "nn/packing", "8) << places", "8) << places.flip(0)"),
    Mutant("unpack-offset", "nn/packing", "<< (8 - offset)", "<< offset"),
    Mutant("fast-path-mask", "nn/packing", "& ((1 << bits) - 1)", "& ((1 << bits) - 2)"),
    Mutant("overflow-accepted", "nn/packing", ">= 2**bits", "> 2**bits"),
    Mutant("activation-scale-tripled", "nn/activation", "keepdim=True) / top", "keepdim=True) * 3 / top"),
    Mutant("activation-per-tensor", "nn/activation", "groups.abs().amax(-1, keepdim=True)", "groups.abs().amax()"),
    Mutant("activation-zero-point", "nn/activation", "torch.round(-low / scale)", "torch.round(1 - low / scale)"),
    Mutant("activation-group-ignored", "nn/activation", "unflatten(-1, (-1, size))", "unflatten(-1, (1, -1))"),
    Mutant("activation-in-bfloat16", "nn/activation", "else x.float()", "else x"),
    Mutant("input-not-quantized", "nn/linear", "x = quantize_activation", "quantize_activation"),
    Mutant("bias-forgotten", "nn/linear", "dequantize(x.dtype), self.bias)", "dequantize(x.dtype))"),
    Mutant("scale-cast-with-the-model", "nn/linear", ".dtype != buffer.dtype", ".dtype == buffer.dtype"),
    Mutant("zero-points-not-counted", "nn/linear", "self.weight_scale.nbytes + zero", "self.weight_scale.nbytes"),
    Mutant("scale-shared", "nn/linear", "weight.scale.clone()", "weight.scale"),
    Mutant(
        "one-bit-signs-swapped", "core/grid", "torch.where(values < 0, 0.0, 2.0)", "torch.where(values < 0, 2.0, 0.0)"
    ),
    Mutant(
        "one-bit-at-absmax",
        "core/grid",
        "(groups.abs() * importance).sum(-1) / importance.sum(-1)",
        "groups.abs().amax(-1)",
    ),
    Mutant(
        "one-bit-importance-ignored",
        "core/grid",
        "importance.sum(-1, keepdim=True) > 0, importance,",
        "importance < 0, importance,",
    ),
    Mutant(
        "group-bits-ignored",
        "core/grid",
        "self.bits if self.group_bits is None else self.group_bits[group]",
        "self.bits",
    ),
    Mutant("one-width-too-many", "core/grid", "len(self.group_bits) * size != in_features", "False"),
    Mutant(
        "widest-stream-first",
        "nn/packing",
        "for width in sorted(set(bits))]",
        "for width in sorted(set(bits), reverse=True)]",
    ),
    Mutant("groups-left-in-streams", "nn/packing", "groups[:, place]", "groups"),
    Mutant("one-bit-code-not-restored", "nn/packing", " << int(width == 1)", ""),
    Mutant("zero-points-of-other-groups", "nn/linear", "zero[:, stored] = ", "zero[:, : len(stored)] = "),
    Mutant("unstored-zero-points", "nn/linear", "zero[:] = torch.tensor", "_ = torch.tensor"),
    Mutant(
        "activation-group-bits-ignored",
        "nn/activation",
        "(1 << (bits - sign)) - 1 for bits",
        "(1 << (scheme.bits - sign)) - 1 for bits",
    ),
    Mutant("budget-exceeded", "core/allocate", " - narrowest * total", ""),
    Mutant("budget-ignores-sizes", "core/allocate", "size * (bits - narrowest) for", "(bits - narrowest) for"),
    Mutant("costs-not-scaled", "core/allocate", " * _SPREAD", " * 1e-9"),
    Mutant("decimal-budgets-missed", "core/allocate", " * (1 + 1e-12)", ""),
    Mutant("earlier-columns-make-up", "core/allocate", "upper.diagonal().square()", "(upper.T @ upper).diagonal()"),
    Mutant("costs-not-reordered", "core/allocate", "left[order] = ", "left[:] = "),
    Mutant("dead-channels-cost", "core/allocate", "left[dead] = 0", "left[dead] = 1"),
]


DRIVER = """
import os, sys, pytest
from pathlib import Path
here = Path(__file__).parent
os.chdir(here)
sys.path.insert(0, str(here))
log = os.open("log.txt", os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1), os.dup2(log, 2)
sys.exit(int(pytest.main(["-c", "pytest.ini", "--rootdir", ".", *Path("files.txt").read_text().split()])))
"""
INI = """[pytest]
pythonpath = .
addopts = --import-mode=importlib -p no:cacheprovider -q -x
"""


def copy_sources(target: Path) -> None:
    for folder in ("dllmquant/core", "dllmquant/nn", "tests/core", "tests/nn", "tests/oracles"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/conftest.py", target / "tests")
    (target / "dllmquant/__init__.py").write_text('"""Nothing but core and nn."""\n')
    (target / "pytest.ini").write_text(INI)
    (target / "driver.py").write_text(DRIVER)


def run_tests(target: Path, *files: str) -> tuple[int, str]:
    """Runs test files of the copy in a process of their own; returns pytest's exit code and what it printed.

    A fork server that has loaded the heavy modules, and nothing of this project, spares each run the imports.
    """
    (target / "files.txt").write_text("\n".join(files))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "einops", "hypothesis", "pytest"])
    process = context.Process(target=runpy.run_path, args=(str(target / "driver.py"),))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (target / "log.txt").read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant: Mutant) -> None:
    """Quick: the text a mutant replaces occurs exactly once."""
    assert (ROOT / "dllmquant" / f"{mutant.module}.py").read_text().count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert (ROOT / mutant.test_file).is_file()


@pytest.mark.slow
def test_the_unbroken_copy_passes(tmp_path: Path) -> None:
    """Else a mutant would die of the copying."""
    copy_sources(tmp_path)
    code, output = run_tests(tmp_path, *sorted({mutant.test_file for mutant in MUTANTS}))
    assert code == pytest.ExitCode.OK, output


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_dies(mutant: Mutant, tmp_path: Path) -> None:
    copy_sources(tmp_path)
    broken = tmp_path / "dllmquant" / f"{mutant.module}.py"
    text = broken.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.module}: {mutant.old!r} no longer occurs exactly once"
    broken.write_text(text.replace(mutant.old, mutant.new))
    compile(broken.read_text(), str(broken), "exec")  # a syntax error would die of itself
    code, output = run_tests(tmp_path, mutant.test_file)
    assert code == pytest.ExitCode.TESTS_FAILED, f"survived: {mutant}\n{output[-2000:]}"
