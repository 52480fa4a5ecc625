import json
import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import typer
import yaml
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import dllmquant
from dllmquant import DLLMQuantizer, Recipe
from dllmquant.calibration import Cost, load_prompts
from dllmquant.cli.app import app
from dllmquant.cli.generate import _prompts_from_stdin
from dllmquant.cli.loading import find_model
from dllmquant.lab import demo as demo_module
from dllmquant.lab.evaluate import Evaluation, evaluate
from dllmquant.lab.inspection import checkpoint_bits, checkpoint_coverage
from tests.tiny import save_tiny, tiny_recipe

COMMANDS = ("demo", "quantize", "generate", "eval", "ablate", "recipes", "models", "inspect", "export")
PROMPT = "q: tom has 7 apples. tom buys 5 more. how many remain? a:"


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def succeeds(*arguments: object, stdin: str | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments: object, stdin: str | None = None) -> str:
    """The message of an error that ends as all of them should: one line, exit code 2, nothing on standard output."""
    result = run(*arguments, stdin=stdin)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    return result.stderr.removeprefix("error: ").rstrip()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", init_std=0.5)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(model: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint that the command line made, and what it printed."""
    output = tmp_path_factory.mktemp("out") / "new" / "quantized"
    return output, succeeds("quantize", model, "--recipe", recipe_file, "--output", output, "--seed", 3)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it a failure to load a model."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before its inputs were checked")

    monkeypatch.setattr(AutoModel, "from_pretrained", load)


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_an_example(command: str) -> None:
    text = succeeds(command, "--help")
    assert "For example:" in text
    assert f"      dllmquant {command}" in text
    parsed = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    for parameter in parsed.params:
        assert parameter.help, f"{command} {parameter.name} has no help"


def _examples() -> list[str]:
    callbacks = [info.callback for info in app.registered_commands]
    documents = [callback.__doc__ or "" for callback in callbacks if callback is not None]
    return [line.strip() for text in documents for line in text.splitlines() if line.startswith("        dllmquant")]


