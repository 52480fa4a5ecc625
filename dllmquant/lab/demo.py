"""The demonstration: quantize a model by several recipes, reload the checkpoints, and measure what is left.

Every number in its output is computed in the run that prints it.
"""

import json
import logging
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dllmquant.assets import bundled
from dllmquant.checkpoint import weight_bytes
from dllmquant.decoding import StateBatch
from dllmquant.generation import generate_tokens
from dllmquant.lab.evaluate import Evaluation, evaluate, peak_memory
from dllmquant.lab.plots import plot_demo
from dllmquant.lab.statistics import PairedDifference, paired_difference
from dllmquant.lab.stepwise import Reference, StepErrors, record_reference, step_errors
from dllmquant.lab.tables import aligned, markdown
from dllmquant.models import adapter_for
from dllmquant.quantizer import DLLMQuantizer
from dllmquant.recipe import Recipe
from dllmquant.tasks import take
from dllmquant.transforms import plant_outliers

logger = logging.getLogger(__name__)

RECIPES = ("rtn-w4a4", "gptq-w4a4", "dllmquant-w4a4", "dllmquant-quarot-w4a4")
GENERATED = ("math", "code")
TASKS = (*GENERATED, "qa")
MASK = "░"
COLUMN = 52


@dataclass(frozen=True)
class DemoRow:
    """One model of the demonstration in numbers.

    Attributes:
        name: The baseline's precision, or the recipe's name.
        summary: The recipe in a line; empty for the baseline.
        accuracy: By task.
        difference: Of the accuracy over math and code to the baseline's, paired by problem; None for the baseline.
        file_bytes: Size of the checkpoint's weight files.
        bytes_per_weight: Bytes per weight of the layers the recipes quantize, scales and zero points included.
        tokens_per_second: Generated tokens per second over math and code.
        identical_logits: Logits that were compared between the model in memory and the reloaded one and found equal
            to the last bit; None for the baseline.
        quantization_seconds: Time the recipe took; None for the baseline.
    """

    name: str
    summary: str
    accuracy: dict[str, float]
    difference: PairedDifference | None
    file_bytes: int
    bytes_per_weight: float
    tokens_per_second: float
    identical_logits: int | None
    quantization_seconds: float | None


@dataclass(frozen=True, eq=False)
class DemoResult:
    """What the demonstration found and wrote.

    Attributes:
        text: The whole report for a terminal.
        rows: One per model, the baseline first.
        evaluations: By model name.
        errors: Error at every denoising step, by recipe name.
        files: The picture, the numbers and the table: demo.png, demo.json, demo.md.
        seconds: Wall time of the whole demonstration.
        peak_memory_bytes: The largest resident size of the process; None where the platform does not tell.
    """

    text: str
    rows: tuple[DemoRow, ...]
    evaluations: dict[str, Evaluation]
    errors: dict[str, StepErrors]
    files: tuple[Path, ...]
    seconds: float
    peak_memory_bytes: int | None


@dataclass(frozen=True, eq=False)
class _Trace:
    """The denoising of one prompt: (tokens committed, text with mask symbols) at some steps, the last one complete."""

    states: tuple[tuple[int, str], ...]


