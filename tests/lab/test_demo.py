import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dllmquant.lab import demo
from dllmquant.lab.demo import DemoResult, run_demo, stressed
from dllmquant.lab.evaluate import Evaluation, ItemResult, compare, evaluate
from dllmquant.lab.statistics import paired_difference
from dllmquant.nn.linear import QuantLinear
from tests.tiny import save_tiny, tiny_tokenizer

LIMIT = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", init_std=0.5)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(source: Path, lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    output = tmp_path_factory.mktemp("demo") / "new" / "output"
    return run_demo(output, limit=LIMIT, model=source, error_prompts=3, mc_num=2, report=lines.append)


def test_table(result: DemoResult) -> None:
    names = ["32-bit", "rtn-w4a4", "gptq-w4a4", "dllmquant-w4a4", "dllmquant-quarot-w4a4"]
    assert [row.name for row in result.rows] == names
    baseline = result.evaluations["32-bit"]
    for row in result.rows:
        run = result.evaluations[row.name]
        assert row.accuracy == {task: score.accuracy for task, score in run.scores.items()}
        assert list(row.accuracy) == ["math", "code", "qa"]
        assert all(score.n == LIMIT for score in run.scores.values())
        generated = [run.scores[task] for task in ("math", "code")]
        assert row.tokens_per_second == pytest.approx(
            sum(score.generated_tokens for score in generated) / sum(score.seconds for score in generated)
        )
        if row.difference is not None:
            right = [[item.correct for item in each.items if item.task != "qa"] for each in (baseline, run)]
            assert row.difference == paired_difference(*right)
            assert row.difference.n == 2 * LIMIT
    assert result.rows[0].difference is None
    assert result.rows[0].bytes_per_weight == 4.0
    # 4-bit codes, and per group of 32 a float16 scale and a 4-bit zero point (rows of one group round up to a byte).
    assert 0.578 <= result.rows[1].bytes_per_weight <= 0.6
    assert result.text.splitlines()[0].startswith("model")
    for index, row in enumerate(result.rows):
        cells = result.text.splitlines()[2 + index]
        assert cells.startswith(row.name)
        assert f"{row.file_bytes:,}" in cells
        assert f"{100 * row.accuracy['math']:.1f}%" in cells


def test_checkpoints_are_what_was_evaluated(result: DemoResult) -> None:
    output = result.files[0].parent
    for row in result.rows[1:]:
        directory = output / row.name
        assert sum(path.stat().st_size for path in directory.glob("*.safetensors")) == row.file_bytes
        assert row.file_bytes < result.rows[0].file_bytes
        model = AutoModel.from_pretrained(directory)
        assert any(isinstance(module, QuantLinear) for module in model.modules())
        again = evaluate(
            model, AutoTokenizer.from_pretrained(directory), demo.TASKS, limit=LIMIT, mc_num=2, progress=False
        )
        assert again.items == result.evaluations[row.name].items
        assert row.identical_logits
        assert row.identical_logits % model.config.vocab_size == 0


def test_files(result: DemoResult) -> None:
    picture, numbers, document = result.files
    assert [path.name for path in result.files] == ["demo.png", "demo.json", "demo.md"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(numbers.read_text(encoding="utf-8"))
    assert content["protocol"] == "linear"
    assert [row["name"] for row in content["rows"]] == [row.name for row in result.rows]
    assert content["rows"][1]["accuracy"] == result.rows[1].accuracy
    assert len(content["evaluations"]["gptq-w4a4"]["items"]) == 3 * LIMIT
    assert content["recipes"]["dllmquant-w4a4"]["token_weights"]["kind"] == "cgq"
    for name, error in result.errors.items():
        assert content["error_per_step"][name]["kl"]["mean"] == list(error.kl.mean)
        assert len(error.kl.mean) == 8
        assert min(error.kl.mean) > 0
    markdown = document.read_text(encoding="utf-8")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(result.rows)
    assert [line.split("|")[1].strip() for line in table[2:]] == [row.name for row in result.rows]
    for path in result.files:
        assert f"wrote {path}" in result.text


def test_evaluations_can_be_paired_again(result: DemoResult, tmp_path: Path) -> None:
    content = json.loads(result.files[1].read_text(encoding="utf-8"))
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content["evaluations"]["rtn-w4a4"]), encoding="utf-8")
    differences = compare(result.evaluations["rtn-w4a4"], Evaluation.load(path))
    assert all(difference.difference == 0 for difference in differences)


def test_text_names_protocol_time_and_memory(result: DemoResult) -> None:
    assert "Protocol: linear" in result.text
    assert "all bit-identical" in result.text
    assert f"total time {result.seconds:.0f} s, peak memory " in result.text
    assert result.peak_memory_bytes is not None
    assert result.peak_memory_bytes > 2**26


def test_progress_is_reported(result: DemoResult, lines: list[str]) -> None:
    assert result
    assert lines[0].startswith("32-bit: evaluating tiny on 4 held-out problems each of math, code, qa")
    assert [line.split(":")[0] for line in lines[1:]] == [name for name in demo.RECIPES for _ in range(2)]