@pytest.mark.parametrize("example", _examples())
def test_examples_of_the_help_parse(example: str) -> None:
    words = shlex.split(re.split(r" [<>] ", example)[0])[1:]
    group = typer.main.get_command(app)
    with group.make_context("dllmquant", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
        assert name in COMMANDS
        command.make_context(name, rest, parent=context)


def test_every_command_has_an_example() -> None:
    assert {example.split()[1] for example in _examples()} == set(COMMANDS)


def test_overview_names_the_commands_and_what_they_do() -> None:
    text = succeeds("--help")
    for command in COMMANDS:
        (line,) = re.findall(rf"^  {command} +(\w.*)$", text, re.MULTILINE)
        assert line.endswith(".")
        assert not line.endswith("...")
    assert run().exit_code == 2  # no command: the same text


def test_version() -> None:
    assert succeeds("--version") == f"dllmquant {dllmquant.__version__}\n"


# errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantise"],
        ["quantize"],
        ["quantize", "llada-tiny", "--output", "x"],
        ["quantize", "llada-tiny", "--recipe", "rtn-w4a4", "--output", "x", "--seed", "-1"],
        ["quantize", "llada-tiny", "--recipe", "rtn-w4a4", "--output", "x", "--dtype", "int8"],
        ["generate", "x", "--steps", "0", "a"],
        ["generate", "x", "--remasking", "best", "a"],
        ["generate", "x", "--threshold", "1.5", "a"],
        ["eval", "x", "--limit", "0"],
        ["demo", "--limit", "none"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_usage_errors(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "best"], "recipe: unknown name 'best'; built in: awq-"),
        (["--recipe", "{tmp}/none.yaml"], "recipe: no file"),
        (["--recipe", "{tmp}/bits.yaml"], "weights.bits: Input should be 2, 3, 4 or 8 (got 5)"),
        (["--recipe", "{tmp}/key.yaml"], "solvr: unknown key; valid: "),
        (["--recipe", "{tmp}/sampler.yaml"], "sampler setting 'stepz' is unknown"),
        (["--output", "{tmp}/full"], "full is not empty; give a new directory, or --overwrite"),
        (["--output", "{tmp}/bits.yaml"], "bits.yaml is a file; give a directory"),
        (["--output", "{tmp}/bits.yaml/below"], "bits.yaml is a file; give a directory"),
        (["--output", "{model}", "--overwrite"], "is the directory of the model itself"),
        (["--prompts", "{tmp}/none.txt"], "prompts: no file {tmp}/none.txt"),
        (["--prompts", "{tmp}/bits.yaml"], "bits.yaml' is neither a file ending in .txt, .jsonl, .json, .parquet, nor"),
        (["--prompts", "{tmp}/few.txt"], "few.txt holds 2 prompts (3 rows); valid: at least 64"),
        (["--prompts", "{tmp}/json.jsonl"], "json.jsonl, line 2: not JSON"),
        (
            ["--prompts", "{tmp}/list.jsonl"],
            "list.jsonl, line 1: [1]; valid: a string, (prompt, completion), or fields",
        ),
        (["--prompts", "{tmp}/empty.jsonl"], "empty.jsonl holds 0 prompts (1 rows)"),
        (["--prompts", "{tmp}/number.jsonl"], "number.jsonl, line 1: field 'completion' holds int; valid: text"),
        (["--prompts", "{tmp}/latin.txt"], "latin.txt is not UTF-8 text"),
        (["--prompts", "{tmp}/few.txt", "--prompt-field", "text"], "a text without fields; valid: no field"),
        (["--prompts", "{tmp}/number.jsonl", "--prompt-field", "text"], "no field 'text'; its fields: prompt, compl"),
        (["--prompts", "{tmp}/number.jsonl", "--completion-field", "end"], "no field 'end'; its fields: prompt, compl"),
        (["--prompts", "{tmp}/few.txt", "--split", "test"], "--split: {tmp}/few.txt is a file, which has no splits"),
        (["--prompts", "{tmp}/few.txt", "--chat-template"], "chat_template: the tokenizer has none"),
        (["--prompt-field", "text"], "--prompt-field: has no effect without --prompts"),
        (["--completion-field", "end"], "--completion-field: has no effect without --prompts"),
        (["--split", "test"], "--split: has no effect without --prompts"),
        (["--chat-template"], "--chat-template: has no effect without --prompts"),
        (["--recipe", "rtn-w4a4", "--prompts", "{tmp}/few.txt"], "prompts: recipe 'rtn-w4a4' uses no calibration data"),
        (["--recipe", "rtn-w4a4", "--prompt-field", "x"], "--prompt-field: has no effect without --prompts"),
        (["--device", "abacus"], "device: 'abacus' cannot be used"),
        (["--device", "cuda:99"], "device: 'cuda:99' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_quantize_checks_its_inputs_before_any_work(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    files = {
        "bits.yaml": "weights: {bits: 5}\n",
        "key.yaml": "solvr: gptq\n",
        "sampler.yaml": "extends: dllmquant-w4a4\ncalibration: {sampler: {stepz: 4}}\n",
        "few.txt": "one\n\ntwo\n",
        "json.jsonl": '{"prompt": "a"}\n{"prompt": \n',
        "list.jsonl": "[1]\n",
        "empty.jsonl": '{"prompt": ""}\n',
        "number.jsonl": '{"prompt": "a", "completion": 3}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    words = [word.format(tmp=tmp_path, model=model) for word in arguments]
    defaults = ["--recipe", "dllmquant-w4a4", "--output", tmp_path / "out"]  # of two, the later one holds
    assert message.format(tmp=tmp_path) in fails("quantize", model, *defaults, *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories that are no models we can use."""
    root = tmp_path_factory.mktemp("odd")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    for name, text in (("bert", '{"model_type": "bert"}'), ("alien", '{"model_type": "alien"}'), ("broken", "{")):
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    save_tiny(root / "mute")
    for path in (root / "mute").glob("tokenizer*"):
        path.unlink()
    return root


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llada-tny", "model: there is no directory 'llada-tny'; valid: a directory, a hub id"),
        ("./none/such", "model: there is no directory './none/such'"),
        ("nobody/such-model", "model: nobody/such-model cannot be read: "),
        ("{odd}/empty", "empty holds no config.json"),
        ("{odd}/file", "file is a file; give the checkpoint's directory"),
        ("{odd}/bert", "bert is a 'bert'; valid diffusion LLMs: Dream, Fast_dLLM_Qwen, "),
        ("{odd}/alien", "alien cannot be read: "),
        ("{odd}/broken", "broken cannot be read: "),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "generate", "eval", "inspect"])
def test_models_that_cannot_be_used(odd_models: Path, tmp_path: Path, command: str, name: str, message: str) -> None:
    options: dict[str, list[Any]] = {
        "quantize": ["--recipe", "rtn-w4a4", "--output", tmp_path / "out"],
        "generate": [PROMPT],
        "eval": ["--json", tmp_path / "x.json"],
        "inspect": [],
    }
    assert message in fails(command, name.format(odd=odd_models), *options[command])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_loading")
def test_a_model_without_tokenizer(odd_models: Path, tmp_path: Path) -> None:
    options = ["--recipe", "rtn-w4a4", "--output", tmp_path / "out"]
    assert "mute has no tokenizer that can be read" in fails("quantize", odd_models / "mute", *options)


@pytest.mark.usefixtures("no_loading")
def test_a_quantized_model_is_not_quantized_again(quantized: tuple[Path, str], tmp_path: Path) -> None:
    message = fails("quantize", quantized[0], "--recipe", "rtn-w4a4", "--output", tmp_path / "out")
    assert message.endswith("is quantized already; give the 16-bit original")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gen-length", 6], "gen_length is 6; valid: a multiple of block_length 4"),
        (["--steps", 3], "steps is 3; valid: a multiple of the number of blocks"),
        (["--threshold", 0.5, "--remasking", "random"], "threshold is 0.5 with remasking 'random'"),
        (["--threshold", 0], "threshold is 0.0; valid: None or a probability in (0, 1]"),
        (["--temperature", "inf"], "temperature is inf; valid: a finite number"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_sampler_settings_are_checked_first(model: Path, command: str, options: list[object], message: str) -> None:
    assert message in fails(command, model, *options, *([PROMPT] if command == "generate" else []))


@pytest.mark.usefixtures("no_loading")
def test_prompts_to_generate_from_are_checked_first(model: Path) -> None:
    assert fails("generate", model, PROMPT, "  ") == "prompt 2 is empty; give some text"
    assert "standard input is empty" in fails("generate", model, stdin="\n \n")


def test_no_prompts_at_a_terminal(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(ValueError, match="prompt: none given"):
        _prompts_from_stdin()


def test_debug_shows_the_traceback() -> None:
    result = run("--debug", "recipes", "best")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: recipe: unknown name 'best'")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("x")

    monkeypatch.setattr(Recipe, "names", broken)
    assert isinstance(run("recipes").exception, KeyError)


def test_a_damaged_weight_file(quantized: tuple[Path, str], tmp_path: Path) -> None:
    for path in quantized[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: not a readable safetensors file" in fails("inspect", tmp_path)
    assert fails("generate", tmp_path, PROMPT)
    weights.unlink()
    assert "holds no .safetensors file" in fails("inspect", tmp_path)


def test_the_program_itself() -> None:
    """One real process: the module runs, and an error ends it as it should."""
    command = [sys.executable, "-m", "dllmquant", "recipes", "best"]
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(dllmquant.__file__).parents[1]
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert re.fullmatch(r"error: recipe: unknown name 'best'[^\n]*\n", process.stderr)


# quantize, inspect, generate


def test_quantize_makes_what_python_makes(
    model: Path, recipe_file: Path, quantized: tuple[Path, str], tmp_path: Path
) -> None:
    output, text = quantized
    expected = DLLMQuantizer(recipe_file).quantize(model, seed=3, progress=False)
    reloaded = AutoModel.from_pretrained(output)
    ids = AutoTokenizer.from_pretrained(output)(PROMPT, return_tensors="pt").input_ids
    assert torch.equal(reloaded(ids).logits, expected(ids).logits)
    assert reloaded.config.quantization_config.seed == 3
    size = dllmquant.checkpoint.weight_bytes(reloaded)
    assert f"{size.quantized_bytes:,} bytes, {size.bytes_per_quantized_weight:.3f} per weight" in text
    assert "quantized 14 layers" in text
    assert Recipe.load(recipe_file).summary() in text
    assert f"wrote {output} ({(output / 'model.safetensors').stat().st_size:,} bytes of weights)" in text


def test_quantize_saves_in_a_format_of_others(model: Path, tmp_path: Path) -> None:
    for recipe, format, target in (("rtn-w4a16", None, "own"), ("rtn-w4a16", "dequantized", "other")):
        options = [] if format is None else ["--format", format]
        text = succeeds("quantize", model, "--recipe", recipe, "--output", tmp_path / target, *options)
        assert f"wrote {tmp_path / target}" in text
    succeeds("export", tmp_path / "own", "--format", "dequantized", "--output", tmp_path / "exported")
    for path in (tmp_path / "exported").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_format_that_refuses_a_model_does_not_lose_it(model: Path, tmp_path: Path) -> None:
    message = fails("quantize", model, "--recipe", "rtn-w4a4", "--output", tmp_path / "out", "--format", "gptq")
    assert message.endswith(f"The quantized model is in {tmp_path / 'out'}, in dllmquant's own format")
    assert "activations" in message
    reloaded = AutoModel.from_pretrained(tmp_path / "out")
    assert reloaded.config.quantization_config.recipe["name"] == "rtn-w4a4"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_quantize_replaces_a_checkpoint_only_when_told(
    model: Path, quantized: tuple[Path, str], tmp_path: Path
) -> None:
    for path in quantized[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "model.safetensors").read_bytes()
    options = ["--recipe", "rtn-w8a8", "--output", tmp_path]
    assert "not empty" in fails("quantize", model, *options)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    succeeds("quantize", model, *options, "--overwrite", "--dtype", "bfloat16", "--device", "cpu")
    reloaded = AutoModel.from_pretrained(tmp_path)
    assert reloaded.config.quantization_config.recipe["name"] == "rtn-w8a8"
    assert reloaded.dtype == torch.bfloat16
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_own_prompts_are_used(model: Path, recipe_file: Path, tmp_path: Path, kind: str) -> None:
    prompts = [f"q: anna has {n} books. anna sells 2 books. how many remain? a:" for n in range(5)]
    path = tmp_path / f"prompts.{kind}"
    rows = [json.dumps({"prompt": p} | ({"completion": " 3"} if i % 2 else {})) for i, p in enumerate(prompts)]
    path.write_text("\n".join(prompts if kind == "txt" else rows) + "\n\n", encoding="utf-8")
    output = tmp_path / "out"
    succeeds("quantize", model, "--recipe", recipe_file, "--output", output, "--prompts", path, "--seed", 1)
    quantizer, drawn = DLLMQuantizer(recipe_file), load_prompts(path, count=4, seed=1)
    config = quantizer.quantize(model, prompts=drawn, seed=1, progress=False).config.quantization_config
    assert AutoModel.from_pretrained(output).config.quantization_config.states_hash == config.states_hash


def test_completions_reach_recipes_on_clean_text(model: Path, tmp_path: Path) -> None:
    recipe, path = tmp_path / "clean.yaml", tmp_path / "pairs.json"
    recipe.write_text("extends: gptq-w4a4\ncalibration: {num_states: 3}\n")
    pairs = [(PROMPT, f" 7+5=1{n}. #### 1{n}") for n in range(3)]
    path.write_text(json.dumps([{"id": "x", "ask": p, "reply": c} for p, c in pairs]))
    options = ["--prompts", path, "--prompt-field", "ask", "--completion-field", "reply"]
    succeeds("quantize", model, "--recipe", recipe, "--output", tmp_path / "out", *options)
    drawn = load_prompts(pairs, count=3, seed=0)
    config = DLLMQuantizer(recipe).quantize(model, prompts=drawn, progress=False).config.quantization_config
    assert AutoModel.from_pretrained(tmp_path / "out").config.quantization_config.states_hash == config.states_hash


@pytest.fixture
def quantize_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the quantizer, which stops there."""
    calls: list[dict[str, Any]] = []

    def quantize(_self: DLLMQuantizer, _model: object, **options: Any) -> None:
        calls.append(options)
        raise ValueError("far enough")

    monkeypatch.setattr(DLLMQuantizer, "quantize", quantize)
    return calls


def test_prompts_of_a_data_set(
    model: Path,
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantize_calls: list[dict[str, Any]],
) -> None:
    rows = [{"text": f"{n} and", "answer": f" {n + 1}"} for n in range(9)]
    asked = []

    def load_dataset(*arguments: object, **options: object) -> datasets.Dataset:
        assert datasets.are_progress_bars_disabled()
        asked.append((arguments, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = ["--recipe", recipe_file, "--output", tmp_path / "out", "--prompts", "owner/name:main"]
    fields = ["--prompt-field", "text", "--completion-field", "answer"]
    had_bars = not datasets.are_progress_bars_disabled()
    fails("quantize", model, *options, *fields)
    fails("quantize", model, *options, *fields, "--split", "test[:50%]", "--seed", 5)
    assert had_bars is not datasets.are_progress_bars_disabled()
    assert asked == [(("owner/name", "main"), {"split": split}) for split in ("train", "test[:50%]")]
    expected = [load_prompts(rows, count=4, seed=s, field="text", completion_field="answer") for s in (0, 5)]
    assert [call["prompts"] for call in quantize_calls] == expected


def test_prompts_in_the_chat_template(
    model: Path, recipe_file: Path, tmp_path: Path, quantize_calls: list[dict[str, Any]]
) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %} <reply>"
    tokenizer.save_pretrained(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\na\na\na\n")
    options = ["--recipe", recipe_file, "--output", tmp_path / "out", "--prompts", prompts]
    fails("quantize", tmp_path, *options)
    fails("quantize", tmp_path, *options, "--chat-template")
    assert [call["prompts"] for call in quantize_calls] == [["a"] * 4, ["<user> a <reply>"] * 4]


def test_bundled_models_are_found_by_name(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("dllmquant.assets._ASSETS", model.parent)
    source, config = find_model("tiny")
    assert Path(source) == model
    assert config.model_type == "llada"


def test_inspect_a_quantized_model(quantized: tuple[Path, str]) -> None:
    output, _ = quantized
    text = succeeds("inspect", output)
    config = AutoModel.from_pretrained(output).config.quantization_config
    for fact in (
        "quantized:       yes, layout version 1",
        "recipe:          tiny (W4A4, weights per group of 16",
        f"library version: {dllmquant.__version__}",
        "seed:            3",
        f"states hash:     {config.states_hash}",
    ):
        assert fact in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert re.search(r"4-bit asymmetric per group of 16 +4-bit symmetric per token +2 +2,048 ", rows["q_proj"])
    size = dllmquant.checkpoint.weight_bytes(AutoModel.from_pretrained(output))
    total = [
        "14",
        f"{size.quantized_parameters:,}",
        f"{size.quantized_bytes:,}",
        f"{size.bytes_per_quantized_weight:.3f}",
    ]
    assert rows["all"].split()[1:] == total
    assert rows["everything else"].endswith(f"{size.other_bytes:,}")
    assert rows["model.safetensors"].endswith(f"{(output / 'model.safetensors').stat().st_size:,}")


def test_quantize_reports_what_inspect_draws(model: Path, tmp_path: Path) -> None:
    recipe, output = tmp_path / "rich.yaml", tmp_path / "out"
    allocation = {"mean_bits": 5.0, "heads": True}
    calibration = {"quotas": [0.0, 1.0], "mask_ratio_buckets": 8}  # 4 cells of the diagonal for 3 states
    recipe.write_text(
        yaml.safe_dump(
            tiny_recipe(
                attention={"value_granularity": "head"},
                activations={"allocation": allocation},
                calibration={"num_states": 3, "num_prompts": 4, "batch_size": 5} | calibration,
            )
        )
    )
    text = succeeds("quantize", model, "--recipe", recipe, "--output", output)
    config = AutoModel.from_pretrained(output).config
    bits, coverage = checkpoint_bits(config), checkpoint_coverage(config)
    assert bits is not None
    assert coverage is not None
    assert "\nprotocol: linear+av\n" in text
    assert "\nscales of quantized attention: 96 bytes\n" in text  # 2 blocks of 4 heads with 3 numbers each
    assert f"\nactivation bits by input: 4/8, mean {bits.mean:.3g} per value\n" in text
    assert f"\ncalibration states: {coverage.summary()}\n" in text
    cost = Cost.from_counts(config.quantization_config.cost).summary()
    assert re.search(rf"^calibration states took: {cost}; \d+\.\d s \(\d+\.\d prompts/s\)$", text, re.MULTILINE)
    notes = coverage.notes(calibration["quotas"])  # type: ignore[arg-type]
    assert notes
    told = succeeds("inspect", output)
    assert f"\nstates took:     {cost}\n" in told
    assert [line for line in told.splitlines() if line.startswith("note: ")] == [f"note: {note}" for note in notes]
    for note in notes:
        assert f"note: {note}" in text.splitlines()
    plot = tmp_path / "new" / "map.png"
    assert succeeds("inspect", output, "--plot", plot) == f"{told}\nwrote {plot}\n"
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plots_of_inspect_are_checked(model: Path, quantized: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    message = "plot: nothing to draw; the checkpoint has neither calibration states nor allocated bits"
    assert fails("inspect", model, "--plot", tmp_path / "new" / "x.png") == message
    assert fails("inspect", quantized[0], "--plot", tmp_path) == f"plot: {tmp_path} is a directory; give a file"
    assert "file is a file; give a directory" in fails("inspect", quantized[0], "--plot", tmp_path / "file" / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_inspect_a_model_that_is_not_quantized(model: Path) -> None:
    text = succeeds("inspect", model)
    assert "quantized:       no; weights are float32" in text
    assert re.search(r"^all +14 +\S+ +\S+ +4\.000$", text, re.MULTILINE)
    assert "recipe" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("modules"), "quantization_config"),
        (lambda q: q.update(format_version=2), "format_version is 2; this dllmquant reads 1"),
        (
            lambda q: q["modules"].update({"model.x": next(iter(q["modules"].values()))}),
            "no quantizable layer 'model.x'",
        ),
    ],
)
def test_inspect_reports_a_malformed_configuration(
    quantized: tuple[Path, str], tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    for path in quantized[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in fails("inspect", tmp_path)


def test_inspect_another_methods_model(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "yes, by 'gptq', not by dllmquant" in succeeds("inspect", tmp_path)


def test_generate(quantized: tuple[Path, str]) -> None:
    output, _ = quantized
    prompts = [PROMPT, "q: anna has 3 books. how many remain? a:"]
    loaded, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    expected = [text.strip() for text in dllmquant.generate(loaded, tokenizer, prompts)]
    assert succeeds("generate", output, *prompts).splitlines() == expected
    assert succeeds("generate", output, stdin="\n".join([prompts[0], "", prompts[1]]) + "\n").splitlines() == expected
    options = {"gen_length": 4, "steps": 2, "block_length": 2, "temperature": 1.0, "cfg_scale": 0.5, "seed": 5}
    expected = [text.strip() for text in dllmquant.generate(loaded, tokenizer, prompts, remasking="random", **options)]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert succeeds("generate", output, *prompts, "--remasking", "random", *words).splitlines() == expected
    expected = [text.strip() for text in dllmquant.generate(loaded, tokenizer, prompts, threshold=0.3)]
    assert succeeds("generate", output, *prompts, "--threshold", 0.3, "--batch-size", 1).splitlines() == expected


# eval


@pytest.fixture(scope="module")
def earlier(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file and the output of an evaluation."""
    path = tmp_path_factory.mktemp("eval") / "new" / "full.json"
    options = ["--tasks", "math,qa", "--limit", 4, "--mc-num", 2, "--seed", 1, "--batch-size", 3]
    return path, succeeds("eval", model, *options, "--json", path)


def test_eval_writes_what_python_measures(model: Path, earlier: tuple[Path, str]) -> None:
    path, text = earlier
    run_ = Evaluation.load(path)
    loaded, tokenizer = AutoModel.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    expected = evaluate(loaded, tokenizer, ["math", "qa"], limit=4, mc_num=2, seed=1, batch_size=3, progress=False)
    assert run_.items == expected.items
    assert run_.metadata["limit"] == 4
    assert run_.metadata["model"] == str(model)
    for task, score in run_.scores.items():
        assert re.search(rf"^{task} +4 +{100 * score.accuracy:.1f}% +\[", text, re.MULTILINE)
    assert (run_.metadata["recipe"], run_.metadata["protocol"]) == (None, "32-bit")
    assert text.startswith(f"{model}: 32-bit\ntask ")
    assert f"wrote {path}" in text
    assert "paired" not in text


def test_eval_takes_the_settings_of_a_preset(model: Path, tmp_path: Path) -> None:
    options = ["--tasks", "qa", "--limit", 1, "--json", tmp_path / "x.json"]
    succeeds("eval", model, *options, "--preset", "qdlm-mmlu")
    assert Evaluation.load(tmp_path / "x.json").metadata["mc_num"] == 1
    succeeds("eval", model, *options, "--preset", "qdlm-gsm8k", "--mc-num", 2, "--steps", 64)
    found = Evaluation.load(tmp_path / "x.json")
    assert found.metadata["mc_num"] == 2
    assert [found.sampler[name] for name in ("gen_length", "steps", "block_length")] == [256, 64, 32]
    assert "preset: unknown 'qdlm'; valid: qdlm-qa" in fails("eval", model, "--preset", "qdlm")


def test_eval_compares_with_an_earlier_run(
    quantized: tuple[Path, str], earlier: tuple[Path, str], tmp_path: Path
) -> None:
    content = json.loads(earlier[0].read_text(encoding="utf-8"))
    for item in content["items"]:
        item["correct"] = item["task"] == "math"  # so that this run cannot have more right in math, nor fewer in qa
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(content))
    options = ["--tasks", "qa,math", "--limit", 4, "--mc-num", 3, "--seed", 1, "--gen-length", 4, "--steps", 4]
    text = succeeds("eval", quantized[0], *options, "--json", tmp_path / "now.json", "--compare", path)
    now = Evaluation.load(tmp_path / "now.json")
    right = {task: sum(item.correct for item in now.items if item.task == task) for task in now.scores}
    assert right["math"] < 4
    points = {"math": 100 * right["math"] / 4 - 100, "qa": 100 * right["qa"] / 4}
    for task, (then, ours) in {"math": (4 - right["math"], 0), "qa": (0, right["qa"])}.items():
        pattern = rf"^{task} +4 +{re.escape(f'{points[task]:+.1f}')} +\[.*\] +{then} +{ours} "
        assert re.search(pattern, text, re.MULTILINE)
    assert (now.metadata["recipe"], now.metadata["protocol"]) == ("tiny", "linear")
    assert text.startswith(f"{quantized[0]}: recipe tiny, protocol linear\ntask ")
    assert f"\nthis run (recipe tiny, protocol linear) minus {path} (32-bit), paired by problem" in text
    assert "note: gen_length was 8, is 4" in text
    assert "note: mc_num was 2, is 3" in text
    assert "note: block_length" not in text


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "math,chess"], "tasks: 'chess'; valid: one or more of math, code, qa, each once"),
        (["--tasks", "math,math"], "tasks: 'math,math'; valid"),
        (["--tasks", ","], "tasks: ','; valid"),
        (["--json", "{tmp}"], "is a directory; give a file"),
        (["--json", "{tmp}/file.txt/x.json"], "file.txt is a file; give a directory"),
        (["--compare", "{tmp}/none.json"], "none.json: No such file"),
        (["--compare", "{tmp}/file.txt"], "file.txt: not an evaluation"),
        (
            ["--compare", "{earlier}"],
            "was run with tasks math,qa, this is math,code,qa; only runs on the same problems",
        ),
        (["--compare", "{earlier}", "--tasks", "qa,math"], "was run with limit 4, this is 200"),
        (["--compare", "{earlier}", "--tasks", "qa,math", "--limit", "4"], "was run with seed 1, this is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_checks_its_inputs_before_any_work(
    model: Path, earlier: tuple[Path, str], tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "file.txt").write_text("x")
    assert message in fails("eval", model, *(word.format(tmp=tmp_path, earlier=earlier[0]) for word in options))


def test_eval_compares_with_files_that_name_no_protocol(model: Path, earlier: tuple[Path, str], tmp_path: Path) -> None:
    content = json.loads(earlier[0].read_text(encoding="utf-8"))
    del content["metadata"]["recipe"], content["metadata"]["protocol"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps(content))
    options = ["--tasks", "math,qa", "--limit", 4, "--mc-num", 2, "--seed", 1, "--compare", path]
    assert f"\nthis run (32-bit) minus {path}, paired by problem" in succeeds("eval", model, *options)


# ablate


def write_ablation(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "name": "x",
        "models": ["llada-tiny"],
        "tasks": ["code"],
        "limit": 9,
        "cells": ["rtn-w4a4"],
        "agreement_prompts": 2,
        "sampler": {"gen_length": 8, "steps": 4},
    }
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def test_ablate_measures_goes_on_and_reports(tmp_path: Path) -> None:
    path, output = write_ablation(tmp_path / "x.yaml"), tmp_path / "new" / "out"
    planned = succeeds("ablate", path, "--output", output, "--limit", 2, "--dry-run")
    assert [line.split()[:3] for line in planned.splitlines()[2:4]] == [
        ["llada-tiny/16-bit/seed0", "to", "run"],
        ["llada-tiny/rtn-w4a4/seed0", "to", "run"],
    ]
    assert not output.exists()
    first = run("ablate", path, "--output", output, "--limit", 2, "--device", "cpu")
    assert first.exit_code == 0, (first.output, first.exception)
    assert [line.rsplit(": ", 1)[0] for line in first.stderr.splitlines()] == [
        "x",
        "finished: llada-tiny/16-bit/seed0",
        "finished: llada-tiny/rtn-w4a4/seed0",
    ]
    assert re.search(r"^llada-tiny +rtn-w4a4 +linear +1 +2 ", first.stdout, re.MULTILINE)
    assert (output / "results.md").is_file()
    again = run("ablate", path, "--output", output, "--limit", 2)
    assert again.stdout == first.stdout
    assert "finished before: llada-tiny/rtn-w4a4/seed0\n" in again.stderr
    assert "2 runs, 2 of them to run" in succeeds("ablate", path, "--output", output, "--dry-run")  # other limit


def test_ablate_tells_by_its_exit_code_that_a_run_failed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_ablation(tmp_path / "x.yaml", models=[str(model)], sampler={}, limit=1)
    monkeypatch.setattr(DLLMQuantizer, "quantize", lambda *_, **__: 1 / 0)
    result = run("ablate", path, "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "failed: tiny/rtn-w4a4: ZeroDivisionError: division by zero" in result.stdout
    assert "failed: tiny/rtn-w4a4/seed0: ZeroDivisionError" in result.stderr


def test_ablate_checks_its_inputs_before_any_work(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / "file").write_text("x")
    assert "no.yaml" in fails("ablate", tmp_path / "no.yaml", "--output", output)
    good = write_ablation(tmp_path / "good.yaml")
    assert fails("ablate", good, "--output", tmp_path / "file") == f"output: {tmp_path / 'file'} is a file; " + (
        "give a directory"
    )
    assert fails("ablate", good, "--output", output, "--device", "abacus").startswith("device: 'abacus'")
    bad = write_ablation(tmp_path / "bad.yaml", cells=[{"recipe": "rtn-w4a4", "overrides": {"weights": {"bit": 4}}}])
    assert "cell 'rtn-w4a4': recipe: weights.bit: unknown key; valid: bits" in fails("ablate", bad, "--output", output)
    unknown = write_ablation(tmp_path / "unknown.yaml", repeats=3)
    assert "repeats: unknown key; valid: version, name" in fails("ablate", unknown, "--output", output)
    assert not output.exists()


# recipes, demo


def test_recipes_are_listed() -> None:
    lines = succeeds("recipes").splitlines()
    assert [line.split()[0] for line in lines[2:]] == Recipe.names()
    for line in lines[2:]:
        assert line.endswith(Recipe.load(line.split()[0]).summary())


@pytest.mark.parametrize("name", Recipe.names())
def test_a_printed_recipe_is_that_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(succeeds("recipes", name), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(name)


def test_demo_runs_the_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run_demo(output: Path, **options: object) -> SimpleNamespace:
        calls.append((output, options))
        options["report"]("half way")  # type: ignore[operator]
        return SimpleNamespace(text="the table")

    monkeypatch.setattr(demo_module, "run_demo", run_demo)
    monkeypatch.setattr(demo_module, "stressed", lambda directory: directory)
    result = run("demo", "--output", tmp_path / "out", "--limit", 7, "--seed", 2)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "the table\n", "half way\n")
    ((output, options),) = calls
    assert (output, options["limit"], options["seed"], options["progress"]) == (tmp_path / "out", 7, 2, False)
    assert options["model"] == tmp_path / "out" / "llada-tiny-outliers"
    succeeds("demo", "--output", tmp_path / "out", "--natural")
    assert calls.pop()[1]["model"] is None
    (tmp_path / "file").write_text("x")
    assert "file is a file" in fails("demo", "--output", tmp_path / "file")
    assert len(calls) == 1


# logging


@pytest.fixture
def levels() -> Iterator[None]:
    def state() -> tuple[object, ...]:
        logger = logging.getLogger("dllmquant")
        bars = transformers_logging.is_progress_bar_enabled()
        return logger.level, list(logger.handlers), transformers_logging.get_verbosity(), bars

    before = state()
    yield
    assert state() == before


@pytest.mark.usefixtures("levels")
@pytest.mark.parametrize(("options", "logged"), [([], False), (["-v"], True), (["-vv"], True), (["--verbose"], True)])
def test_verbose(model: Path, recipe_file: Path, tmp_path: Path, options: list[str], logged: bool) -> None:
    result = run(*options, "quantize", model, "--recipe", recipe_file, "--output", tmp_path / "out")
    assert result.exit_code == 0
    assert ("INFO dllmquant.quantizer: no calibration prompts given" in result.stderr) is logged
    if not logged:
        assert result.stderr == ""


@pytest.mark.usefixtures("levels")
def test_settings_of_the_process_are_restored_after_an_error(odd_models: Path, tmp_path: Path) -> None:
    fails("quantize", odd_models / "mute", "--recipe", "rtn-w4a4", "--output", tmp_path / "out")