def run_demo(
    output: Path,
    *,
    limit: int = 200,
    seed: int = 0,
    model: str | Path | None = None,
    recipes: Sequence[str] = RECIPES,
    error_prompts: int = 32,
    mc_num: int = 8,
    batch_size: int = 64,
    progress: bool = False,
    report: Callable[[str], object] = logger.info,
) -> DemoResult:
    """Quantizes a model by each recipe, reloads what was saved, and evaluates it on held-out problems.

    Args:
        output: Directory for the checkpoints (one per recipe), demo.png, demo.json and demo.md.
        limit: Held-out problems per task.
        seed: Seed of problems, calibration and the sampler.
        model: Directory of the original; None is the bundled model.
        recipes: Names of recipes; the last one is shown beside the original.
        error_prompts: Prompts on which the error at every step is measured.
        mc_num: Masks per choice of the likelihood-scored task.
        batch_size: Sequences per forward pass.
        progress: Whether to show progress bars.
        report: Told, in a line each, what is being done.

    Raises:
        ValueError: `limit` or `error_prompts` is below 1, a recipe is not valid, or the model is not a diffusion LLM.
        RuntimeError: A reloaded model computes other logits than the one that was saved.
    """
    began = time.perf_counter()
    for name, count in (("limit", limit), ("error_prompts", error_prompts)):
        if count < 1:
            raise ValueError(f"{name} is {count}; valid: an integer of at least 1")
    resolved = [Recipe.load(recipe) for recipe in recipes]
    if not resolved or len({recipe.name for recipe in resolved}) < len(resolved):
        raise ValueError(f"recipes is {list(recipes)}; valid: one or more, each name once")
    output.mkdir(parents=True, exist_ok=True)
    source = bundled("llada-tiny") if model is None else str(model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModel.from_pretrained(source).eval()
    baseline = f"{8 * original.dtype.itemsize}-bit"

    def measure(target: PreTrainedModel) -> Evaluation:
        return evaluate(
            target,
            tokenizer,
            TASKS,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            mc_num=mc_num,
            progress=progress,
        )

    report(f"{baseline}: evaluating {Path(source).name} on {limit} held-out problems each of {', '.join(TASKS)}")
    evaluations = {baseline: measure(original)}
    reference = record_reference(
        original, tokenizer, _error_prompts(error_prompts, seed), batch_size=batch_size, seed=seed
    )
    rows = [_row(baseline, "", source, original, evaluations[baseline], None)]
    errors: dict[str, StepErrors] = {}
    quantized = original
    for recipe in resolved:
        report(f"{recipe.name}: quantizing ({recipe.summary()}), saving, reloading")
        start = time.perf_counter()
        quantized = DLLMQuantizer(recipe).quantize(AutoModel.from_pretrained(source), seed=seed, progress=progress)
        seconds = time.perf_counter() - start
        quantized, compared = _round_trip(quantized, tokenizer, output / recipe.name, reference.batches[0])
        report(f"{recipe.name}: {compared} logits of the reloaded model are bit-identical; evaluating")
        evaluations[recipe.name] = measure(quantized)
        errors[recipe.name] = step_errors(reference, quantized)
        row = _row(
            recipe.name,
            recipe.summary(),
            output / recipe.name,
            quantized,
            evaluations[recipe.name],
            evaluations[baseline],
            identical_logits=compared,
            quantization_seconds=seconds,
        )
        rows.append(row)

    last = resolved[-1].name
    candidates = _telling_prompts(evaluations[baseline], evaluations[last])
    prompt, traces = _shown_traces((original, quantized), tokenizer, candidates, seed)
    title = f"{Path(source).name} quantized to {', '.join(sorted({_bits(recipe) for recipe in resolved}))}"
    figure = plot_demo(
        output / "demo.png",
        scores={name: run.scores for name, run in evaluations.items()},
        errors=errors,
        baseline=baseline,
        title=title,
        block_starts=reference.block_starts,
    )
    sections = _sections(rows, evaluations, reference, (prompt, baseline, last, traces))
    seconds, memory = time.perf_counter() - began, peak_memory()
    closing = f"total time {seconds:.0f} s" + ("" if memory is None else f", peak memory {memory / 2**20:.0f} MiB")
    header, cells = _table(rows)
    numbers, document = output / "demo.json", output / "demo.md"
    _write_json(
        numbers,
        {
            "model": Path(source).name,
            "baseline": baseline,
            "protocol": ", ".join(dict.fromkeys(recipe.protocol for recipe in resolved)),
            "limit": limit,
            "seed": seed,
            "recipes": {recipe.name: recipe.to_dict() for recipe in resolved},
            "rows": [asdict(row) for row in rows],
            "error_per_step": {name: asdict(error) for name, error in errors.items()},
            "error_prompts": error_prompts,
            "denoising": {"prompt": prompt, baseline: traces[0].states, last: traces[1].states},
            "seconds": seconds,
            "peak_memory_bytes": memory,
            "evaluations": {name: run.to_dict() for name, run in evaluations.items()},
        },
    )
    document.write_text(
        f"{markdown(header, cells)}\n\n{sections['notes']}\n\n```\n{sections['denoising']}\n```\n", encoding="utf-8"
    )
    files = (figure, numbers, document)
    written = "\n".join(f"wrote {path}" for path in (*(output / recipe.name for recipe in resolved), *files))
    text = "\n\n".join([aligned(header, cells), sections["notes"], sections["denoising"], f"{closing}\n{written}"])
    return DemoResult(text, tuple(rows), evaluations, errors, files, seconds, memory)


def stressed(directory: Path, source: str | Path | None = None) -> Path:
    """Saves a model with planted outliers: the same function, bit for bit, but harder to quantize.

    The bundled model is so sure of its answers that 4 bits hardly change them; large models are not, because their
    activations have outliers. See `dllmquant.transforms.plant_outliers`.

    Args:
        directory: Where to; the model is named after its last part.
        source: Directory of the model; None is the bundled one.

    Returns:
        The directory.
    """
    source = bundled("llada-tiny") if source is None else str(source)
    model = AutoModel.from_pretrained(source).eval()
    plant_outliers(model, adapter_for(model))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


def _error_prompts(count: int, seed: int) -> list[str]:
    """Held-out prompts of the generated tasks, the tasks taking turns."""
    items = [take(task, "heldout", count, seed) for task in GENERATED]
    return [item.prompt for group in zip(*items, strict=True) for item in group][:count]


@torch.no_grad()
def _round_trip(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, states: StateBatch
) -> tuple[PreTrainedModel, int]:
    """Saves a model, loads it again and compares the two on some states.

    Returns:
        The reloaded model and how many logits were compared.

    Raises:
        RuntimeError: A logit differs.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    reloaded = AutoModel.from_pretrained(directory).eval()
    logits: list[Tensor] = [
        adapter_for(either).denoiser(either)(states.ids, states.attention_mask) for either in (model.eval(), reloaded)
    ]
    if not torch.equal(*logits):
        different = int((logits[0] != logits[1]).sum())
        raise RuntimeError(f"{directory}: {different} of {logits[0].numel()} logits changed by saving and loading")
    return reloaded, logits[0].numel()


def _row(
    name: str,
    summary: str,
    directory: str | Path,
    model: PreTrainedModel,
    evaluation: Evaluation,
    baseline: Evaluation | None,
    **measured: Any,
) -> DemoRow:
    difference = None
    if baseline is not None:
        difference = paired_difference(*(_outcomes(run) for run in (baseline, evaluation)))
    generated = [evaluation.scores[task] for task in GENERATED]
    per_weight = weight_bytes(model).bytes_per_quantized_weight
    if baseline is None:
        weights = [cast("Tensor", module.weight) for _, module in adapter_for(model).linears(model)]
        per_weight = sum(weight.nbytes for weight in weights) / sum(weight.numel() for weight in weights)
    return DemoRow(
        name=name,
        summary=summary,
        accuracy={task: score.accuracy for task, score in evaluation.scores.items()},
        difference=difference,
        file_bytes=sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")),
        bytes_per_weight=per_weight,
        tokens_per_second=sum(score.generated_tokens for score in generated) / sum(s.seconds for s in generated),
        identical_logits=measured.get("identical_logits"),
        quantization_seconds=measured.get("quantization_seconds"),
    )


def _outcomes(evaluation: Evaluation) -> list[bool]:
    return [item.correct for item in evaluation.items if item.task in GENERATED]


def _bits(recipe: Recipe) -> str:
    activations = 16 if recipe.activations is None else recipe.activations.bits
    return f"W{recipe.weights.bits}A{activations}"


def _table(rows: Sequence[DemoRow]) -> tuple[list[str], list[list[str]]]:
    baseline = rows[0].name
    header = ["model", *TASKS, f"math+code vs {baseline} (95%)", "file (bytes)", "bytes/weight", "tokens/s"]
    cells = []
    for row in rows:
        difference = "" if row.difference is None else _points(row.difference)
        cells.append(
            [
                row.name,
                *(f"{100 * row.accuracy[task]:.1f}%" for task in TASKS),
                difference,
                f"{row.file_bytes:,}",
                f"{row.bytes_per_weight:.3f}",
                f"{row.tokens_per_second:.0f}",
            ]
        )
    return header, cells


def _points(paired: PairedDifference) -> str:
    return f"{100 * paired.difference:+.1f} [{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]"


def _sections(
    rows: Sequence[DemoRow],
    evaluations: Mapping[str, Evaluation],
    reference: Reference,
    shown: tuple[str, str, str, Sequence[_Trace]],
) -> dict[str, str]:
    """The notes under the table and the two denoisings side by side."""
    evaluation = evaluations[rows[0].name]
    sampler = evaluation.sampler
    recipes = [row for row in rows if row.summary]
    n = evaluation.scores[TASKS[0]].n
    protocols = dict.fromkeys(evaluations[row.name].metadata["protocol"] for row in recipes)
    notes = [
        f"Accuracy on {n} held-out problems per task; math and code are generated ({sampler['steps']} steps for "
        f"{sampler['gen_length']} tokens in blocks of {sampler['block_length']}), qa is chosen by likelihood. "
        "The difference is in percentage points, paired by problem, with its 95% bootstrap interval.",
        f"Protocol: {', '.join(protocols)} (weights: those of linear layers are quantized; linear: the inputs of these "
        "layers too; +av: softmax output and values of the attention). Norms, embeddings and head are not quantized. "
        "bytes/weight counts codes, scales and zero points of the quantized layers.",
        f"Round trip: every quantized model was saved, reloaded and evaluated from disk; "
        f"{sum(row.identical_logits or 0 for row in recipes)} logits compared with those before saving, "
        "all bit-identical.",
        *(f"{row.name}: {row.summary}; quantized in {row.quantization_seconds:.1f} s." for row in recipes),
    ]
    prompt, baseline, last, traces = shown
    return {
        "notes": "\n".join(textwrap.fill(f"- {note}", 110, subsequent_indent="  ") for note in notes),
        "denoising": _side_by_side(prompt, (baseline, last), traces),
    }


def _telling_prompts(a: Evaluation, b: Evaluation) -> list[str]:
    """The prompts that the two models complete differently, or else the first one."""
    pairs = [(x, y) for x, y in zip(a.items, b.items, strict=True) if x.task in GENERATED]
    return [x.prompt for x, y in pairs if x.completion != y.completion] or [pairs[0][0].prompt]


def _shown_traces(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    candidates: Sequence[str],
    seed: int,
    *,
    tried: int = 16,
) -> tuple[str, list[_Trace]]:
    """The first of some prompts whose texts differ when it is decoded alone, or else the first one, and its traces.

    In 16 bits the rounding depends on what else is in a batch, so a prompt decoded alone may end otherwise than in the
    evaluation.
    """
    found = []
    for prompt in candidates[:tried]:
        traces = [_trace(model, tokenizer, prompt, seed) for model in models]
        found.append((prompt, traces))
        if len({trace.states[-1][1] for trace in traces}) > 1:
            return found[-1]
    return found[0]


def _trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int, *, shown: int = 6
) -> _Trace:
    """Decodes a prompt and renders a few evenly spaced states."""
    generation = generate_tokens(model, tokenizer, [prompt], seed=seed, record=True)
    trajectory = generation.trajectory
    assert trajectory is not None
    steps = int(trajectory.num_steps[0])
    chosen = sorted({int(step) for step in np.linspace(0, steps, shown + 1)})[:-1]
    region = slice(-trajectory.gen_length, None)
    states = [
        (step, _render(tokenizer, trajectory.ids[0, step, region], trajectory.mask[0, step, region])) for step in chosen
    ]
    final = generation.tokens[0]
    return _Trace((*states, (steps, _render(tokenizer, final, torch.zeros_like(final, dtype=torch.bool)))))


def _render(tokenizer: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor) -> str:
    """The text of a generation region: a symbol for every mask token, nothing for EOS."""
    parts = []
    for token, masked in zip(ids.tolist(), mask.tolist(), strict=True):
        if masked:
            parts.append(MASK)
        elif token != tokenizer.eos_token_id:
            parts.append(str(tokenizer.decode([token])))
    return "".join(parts).strip()


def _side_by_side(prompt: str, names: Sequence[str], traces: Sequence[_Trace]) -> str:
    """Two denoisings in columns: the step, then the text at that step."""
    lines = textwrap.wrap(f"Denoising ({MASK} = masked token). Prompt: {prompt}", 2 * COLUMN + 10)
    lines += ["", f"step  {names[0]:<{COLUMN}}  step  {names[1]}"]
    for (step_a, text_a), (step_b, text_b) in zip(*(trace.states for trace in traces), strict=True):
        wrapped = [textwrap.wrap(text, COLUMN) or [""] for text in (text_a, text_b)]
        for index in range(max(map(len, wrapped))):
            a, b = (part[index] if index < len(part) else "" for part in wrapped)
            label_a, label_b = (str(step) if index == 0 else "" for step in (step_a, step_b))
            lines.append(f"{label_a:>4}  {a:<{COLUMN}}  {label_b:>4}  {b}".rstrip())
    return "\n".join(lines)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
