import csv
import dataclasses
import io
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import dllmquant
from dllmquant import DLLMQuantizer, Recipe
from dllmquant.lab.ablation import (
    REFERENCE,
    Ablation,
    AblationError,
    AblationPlan,
    AblationResult,
    RunResult,
    find_result,
    plan_ablation,
    planned_text,
    run_ablation,
    summarize,
)
from dllmquant.lab.ablation import plan as plan_module
from dllmquant.lab.ablation import report as report_module
from dllmquant.lab.ablation import run as run_module
from dllmquant.lab.ablation.plan import PlannedRun
from dllmquant.lab.ablation.summary import ALL_MODELS
from dllmquant.lab.evaluate import ItemResult, evaluate
from dllmquant.lab.statistics import paired_difference, paired_difference_clustered, recovered_share
from dllmquant.models import adapter_for
from dllmquant.transforms.outliers import plant_outliers
from tests.tiny import save_tiny, tiny_recipe

LIMIT = 3
ROOT = Path(__file__).parents[2]
CELLS: list[dict[str, Any]] = [
    {"recipe": "rtn-w4a4", "name": "rtn", "overrides": {"weights": {"group_size": 16}}, "seeds": [0]},
    {"recipe": "tiny.yaml"},
    {"recipe": "tiny.yaml", "name": "uniform", "overrides": {"token_weights": {"kind": "uniform"}}},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, a recipe and nothing else."""
    directory = tmp_path_factory.mktemp("ablation")
    save_tiny(directory / "tiny", init_std=0.5)
    recipe = tiny_recipe(calibration={"num_states": 6, "num_prompts": 2, "batch_size": 5})
    (directory / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def document(base: Path) -> dict[str, Any]:
    model = str(base / "tiny")
    return {
        "name": "the title",
        "description": "why",
        "models": [model, {"model": model, "name": "hard", "stress": {"channels": 2, "gain": 16}}],
        "limit": LIMIT,
        "seeds": [0, 1],
        "cells": CELLS,
        "baseline": "rtn",
        "compare": [["tiny", "rtn"], ["tiny", REFERENCE]],
        "agreement_prompts": 3,
    }


@pytest.fixture(scope="module")
def plan(document: dict[str, Any], base: Path) -> AblationPlan:
    return plan_ablation(Ablation.load(document), base=base)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output") / "new"


@pytest.fixture(scope="module")
def result(plan: AblationPlan, output: Path, lines: list[str]) -> AblationResult:
    return run_ablation(plan, output, report=lines.append)


@pytest.fixture(scope="module")
def found(plan: AblationPlan, output: Path, result: AblationResult) -> dict[str, RunResult]:
    assert result
    results = {run.title: find_result(run, output) for run in plan.runs}
    return {title: run for title, run in results.items() if run is not None}


def small(base: Path, **changes: Any) -> AblationPlan:
    """A plan of one model and one quick cell."""
    content: dict[str, Any] = {
        "name": "small",
        "models": [str(base / "tiny")],
        "tasks": ["code"],
        "limit": 2,
        "cells": CELLS[:1],
        "agreement_prompts": 2,
    }
    return plan_ablation(Ablation.load(content | changes), base=base)


# the document


def test_document_with_defaults() -> None:
    ablation = Ablation.load({"name": "x", "models": ["some/where"], "cells": ["rtn-w4a4", {"recipe": "a/b.yaml"}]})
    assert [model.name for model in ablation.models] == ["where"]
    assert [cell.name for cell in ablation.cells] == ["rtn-w4a4", "b"]
    assert (ablation.tasks, ablation.limit, ablation.seeds) == (("math", "code"), 1000, (0,))


def test_document_from_a_file(tmp_path: Path, document: dict[str, Any]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    assert Ablation.load(path) == Ablation.load(document) == Ablation.load(str(path))
    with pytest.raises(FileNotFoundError):
        Ablation.load(tmp_path / "y.yaml")
    for text, message in (("a: [", "not a YAML document"), ("- 1", "an ablation is a mapping of settings, not list")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(AblationError, match=message):
            Ablation.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": []}, "cell: unknown key; valid: version, name, description, models, tasks"),
        ({"cells": [{"recipe": "a", "seed": 1}]}, "cells.0.seed: unknown key; valid: recipe, name, overrides, seeds"),
        ({"models": [{"model": "a", "size": 1}]}, "models.0.size: unknown key; valid: model, name, stress"),
        (
            {"models": [{"model": "a", "name": "b", "stress": {"chanels": 1}}]},
            "models.0.stress.chanels: unknown key; valid: channels, gain",
        ),
        ({"models": [{"model": "a", "stress": {}}]}, "name: a model with stress needs one"),
        ({"models": [{"model": "a", "name": "b", "stress": {"gain": 12}}]}, "gain: valid: a power of two above 1"),
        ({"models": ["a", "b/a"]}, "models: 'a' is there twice"),
        ({"models": []}, "models: "),
        ({"version": 2}, "version: "),
        ({"limit": 0}, "limit: "),
        ({"agreement_prompts": 0}, "agreement_prompts: "),
        ({"tasks": ["math", "chess"]}, "tasks: unknown 'chess'; valid: math, code, qa"),
        ({"tasks": ["math", "math"]}, "tasks: 'math' is there twice"),
        ({"seeds": []}, "seeds: "),
        ({"seeds": [1, 1]}, "seeds: 1 is there twice"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"cells": []}, "cells: "),
        ({"cells": ["rtn-w4a4", "rtn-w4a4"]}, "cells: 'rtn-w4a4' is there twice; valid: each once"),
        ({"cells": [{"recipe": "rtn-w4a4", "name": "16-bit"}]}, "the name '16-bit' is the unquantized model's"),
        ({"cells": [{"recipe": "rtn-w4a4", "name": "a/b"}]}, "cells.0.name: "),
        ({"cells": [{"recipe": "rtn-w4a4", "seeds": [2, 2]}]}, "seeds: 2 is there twice"),
        ({"cells": [{"recipe": "a", "overrides": {"extends": "b"}}]}, "'extends' is no override; use .* 'recipe'"),
        ({"cells": [{"recipe": "a", "overrides": {"name": "b"}}]}, "'name' is no override; use the cell's own 'name'"),
        ({"cells": [{"recipe": "a", "overrides": {"seed": 1}}]}, "'seed' is no override; use the cell's own 'seeds'"),
        ({"compare": [["rtn-w4a4", "best"]]}, "compare: there is no cell 'best'; valid: rtn-w4a4"),
        ({"compare": [["rtn-w4a4"]]}, "compare.0"),
        ({"baseline": "gptq"}, "baseline: there is no cell 'gptq'; valid: rtn-w4a4"),
        ({"baseline": "16-bit"}, "baseline: there is no cell '16-bit'"),
        ({"cells": [{"recipe": "rtn-w4a4", "baseline": "x"}]}, "baseline: there is no cell 'x'"),
    ],
)
def test_documents_that_are_not_valid(changes: dict[str, Any], message: str) -> None:
    content: dict[str, Any] = {"name": "x", "models": ["llada-tiny"], "cells": ["rtn-w4a4"]}
    with pytest.raises(AblationError, match=message):
        Ablation.load(content | changes)


# the plan


def test_plan_is_the_grid(plan: AblationPlan) -> None:
    titles = ["16-bit/seed0", "rtn/seed0", "tiny/seed0", "tiny/seed1", "uniform/seed0", "uniform/seed1"]
    assert [run.title for run in plan.runs] == [f"{model}/{title}" for model in ("tiny", "hard") for title in titles]
    assert len({run.key for run in plan.runs}) == len(plan.runs)


def test_overrides_are_merged_as_extends_does(plan: AblationPlan, base: Path) -> None:
    recipes = {run.title: run.recipe for run in plan.runs}
    assert recipes["tiny/16-bit/seed0"] is None
    expected = Recipe.load(
        {
            "extends": str(base / "tiny.yaml"),
            "name": "uniform",
            "token_weights": {"kind": "uniform"},
            "seed": 1,
        }
    )
    assert recipes["tiny/uniform/seed1"] == expected
    rtn = recipes["hard/rtn/seed0"]
    assert rtn is not None
    assert rtn.weights == Recipe.load("rtn-w4a4").weights.model_copy(update={"group_size": 16})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": ["best-of-all"]}, "cell 'best-of-all': recipe: unknown name"),
        ({"cells": ["none.yaml"]}, "cell 'none': recipe: no file"),
        (
            {"cells": ["rtn-w4a4", {"recipe": "rtn-w4a4", "name": "x", "overrides": {"weights": {"bit": 4}}}]},
            "cell 'x': recipe: weights.bit: unknown key; valid: bits",
        ),
        ({"cells": [{"recipe": "rtn-w4a4", "overrides": {"weigths": {}}}]}, "weigths: unknown key"),
        ({"models": ["nowhere"]}, "model 'nowhere': there is no directory 'nowhere'; valid: .* llada-tiny"),
        (
            {"cells": ["rtn-w4a4", {"recipe": "rtn-w4a4", "name": "x", "overrides": {"weights": {"bits": 4}}}]},
            "tiny/x/seed0 and tiny/rtn-w4a4/seed0 are the same; valid: overrides that change something",
        ),
        ({"sampler": {"temperature": 1.0}}, "its sampler draws random numbers; set sampler: {temperature: 0"),
        ({"sampler": {"step": 1}}, "sampler setting 'step' is unknown"),
    ],
)
def test_plans_that_cannot_be_run(base: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AblationError, match=message):
        small(base, **changes)


def test_models_that_cannot_be_used(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    model = DLLMQuantizer({"extends": "rtn-w4a4", "weights": {"group_size": 16}}).quantize(str(base / "tiny"))
    model.save_pretrained(tmp_path / "quantized")
    for name, message in (
        ("empty", "model 'empty': "),
        ("bert", "model 'bert': it is a 'bert'; valid diffusion LLMs: Dream, .*llada, "),
        ("quantized", "model 'quantized': it is quantized already"),
    ):
        with pytest.raises(AblationError, match=message):
            small(base, models=[str(tmp_path / name)])


def key(plan: AblationPlan) -> str:
    return plan.runs[1].key


@pytest.mark.parametrize(
    "changes",
    [
        {"limit": 3},
        {"tasks": ["math"]},
        {"agreement_prompts": 3},
        {"mc_num": 3},
        {"sampler": {"steps": 4}},
        {"seeds": [1], "cells": [{key: value for key, value in CELLS[0].items() if key != "seeds"}]},
        {"cells": [CELLS[0] | {"overrides": {"weights": {"group_size": 8}}}]},
    ],
    ids=str,
)
def test_what_a_result_depends_on_is_in_its_key(base: Path, changes: dict[str, Any]) -> None:
    assert key(small(base, **changes)) != key(small(base))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other", "description": "other"},
        {"batch_size": 2},
        {"cells": [CELLS[0] | {"name": "renamed"}, "gptq-w4a4"], "compare": [["renamed", "gptq-w4a4"]]},
        {"cells": [CELLS[0] | {"overrides": {"weights": {"group_size": 16}, "description": "other"}}]},
    ],
    ids=str,
)
def test_what_a_result_does_not_depend_on_is_not(base: Path, changes: dict[str, Any]) -> None:
    assert key(small(base, **changes)) == key(small(base))


def test_model_and_library_are_in_the_key(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "same", init_std=0.5)
    save_tiny(tmp_path / "tiny", seed=1, init_std=0.5)
    stressed = {"model": str(base / "tiny"), "name": "x", "stress": {}}
    first = key(small(base))
    assert key(small(base, models=[str(tmp_path / "same")])) == first
    assert key(small(base, models=[str(tmp_path / "tiny")])) != first
    assert key(small(base, models=[stressed])) != first
    assert key(small(base, models=[stressed | {"stress": {"channels": 2}}])) != key(small(base, models=[stressed]))
    monkeypatch.setattr(plan_module, "__version__", "99")
    assert key(small(base)) != first


# the numbers


def test_results_are_what_the_library_computes(plan: AblationPlan, found: dict[str, RunResult], base: Path) -> None:
    source, tokenizer = base / "tiny", AutoTokenizer.from_pretrained(base / "tiny")
    assert list(found) == [run.title for run in plan.runs]
    for run in plan.runs[:4:3] + plan.runs[7:8]:
        model = AutoModel.from_pretrained(source)
        if run.model == "hard":
            plant_outliers(model, adapter_for(model), channels=2, gain=16)
        if run.recipe is not None:
            DLLMQuantizer(run.recipe).quantize(model, tokenizer=tokenizer, progress=False)
        expected = evaluate(model, tokenizer, ["math", "code"], limit=LIMIT, progress=False)
        result = found[run.title]
        assert result.items == expected.items
        assert {task: score.accuracy for task, score in result.scores.items()} == {
            task: score.accuracy for task, score in expected.scores.items()
        }
        assert result.recipe == (None if run.recipe is None else run.recipe.to_dict())
        assert result.seed == run.seed
        assert result.metadata["sampler"] == expected.sampler
        assert result.metadata["peak_memory_bytes"] > 2**26
        assert set(result.seconds) == {"quantization", "evaluation", "agreement"}


def test_agreement(found: dict[str, RunResult]) -> None:
    for title, result in found.items():
        assert result.agreement is not None
        assert result.agreement.frontier.states == 3 * 8
        assert len(result.agreement.first_divergence) == 3
        if REFERENCE in title:
            assert result.agreement.first_divergence == (-1, -1, -1)
            assert result.agreement.frontier.flips == 0
        else:
            assert min(bucket.mean or 0 for bucket in result.agreement.kl) > 0


def test_stress_changes_what_is_quantized_only(found: dict[str, RunResult]) -> None:
    assert found["hard/16-bit/seed0"].items == found["tiny/16-bit/seed0"].items
    assert found["hard/rtn/seed0"].agreement != found["tiny/rtn/seed0"].agreement


def test_rows(result: AblationResult, found: dict[str, RunResult]) -> None:
    rows = {(row.model, row.cell): row for row in result.summary.rows}
    assert list(rows) == [(model, cell) for model in ("tiny", "hard") for cell in (REFERENCE, "rtn", "tiny", "uniform")]
    assert [rows["tiny", cell].protocol for cell in (REFERENCE, "rtn")] == ["", "linear"]
    row = rows["hard", "tiny"]
    runs = [found[f"hard/tiny/seed{seed}"] for seed in (0, 1)]
    numbers = row.numbers
    assert numbers is not None
    assert (row.seeds, row.planned, numbers.n) == ((0, 1), 2, 2 * LIMIT)
    right = [[item.correct for item in run.items] for run in runs]
    assert numbers.pooled == pytest.approx(np.mean(right))
    assert numbers.accuracy["code"] == pytest.approx(np.mean([values[LIMIT:] for values in right]))
    texts = [item.completion for item in found["hard/16-bit/seed0"].items]
    same = [item.completion == text for run in runs for item, text in zip(run.items, texts, strict=True)]
    assert numbers.same_text == pytest.approx(np.mean(same))
    assert numbers.bytes_per_weight == pytest.approx(runs[0].bytes_per_weight)
    assert numbers.forward_passes == 16
    agreements = [run.agreement for run in runs if run.agreement is not None]
    assert numbers.frontier_flips == pytest.approx(np.mean([each.frontier.flips / 24 for each in agreements]))
    sums = [
        sum((each.kl[0].mean or 0) * each.kl[0].positions for each in agreements),
        sum(a.kl[0].positions for a in agreements),
    ]
    assert numbers.kl[0] == pytest.approx(sums[0] / sums[1])
    for phase, seconds in numbers.seconds.items():
        assert seconds == pytest.approx(sum(run.seconds[phase] for run in runs))
    reference = rows["hard", REFERENCE].numbers
    assert reference is not None
    assert reference.same_text == 1
    assert reference.bytes_per_weight == 4


def item(index: int, correct: bool, task: str = "math", steps: int = 8) -> ItemResult:
    return ItemResult(task, f"key {index}", f"p{index}", "r", f"text {correct}", correct, correct, False, steps)


def invented(
    plan: AblationPlan, template: RunResult, share: Callable[[PlannedRun], float], n: int = 40
) -> dict[PlannedRun, RunResult]:
    """Results with many items, right with a probability that depends on the run."""
    results = {}
    for index, run in enumerate(plan.runs):
        right = np.random.default_rng(index).random(n) < share(run)
        items = tuple(item(position, bool(value)) for position, value in enumerate(right))
        qa = item(0, True, task="qa", steps=0)
        results[run] = dataclasses.replace(
            template, model=run.model, cell=run.cell, seed=run.seed, key=run.key, items=(*items, qa), error=None
        )
    return results


def test_statistics_are_paired_by_problem(plan: AblationPlan, found: dict[str, RunResult]) -> None:
    shares = {REFERENCE: 0.95, "rtn": 0.4, "tiny": 0.8, "uniform": 0.6}
    results = invented(plan, found["tiny/rtn/seed0"], lambda run: shares[run.cell])
    summary = summarize(plan, results)

    def answers(model: str, cell: str) -> Any:
        runs = [result for run, result in results.items() if (run.model, run.cell) == (model, cell)]
        return np.array([[each.correct for each in run.items if each.task != "qa"] for run in runs]).T

    for row in summary.rows:
        assert row.numbers is not None
        assert row.numbers.n == 40
        full, right = answers(row.model, REFERENCE), answers(row.model, row.cell)
        assert row.numbers.pooled == pytest.approx(right.mean())
        assert row.numbers.difference == paired_difference_clustered(full, right)
        expected = recovered_share(full, answers(row.model, "rtn"), right)
        assert row.numbers.recovered == (expected if row.cell in ("tiny", "uniform") else None)
        assert row.baseline == ("rtn" if row.cell in ("tiny", "uniform") else None)
    one = next(row.numbers for row in summary.rows if row.cell == "rtn")
    assert one is not None
    assert one.difference is not None
    alone = paired_difference(answers("tiny", REFERENCE)[:, 0], answers("tiny", "rtn")[:, 0])
    assert one.difference.p_value == pytest.approx(alone.p_value)
    compared = {(each.model, each.first, each.second): each for each in summary.comparisons}
    assert list(compared) == [
        (model, "tiny", second) for second in ("rtn", REFERENCE) for model in ("tiny", "hard", ALL_MODELS)
    ]
    pooled = [np.concatenate([answers(model, cell) for model in ("tiny", "hard")], axis=1) for cell in ("rtn", "tiny")]
    assert compared[ALL_MODELS, "tiny", "rtn"].difference == paired_difference_clustered(*pooled)
    assert compared[ALL_MODELS, "tiny", "rtn"].runs == (4, 2)
    assert compared["tiny", "tiny", "rtn"].difference.difference > 0
    assert compared["tiny", "tiny", REFERENCE].difference.difference < 0


def test_unfinished_results_are_summarized(plan: AblationPlan, found: dict[str, RunResult]) -> None:
    assert summarize(plan, {}).comparisons == ()
    whole = invented(plan, found["tiny/rtn/seed0"], lambda run: 0.5)
    partial = {run: result for run, result in whole.items() if run.title != "hard/tiny/seed1"}
    summary = summarize(plan, partial)
    assert (summary.finished, summary.planned) == (len(plan.runs) - 1, len(plan.runs))
    row = next(row for row in summary.rows if (row.model, row.cell) == ("hard", "tiny"))
    assert (row.seeds, row.planned) == ((0,), 2)
    assert {each.model for each in summary.comparisons} == {"tiny", "hard"}  # all models only when all is there
    without = {run: result for run, result in whole.items() if run.cell != REFERENCE}
    for row in summarize(plan, without).rows:
        assert (row.numbers is None) == (row.cell == REFERENCE)
        if row.numbers is not None:
            assert (row.numbers.difference, row.numbers.same_text, row.numbers.recovered) == (None, None, None)
    text = report_module._document(plan, summarize(plan, without))
    assert "| tiny | 16-bit | - | 0 of 1 | not run |" in text


def test_everything_is_held_against_16_bit_by_default(
    base: Path, found: dict[str, RunResult], document: dict[str, Any]
) -> None:
    content = {name: value for name, value in document.items() if name != "compare"}
    plan = plan_ablation(Ablation.load(content), base=base)
    summary = summarize(plan, invented(plan, found["tiny/rtn/seed0"], lambda run: 0.5))
    pairs = dict.fromkeys((each.first, each.second) for each in summary.comparisons)
    assert list(pairs) == [(cell, REFERENCE) for cell in ("rtn", "tiny", "uniform")]


# the files


def test_files(result: AblationResult, output: Path, plan: AblationPlan) -> None:
    names = ["results.json", "results.csv", "results.md", "results.png"]
    assert list(result.files) == [output / name for name in names]
    assert all(f"wrote {output / name}" in result.text for name in names)
    assert result.failed == ()
    content = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert Ablation.load(content["ablation"]) == plan.ablation
    assert [row["cell"] for row in content["rows"]] == [row.cell for row in result.summary.rows]
    assert content["comparisons"][0]["difference"]["n"] == 2 * LIMIT
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")
    cells = sorted(path.name for path in (output / "cells").iterdir())
    assert cells == sorted(run.file_name for run in plan.runs)
    assert any(re.fullmatch(r"hard\.uniform\.seed1\.[0-9a-f]{16}\.json", name) for name in cells)
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "cells", "trajectories"])


def test_csv(result: AblationResult, output: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((output / "results.csv").read_text(encoding="utf-8"))))
    assert len(rows) == len(result.summary.rows)
    for text, row in zip(rows, result.summary.rows, strict=True):
        numbers = row.numbers
        assert numbers is not None
        assert numbers.difference is not None
        assert (text["model"], text["cell"], text["recipe"]) == (row.model, row.cell, row.summary)
        assert float(text["accuracy_pooled"]) == numbers.pooled
        assert float(text["difference_low"]) == numbers.difference.low
        assert float(text["kl_0.75_1"]) == numbers.kl[3]
        assert float(text["evaluation_seconds"]) == numbers.seconds["evaluation"]
        assert int(text["peak_memory_bytes"]) == numbers.peak_memory_bytes
        assert text["errors"] == ""


def test_markdown(result: AblationResult, output: Path) -> None:
    text = (output / "results.md").read_text(encoding="utf-8")
    assert text.startswith("# the title\n\nwhy\n\n- Models: tiny, hard (outliers planted: 2 channels × 16).\n")
    assert "n = 6" in text
    assert "- 12 of 12 runs are finished." in text
    for row in result.summary.rows:
        assert f"| {row.model} | {row.cell} | {row.protocol or '-'} | {len(row.seeds)} | 6 |" in text
    assert "| all models | tiny − rtn | 6 | 4, 2 |" in text
    assert "Failed" not in text
    assert "seconds" not in text


def test_progress_names_the_runs(result: AblationResult, lines: list[str], plan: AblationPlan) -> None:
    assert result
    assert lines[0] == "the title: 12 runs, 0 of them done before"
    assert [line.split(": ")[:2] for line in lines[1:]] == [["finished", run.title] for run in plan.runs]


def test_cells_share_recorded_trajectories(result: AblationResult, output: Path) -> None:
    assert result
    files = list((output / "trajectories").iterdir())
    assert len(files) == 4  # two models, two seeds; two cells each


# running


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the picture out: drawing takes longer than these runs."""
    monkeypatch.setattr(report_module, "draw", lambda plan, summary, path: path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the runs that are measured."""
    titles = []
    measure = run_module._measure

    def watched(run: PlannedRun, *args: Any, **options: Any) -> RunResult:
        titles.append(run.title)
        return measure(run, *args, **options)

    monkeypatch.setattr(run_module, "_measure", watched)
    return titles


def test_nothing_is_measured_twice(
    plan: AblationPlan, result: AblationResult, output: Path, measured: list[str]
) -> None:
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    again: list[str] = []
    assert run_ablation(plan, output, report=again.append).text == result.text
    assert measured == []
    assert again[0] == "the title: 12 runs, 12 of them done before"
    assert again[1:] == [f"finished before: {run.title}" for run in plan.runs]
    assert {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()} == before
    assert planned_text(plan, output).endswith("12 runs, 0 of them to run")


@pytest.mark.usefixtures("undrawn")
def test_what_changed_is_measured_again(base: Path, tmp_path: Path, measured: list[str]) -> None:
    run_ablation(small(base), tmp_path)
    assert measured == ["tiny/16-bit/seed0", "tiny/rtn/seed0"]
    changed = small(base, cells=[CELLS[0] | {"overrides": {"weights": {"group_size": 8}}}])
    assert planned_text(changed, tmp_path).splitlines()[3].split()[:3] == ["tiny/rtn/seed0", "to", "run"]
    run_ablation(changed, tmp_path)
    assert measured[2:] == ["tiny/rtn/seed0"]
    renamed = small(base, cells=[CELLS[0] | {"name": "renamed"}])
    found = run_ablation(renamed, tmp_path)
    assert len(measured) == 3
    assert found.summary.rows[1].cell == "renamed"
    assert found.summary.rows[1].numbers is not None


@pytest.mark.usefixtures("undrawn")
def test_a_failure_is_recorded_and_the_others_go_on(
    base: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small(base, cells=[CELLS[0] | {"name": "bad", "overrides": {"skip": ["nothing.*"]}}, CELLS[0]])
    lines: list[str] = []
    result = run_ablation(plan, tmp_path, report=lines.append)
    assert result.failed == ("tiny/bad/seed0",)
    assert "failed: tiny/bad: dllmquant.recipe.RecipeError: skip: 'nothing.*' matches no" in result.text
    assert lines[2].startswith("failed: tiny/bad/seed0: dllmquant.recipe.RecipeError: skip")
    assert lines[3].startswith("finished: tiny/rtn/seed0: code ")
    bad, good = result.summary.rows[1:]
    assert (bad.numbers, good.errors) == (None, ())
    assert good.numbers is not None
    stored = find_result(plan.runs[1], tmp_path)
    assert stored is not None
    assert stored.error is not None
    assert stored.error.startswith("Traceback")
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| tiny | bad | linear | 0 of 1 | failed |" in text
    assert "## Failed runs" in text
    assert "failed; to run again" in planned_text(plan, tmp_path)
    del measured[:]
    monkeypatch.setattr(DLLMQuantizer, "quantize", lambda self, model, **_: model)
    assert run_ablation(plan, tmp_path).failed == ()
    assert measured == ["tiny/bad/seed0"]


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_ablation_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small(base)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DLLMQuantizer, "quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_ablation(plan, tmp_path)
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [plan.runs[0].file_name]
    assert "- 1 of 2 runs are finished." in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert run_ablation(plan, tmp_path).summary.finished == 2


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, found: dict[str, RunResult]) -> None:
    path = tmp_path / "x.json"
    good = found["tiny/rtn/seed0"]
    good.save(path)
    assert RunResult.load(path) == good
    with pytest.raises(ValueError, match="not JSON compliant"):
        dataclasses.replace(good, seconds={"evaluation": float("nan")}).save(path)
    assert RunResult.load(path) == good
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"format_version": 9}'])
def test_a_damaged_result_is_named(base: Path, tmp_path: Path, damage: str) -> None:
    plan = small(base)
    path = tmp_path / "cells" / plan.runs[1].file_name
    path.parent.mkdir()
    path.write_text(damage, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)}: not the result of an ablation's run .* delete it"):
        run_ablation(plan, tmp_path)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For every load of a model, how many instances were alive before it."""
    load = AutoModel.from_pretrained
    instances: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in instances))
        model = load(*args, **options)
        instances.append(weakref.ref(model))
        return model

    monkeypatch.setattr(AutoModel, "from_pretrained", watched)
    return alive


