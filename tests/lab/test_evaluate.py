import copy
import dataclasses
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy import stats
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GPTQConfig, PreTrainedTokenizerFast
from transformers.modeling_outputs import MaskedLMOutput
from typer.testing import CliRunner

import dllmquant
from dllmquant import DLLMQuantizer
from dllmquant.cli.app import app
from dllmquant.generation import generate_tokens
from dllmquant.lab import evaluate as module
from dllmquant.lab.evaluate import Evaluation, ItemResult, TaskDifference, compare, evaluate
from dllmquant.models.llada import LLaDAModelLM
from dllmquant.tasks import take
from tests.tiny import tiny_diffusion_gemma, tiny_llada, tiny_tokenizer

SAMPLER: dict[str, Any] = {"gen_length": 32, "block_length": 16, "steps": 8}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> LLaDAModelLM:
    return tiny_llada(init_std=0.5)


class Scripted(LLaDAModelLM):
    """Says what a script tells it to: completions by prompt, followed by EOS unless they fill the generation."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: dict[str, str]) -> None:
        super().__init__(tiny_llada().config)
        self.eos = tokenizer.eos_token_id
        self.script = {
            tuple(tokenizer(prompt).input_ids): tokenizer(text).input_ids if text else []
            for prompt, text in script.items()
        }
        self.rows: list[int] = []
        self.modes: set[bool] = set()

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **unused: Any) -> Any:  # type: ignore[override]
        self.rows.append(len(input_ids))
        self.modes.add(self.training)
        logits = torch.zeros((*input_ids.shape, self.config.vocab_size))
        for row, (ids, keep) in enumerate(zip(input_ids, attention_mask, strict=True)):
            logits[row, keep] = self._logits(ids[keep].tolist())
        return MaskedLMOutput(logits=logits)

    def _logits(self, ids: list[int]) -> Tensor:
        (prompt,) = (prompt for prompt in self.script if tuple(ids[: len(prompt)]) == prompt)
        region = len(ids) - len(prompt)
        said = (self.script[prompt] + [self.eos] * region)[:region]
        return 9.0 * torch.eye(self.config.vocab_size)[[0] * len(prompt) + said]


def script_for(task: str, limit: int, **changes: str) -> dict[str, str]:
    """The right completions, but for `changes` by index (`i3="..."`)."""
    items = take(task, "heldout", limit, 0)
    return {item.prompt: changes.get(f"i{index}", item.answer) for index, item in enumerate(items)}


@pytest.fixture(scope="module")
def both(model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast) -> Evaluation:
    return evaluate(model, tokenizer, ["qa", "math"], limit=6, mc_num=4, progress=False, **SAMPLER)


# scoring


def test_math_is_scored_by_the_final_number(tokenizer: PreTrainedTokenizerFast) -> None:
    items = take("math", "heldout", 8, 0)
    number = [item.answer.split("#### ")[1] for item in items]
    operand = next(text for text in re.findall(r"\d+", items[7].answer) if text != number[7])
    script = script_for(
        "math",
        8,
        i1=f" 1 + 1 = 2. #### {number[1]}",  # right number, other working
        i2=items[2].answer + "1",  # a digit too many
        i3=f" {number[3]}",  # no marker
        i4=" tom" * 32,  # fills the generation
        i5="",  # ends at once
        i7=f" #### {operand}",  # a number of the working
    )
    model = Scripted(tokenizer, script)
    found = evaluate(model, tokenizer, ["math"], limit=8, progress=False, batch_size=4, **SAMPLER)
    assert [item.correct for item in found.items] == [True, True, False, False, False, False, True, False]
    assert [item.exact for item in found.items] == [True, False, False, False, False, False, True, False]
    assert [item.truncated for item in found.items] == [False] * 4 + [True] + [False] * 3
    assert [item.completion for item in found.items] == list(script.values())
    assert [item.steps for item in found.items] == [8] * 8
    for result, item in zip(found.items, items, strict=True):
        assert (result.task, result.key, result.prompt) == ("math", item.key, item.prompt)
        assert result.reference == item.answer
    score = found.scores["math"]
    assert score.n == 8
    assert score.accuracy == 3 / 8
    assert score.exact_match == 2 / 8
    assert score.truncation_rate == 1 / 8
    expected = stats.binomtest(3, 8).proportion_ci(0.95, "wilson")
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high))
    assert score.forward_passes == len(model.rows) == 16
    lengths = [len(tokenizer(text).input_ids) if text else 0 for text in script.values()]
    assert score.generated_tokens == sum(min(length + 1, 32) for length in lengths)
    assert score.tokens_per_second == pytest.approx(score.generated_tokens / score.seconds)
    assert score.seconds > 0


def test_code_is_scored_by_the_whole_output(tokenizer: PreTrainedTokenizerFast) -> None:
    items = take("code", "heldout", 4, 0)
    script = script_for("code", 4, i1=items[1].answer.strip(), i2=items[2].answer + " 1", i3=" 1 1")
    found = evaluate(Scripted(tokenizer, script), tokenizer, ["code"], limit=4, progress=False, **SAMPLER)
    assert [item.completion for item in found.items] == list(script.values())
    assert [item.correct for item in found.items] == [True, True, False, False]
    assert [item.exact for item in found.items] == [True, True, False, False]


def test_qa_takes_the_most_likely_choice(tokenizer: PreTrainedTokenizerFast) -> None:
    items = take("qa", "heldout", 6, 0)
    picks = [item.label if index % 3 else (item.label + 1) % 4 for index, item in enumerate(items)]
    script = {item.prompt: item.choices[pick] for item, pick in zip(items, picks, strict=True)}
    assert {item.label for item in items} | set(picks) == {0, 1, 2, 3}
    model = Scripted(tokenizer, script)
    found = evaluate(model, tokenizer, ["qa"], limit=6, mc_num=3, progress=False, **SAMPLER)
    assert [item.completion for item in found.items] == list(script.values())
    assert [item.correct for item in found.items] == [False, True, True, False, True, True]
    assert [item.exact for item in found.items] == [False, True, True, False, True, True]
    assert all(item.steps == 0 and not item.truncated for item in found.items)
    score = found.scores["qa"]
    assert score.forward_passes == len(model.rows)
    assert (score.generated_tokens, score.tokens_per_second, score.truncation_rate) == (0, 0, 0)
    assert score.seconds > 0


def test_choices_of_a_question_are_equally_long(tokenizer: PreTrainedTokenizerFast) -> None:
    """Otherwise likelihoods would have to be corrected for length."""
    for item in take("qa", "heldout", 200, 0):
        assert len({len(ids) for ids in tokenizer(list(item.choices)).input_ids}) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("task", ["qa", "math"])
def test_the_mode_of_the_model(tokenizer: PreTrainedTokenizerFast, task: str, training: bool) -> None:
    model = Scripted(tokenizer, script_for(task, 1)).train(training)
    evaluate(model, tokenizer, [task], limit=1, mc_num=2, progress=False, **SAMPLER)
    assert model.modes == {False}
    assert model.training == training


# what results depend on


@pytest.mark.parametrize("batch_size", [1, 7])
def test_independent_of_batch_size(
    both: Evaluation, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    options: dict[str, Any] = {"limit": 6, "mc_num": 4, "progress": False, "batch_size": batch_size}
    assert evaluate(model, tokenizer, ["qa", "math"], **options, **SAMPLER).items == both.items


def test_a_smaller_limit_gives_the_first_items(
    both: Evaluation, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = evaluate(model, tokenizer, ["math", "qa"], limit=2, mc_num=4, progress=False, **SAMPLER)
    assert found.items == (*both.items[6:8], *both.items[:2])
    assert list(found.scores) == ["math", "qa"]
    assert [score.n for score in found.scores.values()] == [2, 2]


def test_choices_share_masks_and_items_do_not(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def spy(denoiser: Any, pairs: Any, **options: Any) -> Tensor:
        seen.update(options, pairs=pairs)
        return torch.arange(len(pairs), dtype=torch.float64)

    monkeypatch.setattr(module, "log_likelihoods", spy)
    found = evaluate(model, tokenizer, ["qa"], limit=2, seed=5, mc_num=9, batch_size=3, progress=False)
    items = take("qa", "heldout", 2, 5)
    assert list(seen["streams"]) == [0] * 4 + [1] * 4
    assert (seen["seed"], seen["mc_num"], seen["batch_size"], seen["progress"]) == (5, 9, 3, False)
    assert [tokenizer.decode(prompt) for prompt, _ in seen["pairs"]] == [item.prompt for item in items for _ in "1234"]
    assert [tokenizer.decode(target) for _, target in seen["pairs"]] == [text for i in items for text in i.choices]
    assert [item.completion for item in found.items] == [item.choices[3] for item in items]


def test_settings_and_metadata(both: Evaluation) -> None:
    assert both.sampler["steps"] == 8
    assert both.sampler["temperature"] == 0.0
    assert set(both.sampler) == set(dllmquant.decoding.SamplerConfig.__dataclass_fields__)
    peak = both.metadata.pop("peak_memory_bytes")
    assert 50e6 < peak < 1e12
    both.metadata["peak_memory_bytes"] = peak
    expected = {
        "dllmquant": dllmquant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": 0,
        "limit": 6,
        "batch_size": 64,
        "mc_num": 4,
    }
    assert {name: both.metadata[name] for name in expected} == expected
    assert both.metadata["git_sha"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", both.metadata["git_sha"])


def test_recipe_and_protocol_are_named(
    both: Evaluation, model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def named(measured: Any) -> tuple[str | None, str]:
        run = evaluate(measured, tokenizer, ["qa"], limit=1, mc_num=1, progress=False, **SAMPLER)
        run.save(tmp_path / "run.json")
        metadata = Evaluation.load(tmp_path / "run.json").metadata
        return metadata["recipe"], metadata["protocol"]

    assert (both.metadata["recipe"], both.metadata["protocol"]) == (None, "32-bit")
    assert named(copy.deepcopy(model).bfloat16()) == (None, "16-bit")
    recipe = {"extends": "rtn-w4a4", "name": "mine", "weights": {"group_size": 16}, "attention": {"probs_bits": None}}
    quantized = DLLMQuantizer(recipe).quantize(copy.deepcopy(model), progress=False)
    assert named(quantized) == ("mine", "linear+v")
    quantized.config.quantization_config.recipe = {"name": "later", "novelty": 1}
    assert named(quantized) == ("later", "unknown")
    for stored in ({"quant_method": "gptq"}, GPTQConfig(bits=4)):
        quantized.config.quantization_config = stored
        assert named(quantized) == (None, "quantized by gptq")


def test_the_seed_chooses_items_and_noise(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def spy(*arguments: Any, **options: Any) -> Any:
        seeds.append(options["seed"])
        return generate_tokens(*arguments, **options)

    monkeypatch.setattr(module, "generate_tokens", spy)
    found = evaluate(model, tokenizer, ["code"], limit=2, seed=3, progress=False, **SAMPLER)
    assert [item.key for item in found.items] == [item.key for item in take("code", "heldout", 2, 3)]
    assert found.metadata["seed"] == 3
    assert seeds == [3]


def test_special_tokens_open_the_prompt_only(
    model: LLaDAModelLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = TemplateProcessing(single="[EOS] $A", special_tokens=[("[EOS]", tokenizer.eos_token_id)])
    opening = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", mask_token="[MASK]")
    seen: list[tuple[list[int], list[int]]] = []

    def spy(denoiser: Any, pairs: Any, **options: Any) -> Tensor:
        seen.extend(pairs)
        return torch.zeros(len(pairs), dtype=torch.float64)

    monkeypatch.setattr(module, "log_likelihoods", spy)
    evaluate(model, opening, ["qa"], limit=1, progress=False)
    assert len(seen) == 4
    assert all(prompt[0] == opening.eos_token_id for prompt, _ in seen)
    assert all(opening.eos_token_id not in [*prompt[1:], *target] for prompt, target in seen)


@pytest.mark.parametrize("progress", [True, False])
def test_progress(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str], progress: bool) -> None:
    model = Scripted(tokenizer, script_for("qa", 1) | script_for("math", 1))
    evaluate(model, tokenizer, ["qa", "math"], limit=1, mc_num=2, progress=progress, **SAMPLER)
    printed = capsys.readouterr().err
    assert ("token" in printed) == ("sequence" in printed) == progress


@pytest.mark.parametrize(
    ("tasks", "options", "message"),
    [
        (["math", "maths"], {}, "tasks: unknown 'maths'; valid: math, code, qa"),
        ([], {}, r"tasks is \[\]; valid: a list of one or more of math, code, qa"),
        ("math", {}, "tasks is 'math'; valid: a list"),
        (["qa", "qa"], {}, r"tasks is \['qa', 'qa'\]; valid: each task once"),
        (["qa"], {"limit": 0}, "limit is 0; valid: an integer of at least 1"),
        (["qa"], {"batch_size": 0}, "batch_size is 0; valid"),
        (["qa"], {"mc_num": 0}, "mc_num is 0; valid"),
    ],
)
def test_invalid_arguments(tasks: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):  # nothing touches the model before the arguments are checked
        evaluate(None, None, tasks, **options)  # type: ignore[arg-type]


def test_without_a_mask_token_the_message_names_the_other_tasks(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_diffusion_gemma()
    message = "tasks: qa is scored by likelihood, for which diffusion_gemma has no mask token; valid: --tasks math,code"
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, ["math", "qa"], limit=2, progress=False)
    run = evaluate(model, tokenizer, ["math", "code"], limit=2, progress=False)
    assert list(run.scores) == ["math", "code"]
    model.config.save_pretrained(tmp_path)  # the command finds out before it reads weights, of which there are none
    result = CliRunner().invoke(app, ["eval", str(tmp_path)])
    assert result.exit_code == 2
    assert "--tasks math,code" in " ".join(result.output.split())


def test_invalid_sampler(tokenizer: PreTrainedTokenizerFast) -> None:
    model = Scripted(tokenizer, {})
    with pytest.raises(ValueError, match="sampler setting 'step' is unknown"):
        evaluate(model, tokenizer, ["qa", "math"], step=3)
    with pytest.raises(ValueError, match="steps is 3; valid"):
        evaluate(model, tokenizer, ["qa", "math"], **(SAMPLER | {"steps": 3}))
    assert not model.rows


@pytest.mark.parametrize("task", ["qa", "math"])
def test_a_tokenizer_without_eos(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    model = Scripted(tokenizer, {})
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, mask_token="[MASK]")
    with pytest.raises(ValueError, match="no EOS token"):
        evaluate(model, endless, [task], limit=1)
    assert not model.rows


def test_a_tokenizer_without_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="[EOS]",
        mask_token="[MASK]",
        clean_up_tokenization_spaces=False,
    )
    model = Scripted(bare, script_for("qa", 3))
    assert evaluate(model, bare, ["qa"], limit=3, progress=False).scores["qa"].accuracy == 1


# files


def test_files_restore_everything(both: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "results" / "run.json"
    both.save(path)
    assert Evaluation.load(path) == both
    assert list(path.parent.iterdir()) == [path]
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document == both.to_dict()
    assert document["scores"]["math"]["n"] == 6
    assert document["items"][0]["task"] == "qa"
    both.save(str(path))
    assert Evaluation.load(str(path)) == both


@pytest.fixture
def saved(both: Evaluation, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run.json"
    both.save(path)
    yield path
    assert list(tmp_path.iterdir()) == [path]
    assert Evaluation.load(path) == both


def test_an_interrupted_write_changes_nothing(both: Evaluation, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(path: Path, text: str, **options: Any) -> None:
        os.write(os.open(path, os.O_CREAT | os.O_WRONLY), text[: len(text) // 2].encode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        dataclasses.replace(both, items=()).save(saved)


def test_a_value_json_does_not_have_changes_nothing(both: Evaluation, saved: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(both, metadata={"x": math.nan}).save(saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not an evaluation; valid: a file written by"),
        ("[1]", "not an evaluation"),
        ("{}", "not an evaluation"),
        ('{"format_version": 2}', "format_version is 2; valid: 1"),
        ('{"format_version": 1}', r"not an evaluation \('items'\)"),
        ('{"format_version": 1, "items": [{"task": "qa"}]}', "not an evaluation .*key"),
        ('{"format_version": 1, "items": [], "scores": []}', "not an evaluation"),
    ],
)
def test_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Evaluation.load(path)
    with pytest.raises(FileNotFoundError):
        Evaluation.load(tmp_path / "missing.json")


# comparison


def made(outcomes: dict[str, str], **changes: Any) -> Evaluation:
    """An evaluation with one item per letter, `+` right and `-` wrong."""
    items = tuple(
        ItemResult(task, f"k{i}", f"p{i}", "r", "c", mark == "+", False, False, 1)
        for task, marks in outcomes.items()
        for i, mark in enumerate(marks)
    )
    return Evaluation(tuple(dataclasses.replace(item, **changes) for item in items), {}, {}, {})


def test_compare_pairs_items() -> None:
    a = made({"math": "++--+-", "qa": "+++"})
    b = made({"qa": "++-", "math": "+-++++"})
    b = dataclasses.replace(b, items=b.items[::-1])
    math_difference, qa_difference = compare(a, b)
    assert isinstance(math_difference, TaskDifference)
    assert (math_difference.task, qa_difference.task) == ("math", "qa")
    assert (math_difference.only_a, math_difference.only_b, math_difference.n) == (1, 3, 6)
    assert math_difference.difference == pytest.approx(2 / 6)
    assert math_difference.p_value == pytest.approx(stats.binomtest(1, 4).pvalue)
    assert math_difference.low <= math_difference.difference <= math_difference.high
    assert (qa_difference.only_a, qa_difference.only_b, qa_difference.n) == (1, 0, 3)
    assert qa_difference.difference == pytest.approx(-1 / 3)


def test_an_evaluation_equals_itself(both: Evaluation) -> None:
    for difference in compare(both, both):
        assert (difference.difference, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)
        assert (difference.n, difference.only_a, difference.only_b) == (6, 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (made({"qa": "+++++"}), made({"qa": "+"}), "4 only in a, such as qa: 'k1', qa: 'k2', qa: 'k3'; valid: two"),
        (made({"qa": "+"}), made({"qa": "++"}), "1 only in b, such as qa: 'k1';"),
        (made({"qa": "+"}), made({"qa": "+", "math": "+"}), "1 only in b, such as math: 'k0';"),
        (made({"qa": "+"}), made({"qa": "+"}, prompt="x"), "1 worded differently, such as qa: 'k0';"),
        (made({"qa": "+"}), made({"qa": "+"}, reference="x"), "1 worded differently, such as qa: 'k0';"),
    ],
)
def test_compare_refuses_different_items(a: Evaluation, b: Evaluation, message: str) -> None:
    with pytest.raises(ValueError, match=f"a and b hold different items: {message}"):
        compare(a, b)


# provenance


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(root), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_sha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages"
    package.mkdir()
    assert module._git_sha(tmp_path) is None
    git(tmp_path, "init")
    assert module._git_sha(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "one")
    git(tmp_path, "tag", "-a", "-m", "one", "v1")
    sha = git(tmp_path, "rev-parse", "HEAD")
    assert module._git_sha(tmp_path) == sha
    assert module._git_sha(package) is None
    (tmp_path / "file").write_text("2")
    assert module._git_sha(tmp_path) == f"{sha}-dirty"
    monkeypatch.setenv("PATH", "")
    assert module._git_sha(tmp_path) is None