def test_denoising_side_by_side(result: DemoResult) -> None:
    shown = json.loads(result.files[1].read_text(encoding="utf-8"))["denoising"]
    first, last = result.evaluations["32-bit"], result.evaluations["dllmquant-quarot-w4a4"]
    for name, run in (("32-bit", first), ("dllmquant-quarot-w4a4", last)):
        states = shown[name]
        assert states[0] == [0, 8 * demo.MASK]
        assert [text.count(demo.MASK) for _, text in states] == [8 - step for step, _ in states]
        completion = next(item.completion for item in run.items if item.prompt == shown["prompt"])
        assert states[-1][0] == 8
        assert states[-1][1].startswith(completion.strip())
    differing = [
        a.prompt
        for a, b in zip(first.items, last.items, strict=True)
        if a.task != "qa" and a.completion != b.completion
    ]
    assert differing[:1] == [shown["prompt"]]
    assert demo.MASK * 8 in result.text


def test_a_worse_model_has_a_negative_difference(result: DemoResult, source: Path) -> None:
    run = result.evaluations["32-bit"]
    half = {item.key for item in run.items if item.task == "math"}
    right, worse = (
        dataclasses.replace(
            run,
            items=tuple(dataclasses.replace(item, correct=item.key not in wrong) for item in run.items),
        )
        for wrong in (set(), half)
    )
    row = demo._row("x", "", source, AutoModel.from_pretrained(source), worse, right)
    assert row.difference is not None
    assert (row.difference.difference, row.difference.only_a, row.difference.only_b) == (-0.5, LIMIT, 0)
    _, cells = demo._table([result.rows[0], row])
    assert cells[1][4].startswith("-50.0 [-")


def item(prompt: str, completion: str, task: str = "math") -> ItemResult:
    return ItemResult(task, prompt, prompt, "r", completion, False, False, False, 1)


def test_telling_prompts() -> None:
    def run(*items: ItemResult) -> Evaluation:
        return Evaluation(items, {}, {}, {})

    a = run(item("q", "1", "qa"), item("p", "1"), item("r", "1"))
    assert demo._telling_prompts(a, run(item("q", "2", "qa"), item("p", "1"), item("r", "2"))) == ["r"]
    assert demo._telling_prompts(a, run(item("q", "1", "qa"), item("p", "2"), item("r", "2"))) == ["p", "r"]
    assert demo._telling_prompts(a, a) == ["p"]


def test_shown_prompt_ends_differently_if_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {("a", 0): "x", ("a", 1): "x", ("b", 0): "x", ("b", 1): "y"}
    monkeypatch.setattr(demo, "_trace", lambda model, _, prompt, seed: demo._Trace(((seed, texts[prompt, model]),)))
    models: Any = (0, 1)

    def shown(*candidates: str) -> tuple[str, list[str]]:
        prompt, traces = demo._shown_traces(models, tiny_tokenizer(), candidates, 7)
        return prompt, [trace.states[-1][1] for trace in traces]

    assert shown("a", "b") == ("b", ["x", "y"])
    assert shown("b", "a") == ("b", ["x", "y"])
    assert shown("a", "a") == ("a", ["x", "x"])


def test_render() -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([*tokenizer(" 7+5").input_ids, tokenizer.eos_token_id])
    assert demo._render(tokenizer, ids, torch.zeros(len(ids), dtype=torch.bool)) == "7+5"
    mask = torch.tensor([False, True] + [False] * (len(ids) - 3) + [True])
    assert demo._render(tokenizer, ids, mask).count(demo.MASK) == 2


def test_a_change_by_the_round_trip_is_an_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AutoModel.from_pretrained

    def damaged(path: Any, *args: Any, **kwargs: Any) -> Any:
        model = load(path, *args, **kwargs)
        if str(tmp_path) in str(path):
            with torch.no_grad():
                model.model.transformer["ln_f"].weight[0] += 0.1
        return model

    monkeypatch.setattr(AutoModel, "from_pretrained", damaged)
    with pytest.raises(RuntimeError, match=r"rtn-w4a4: .* logits changed by saving and loading"):
        run_demo(tmp_path, limit=1, model=source, recipes=["rtn-w4a4"], error_prompts=1, mc_num=1)


def test_what_is_evaluated_came_from_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated = []

    def watched(model: Any, *args: Any, **options: Any) -> Evaluation:
        evaluated.append(Path(model.config._name_or_path))
        return evaluate(model, *args, **options)

    monkeypatch.setattr(demo, "evaluate", watched)
    run_demo(tmp_path, limit=1, model=source, recipes=["rtn-w4a4"], error_prompts=1, mc_num=1)
    assert evaluated == [source, tmp_path / "rtn-w4a4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"error_prompts": 0}, "error_prompts is 0"),
        ({"recipes": []}, "recipes is"),
        ({"recipes": ["rtn-w4a4", "rtn-w4a4"]}, "each name once"),
        ({"recipes": ["best"]}, "unknown name 'best'"),
    ],
)
def test_input_that_cannot_be_used(source: Path, tmp_path: Path, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path / "out", model=source, **arguments)
    assert not (tmp_path / "out").exists()


def test_stressed_computes_the_same_from_other_weights(tmp_path: Path) -> None:
    directory = stressed(tmp_path / "hard", save_tiny(tmp_path / "easy"))
    easy, hard = AutoModel.from_pretrained(tmp_path / "easy"), AutoModel.from_pretrained(directory)
    ids = torch.arange(3, 23).view(2, 10)
    assert torch.equal(easy(ids).logits, hard(ids).logits)
    changed = [n for n, p in easy.named_parameters() if not torch.equal(p, hard.get_parameter(n))]
    assert any(name.endswith("attn_norm.weight") for name in changed)
    assert AutoTokenizer.from_pretrained(directory).eos_token_id == 0