@pytest.mark.usefixtures("undrawn")
def test_a_small_model_is_loaded_once_and_a_large_one_never_held_twice(
    base: Path, tmp_path: Path, loads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run_ablation(small(base), tmp_path / "kept")
    assert loads == [0]
    del loads[:]
    monkeypatch.setattr(run_module, "_COPY_BYTES", 0)
    result = run_ablation(small(base), tmp_path / "loaded")
    assert loads == [0, 0, 0]  # the reference, 16-bit, rtn
    for a, b in zip(kept.summary.rows, result.summary.rows, strict=True):
        assert a.numbers is not None
        assert b.numbers is not None
        timeless = [dataclasses.replace(each, seconds={}, peak_memory_bytes=None) for each in (a.numbers, b.numbers)]
        assert timeless[0] == timeless[1]


def test_the_peak_memory_is_the_runs_own() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux only")
    run_module._reset_peak_memory()
    before = run_module._peak_memory("cpu")
    block = torch.ones(2**26)
    high = run_module._peak_memory("cpu")
    del block
    run_module._reset_peak_memory()
    after = run_module._peak_memory("cpu")
    assert before is not None
    assert high is not None
    assert after is not None
    assert high > before + 2**27
    assert after < high - 2**27


@pytest.mark.usefixtures("undrawn")
def test_tasks_scored_by_likelihood_are_not_pooled(base: Path, tmp_path: Path) -> None:
    result = run_ablation(small(base, tasks=["code", "qa"], mc_num=2), tmp_path / "both")
    numbers = result.summary.rows[1].numbers
    assert numbers is not None
    assert numbers.n == 2
    assert set(numbers.accuracy) == {"code", "qa"}
    assert "`pooled` is code, n = 2, generated" in (tmp_path / "both" / "results.md").read_text(encoding="utf-8")
    result = run_ablation(small(base, tasks=["qa"], mc_num=2), tmp_path / "qa")
    assert "`pooled` is qa, n = 2, chosen by likelihood" in (tmp_path / "qa" / "results.md").read_text(encoding="utf-8")


# what users read


def test_shipped_ablations_are_valid() -> None:
    files = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))
    assert files
    for path in files:
        plan = plan_ablation(Ablation.load(path), base=path.parent)
        assert len({run.key for run in plan.runs}) == len(plan.runs), f"{path.name} measures something twice"


def test_ablations_in_the_docs_are_valid() -> None:
    text = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        plan_ablation(Ablation.load(yaml.safe_load(block)))
    for name in Ablation.model_fields:
        assert f"`{name}`" in text or f"{name}:" in text, f"docs/ablation.md says nothing about {name}"
    assert dllmquant.bundled("llada-tiny")
