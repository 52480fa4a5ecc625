"""The command line: one function per command, whose help is its docstring.

Whatever is wrong with the input is found before a model is loaded. It ends in one line, `error: ...`, on standard error
and exit code 2; `--debug` shows the traceback as well.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from dllmquant._version import __version__

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dllmquant.calibration import Prompt
    from dllmquant.lab.evaluate import Evaluation
    from dllmquant.quantizer import DLLMQuantizer
    from dllmquant.recipe import Recipe

# Loading less than this is over before a progress bar can be read.
_QUICK_BYTES = 2**30


class Dtype(StrEnum):
    """Floating-point types a model can be loaded in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Remasking(StrEnum):
    """Orders in which a sampler commits tokens."""

    low_confidence = "low_confidence"
    random = "random"


class _Group(TyperGroup):
    """Turns the errors a user can cause into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader has gone; typer ends quietly
        except (ValueError, OSError, SafetensorError) as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def main() -> None:
    """Runs the command line interface."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without, say, `░` still gets the rest
    app(prog_name="dllmquant")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dllmquant {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, show_default=False, help="Log what is done; -vv logs more."),
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Post-training quantization of diffusion language models.

    Start with the demonstration, which needs no download and no GPU:

        dllmquant demo

    Options of the program stand before the command: dllmquant -v quantize ...
    """
    logger = logging.getLogger("dllmquant")
    previous = logger.level
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))

    def restore() -> None:
        logger.removeHandler(handler)
        logger.setLevel(previous)

    ctx.call_on_close(restore)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that several commands share

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", show_default=False, help="Directory, hub id (owner/name), or bundled model."),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Seed of everything random.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Such as cpu or cuda:1; auto takes a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type to load the model in; auto is the checkpoint's own.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Sequences per forward pass.")]
Steps = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Denoising steps of a generation. [default: the checkpoint's]")
]
GenLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens to generate. [default: the checkpoint's]")
]
BlockLength = Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens per block; divides --gen-length.")]
Temperature = Annotated[float | None, typer.Option(min=0.0, metavar="T", help="0 always takes the likeliest token.")]
CfgScale = Annotated[
    float | None,
    typer.Option(min=0.0, metavar="S", help="Classifier-free guidance; 0 is off, else every step doubles."),
]
RemaskingOption = Annotated[
    Remasking | None, typer.Option(help="Which tokens to commit: the most confident, or random ones.")
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="P", help="Commit every token at least this confident, instead of a fixed number."
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory for checkpoints, picture, numbers and table.")
    ] = Path("demo-output"),
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out problems per task.")] = 200,
    seed: Seed = 0,
    natural: Annotated[
        bool, typer.Option("--natural", help="Quantize the bundled model as it is, without planted outliers.")
    ] = False,
) -> None:
    """Quantize the bundled model in four ways and measure each.

    Outliers like those of large models are planted in the bundled model first, without changing what it computes.
    It is then quantized to 4-bit weights and activations by rounding, by GPTQ, by DLLMQuant and by DLLMQuant++;
    saved, reloaded, and evaluated on held-out problems. DIR then holds the checkpoints, demo.png, demo.json and
    demo.md. This takes a few minutes on a CPU.

    For example:

        dllmquant demo --output demo-output --limit 50
    """
    from dllmquant.lab.demo import run_demo, stressed

    _check_writable(output, "output")
    with _tamed_transformers(bars=False):
        result = run_demo(
            output,
            limit=limit,
            seed=seed,
            model=None if natural else stressed(output / "llada-tiny-outliers"),
            progress=_interactive(),
            report=lambda line: typer.echo(line, err=True),
        )
    typer.echo(result.text)


@app.command()
def quantize(
    model: Model,
    recipe: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Built-in recipe (see dllmquant recipes) or a YAML file.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the checkpoint; new or empty.")],
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Calibration prompts: a file (.txt, .jsonl, .json, .parquet) or a data set of the hub, owner/name or "
            "owner/name:config. [default: built-in problems]",
        ),
    ] = None,
    prompt_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field of the prompts. [default: prompt, or the only one]"),
    ] = None,
    completion_field: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Field of the completions. [default: completion, where there is one]"),
    ] = None,
    split: Annotated[
        str | None, typer.Option(metavar="SPLIT", help="Split of a data set, such as train[:10%]. [default: train]")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Make each prompt a user's turn in the tokenizer's chat template.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Seed of the calibration. [default: the recipe's]")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint in a directory that is not empty.")
    ] = False,
) -> None:
    """Quantize a model by a recipe and save it.

    The result is a checkpoint directory for transformers, with the tokenizer. Inputs are checked before the model
    is loaded. Of your own prompts, the recipe's number is drawn in an order that depends on the seed.

    For example:

        dllmquant quantize llada-tiny --recipe dllmquant-w4a4 --output out

        dllmquant quantize llada-tiny --recipe dllmquant-w4a4 --output mine --prompts mine.jsonl

        dllmquant quantize llada-tiny --recipe rtn-w8a8 --output out8
    """
    from dllmquant.quantizer import DLLMQuantizer

    quantizer = DLLMQuantizer(recipe)
    _check_output(output, overwrite)
    options = _prompt_options(prompts, quantizer.recipe, prompt_field, completion_field, split, chat_template)
    where = _device(device)
    calibration = quantizer.recipe.calibration
    source, config = _find_model(model, None if calibration is None else calibration.sampler)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: {model} is quantized already; give the 16-bit original")
    if output.exists() and Path(source).is_dir() and output.samefile(source):
        raise ValueError(f"output: {output} is the directory of the model itself; give another")
    with _tamed_transformers(bars=not _is_quick(source)):
        tokenizer = _load_tokenizer(source)
        rows = None if prompts is None else _load_prompts(prompts, quantizer.recipe, seed, tokenizer, options)
        loaded = _load_model(source, dtype, where)
        began = time.perf_counter()
        quantizer.quantize(loaded, tokenizer=tokenizer, prompts=rows, seed=seed, progress=_interactive())
        seconds = time.perf_counter() - began
        loaded.save_pretrained(output)
        tokenizer.save_pretrained(output)
    typer.echo(_quantization_report(quantizer, loaded, output, seconds))


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", show_default=False, help="Prompts; none reads one per line from stdin."),
    ] = None,
    steps: Steps = None,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    cfg_scale: CfgScale = None,
    remasking: RemaskingOption = None,
    threshold: Threshold = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
) -> None:
    """Complete prompts with the model's own sampler.

    The model may be quantized or not. Sampler settings that are not given are the checkpoint's. Completions are
    printed in the order of the prompts.

    For example:

        dllmquant generate out "q: tom has 7 apples. tom buys 5 more. how many remain? a:"

        dllmquant generate llada-tiny --threshold 0.9 < prompts.txt
    """
    from dllmquant.generation import generate as complete

    texts = prompts or _prompts_from_stdin()
    for index, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"prompt {index + 1} is empty; give some text")
    sampler = _sampler_options(steps, gen_length, block_length, temperature, cfg_scale, remasking, threshold)
    where = _device(device)
    source, _ = _find_model(model, sampler)
    with _tamed_transformers(bars=not _is_quick(source)):
        tokenizer = _load_tokenizer(source)
        loaded = _load_model(source, dtype, where)
    options = {"seed": seed, "batch_size": batch_size, "progress": _interactive(), **sampler}
    for completion in complete(loaded, tokenizer, texts, **options):
        typer.echo(completion.strip())


@app.command(name="eval")
def evaluate_(
    model: Model,
    tasks: Annotated[str, typer.Option(metavar="LIST", help="Tasks, separated by commas.")] = "math,code,qa",
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Held-out problems per task.")] = 200,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results, one entry per problem.")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Hold the results against those of an earlier run, problem by problem."),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    mc_num: Annotated[
        int, typer.Option(min=1, metavar="N", help="Masks drawn per choice in tasks scored by likelihood.")
    ] = 128,
    steps: Steps = None,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    cfg_scale: CfgScale = None,
    remasking: RemaskingOption = None,
    threshold: Threshold = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = "auto",
) -> None:
    """Measure a model on held-out problems.

    With --compare, also against an earlier run on the same problems: differences come with the 95% interval of a
    paired bootstrap and the p-value of McNemar's exact test.

    For example:

        dllmquant eval llada-tiny --json full.json

        dllmquant eval out --json out.json --compare full.json
    """
    from dllmquant.lab.evaluate import Evaluation, evaluate
    from dllmquant.lab.evaluate import compare as compare_evaluations

    names = _task_names(tasks)
    earlier = None if compare is None else Evaluation.load(compare)
    if earlier is not None:
        _check_comparable(earlier, {"tasks": names, "limit": limit, "seed": seed}, compare)
    if json_file is not None:
        _check_file(json_file, "json")
    sampler = _sampler_options(steps, gen_length, block_length, temperature, cfg_scale, remasking, threshold)
    where = _device(device)
    source, _ = _find_model(model, sampler)
    with _tamed_transformers(bars=not _is_quick(source)):
        tokenizer = _load_tokenizer(source)
        loaded = _load_model(source, dtype, where)
    run = evaluate(
        loaded,
        tokenizer,
        names,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        mc_num=mc_num,
        progress=_interactive(),
        **sampler,
    )
    run = replace(run, metadata=run.metadata | {"model": model})
    typer.echo(_scores_table(run))
    if json_file is not None:
        run.save(json_file)
        typer.echo(f"\nwrote {json_file}")
    if earlier is not None:
        typer.echo(f"\n{_differences_table(compare_evaluations(earlier, run), earlier, run, str(compare))}")


@app.command()
def ablate(
    ablation: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="The ablation: a YAML file.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the results; one that holds some is completed.")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Held-out problems per task. [default: the file's]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the planned runs; measure nothing.")] = False,
    device: Device = "auto",
) -> None:
    """Compare recipes on a grid of models, overrides and seeds.

    FILE names models, and cells: recipes with overrides. Every cell is measured against the 16-bit model on the same
    problems. DIR receives a file per run in cells/, and results.md, .csv, .json and .png, written anew after every
    run. The command may be interrupted and started again: what is measured is not measured twice, and what has
    changed is measured anew. A run that fails is reported, the others go on, and the exit code is 1.

    A whole FILE, with the seeds of the calibration (docs/ablation.md lists all keys):

        name: groups at W4A4

        models: [llada-tiny]

        seeds: [0, 1, 2]

        cells:

        - gptq-w4a4

        - {recipe: gptq-w4a4, name: g16, overrides: {weights: {group_size: 16}}}

        compare: [[g16, gptq-w4a4]]

    For example:

        dllmquant ablate ablation.yaml --output runs/groups --dry-run

        dllmquant ablate ablation.yaml --output runs/groups --limit 200
    """
    from dllmquant.lab.ablation import Ablation, plan_ablation, planned_text, run_ablation

    _check_writable(output, "output")
    document = Ablation.load(ablation)
    if limit is not None:
        document = document.model_copy(update={"limit": limit})
    where = _device(device)
    with _tamed_transformers(bars=False):
        plan = plan_ablation(document, base=ablation.parent)
        if dry_run:
            typer.echo(planned_text(plan, output))
            return
        result = run_ablation(plan, output, device=where, progress=_interactive(), report=_above_the_bar)
    typer.echo(result.text)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", show_default=False, help="A recipe to print; none lists the built-in ones."),
    ] = None,
) -> None:
    """List the built-in recipes, or print one as YAML.

    What is printed is a recipe itself, every setting spelled out: save it, change it, and give the file to quantize.

    For example:

        dllmquant recipes

        dllmquant recipes dllmquant-w4a4 > mine.yaml
    """
    from dllmquant.lab.tables import aligned
    from dllmquant.recipe import Recipe

    if name is not None:
        typer.echo(Recipe.load(name).to_yaml().rstrip())
        return
    loaded = [Recipe.load(built_in) for built_in in Recipe.names()]
    typer.echo(aligned(["recipe", "what it does"], [[recipe.name, recipe.summary()] for recipe in loaded], left=2))


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR", show_default=False, help="Checkpoint directory.")],
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw coverage and activation bits, as far as there are any, as a PNG."),
    ] = None,
) -> None:
    """Tell what a checkpoint holds.

    That is its recipe, protocol, version and seed; its layers, their bits, input transforms and bytes per weight; its
    activation bits where they differ; where in the denoising process its calibration states lie; and its files. The
    configuration and the headers of the weight files are read; the weights are not loaded.

    For example:

        dllmquant inspect out

        dllmquant inspect out --plot out.png
    """
    from dllmquant.lab.inspection import checkpoint_bits, checkpoint_coverage, describe_checkpoint

    source, config = _find_model(model)
    if not Path(source).is_dir():
        raise ValueError(f"model: {model} is not on this disk; give a directory")
    if plot is not None:
        _check_file(plot, "plot")
    text = describe_checkpoint(Path(source), config)
    if plot is not None:
        from dllmquant.lab.checkpoint_plots import plot_checkpoint  # only now: matplotlib takes its time

        coverage, bits = checkpoint_coverage(config), checkpoint_bits(config)
        plot_checkpoint(plot, coverage=coverage, bits=bits, title=str(model))
        text += f"\n\nwrote {plot}"
    typer.echo(text)


# ---------------------------------------------------------------------------------------------------------------------
# Checks of the input


def _one_line(error: BaseException) -> str:
    """An error's message without line breaks; for failed file operations the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _check_writable(directory: Path, field: str) -> None:
    """Checks that a directory can be made or written to, without making it."""
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{field}: {existing} is a file; give a directory")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{field}: {existing} is not writable")


def _check_file(path: Path, field: str) -> None:
    """Checks that a file can be written."""
    if path.is_dir():
        raise ValueError(f"{field}: {path} is a directory; give a file")
    _check_writable(path.parent, field)


def _check_output(output: Path, overwrite: bool) -> None:
    _check_writable(output, "output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output: {output} is not empty; give a new directory, or --overwrite")


def _prompt_options(
    prompts: str | None,
    recipe: "Recipe",
    prompt_field: str | None,
    completion_field: str | None,
    split: str | None,
    chat_template: bool,
) -> dict[str, Any]:
    """The options that say how calibration prompts are read, after checking that they have a meaning."""
    given = {
        "--prompt-field": prompt_field,
        "--completion-field": completion_field,
        "--split": split,
        "--chat-template": chat_template or None,
    }
    if prompts is None:
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"{option}: has no effect without --prompts; leave it out, or give --prompts")
    elif recipe.calibration is None:
        raise ValueError(f"prompts: recipe {recipe.name!r} uses no calibration data; leave --prompts out")
    elif split is not None and Path(prompts).expanduser().is_file():
        raise ValueError(f"--split: {prompts} is a file, which has no splits; leave --split out")
    options = {"field": prompt_field, "completion_field": completion_field, "split": split}
    return {"chat_template": chat_template} | {name: value for name, value in options.items() if value is not None}


def _load_prompts(
    source: str, recipe: "Recipe", seed: int | None, tokenizer: "PreTrainedTokenizerBase", options: dict[str, Any]
) -> "list[Prompt]":
    """Draws as many calibration prompts as the recipe consumes."""
    import datasets

    from dllmquant.calibration import load_prompts, prompts_needed

    assert recipe.calibration is not None
    had_bars = not datasets.are_progress_bars_disabled()
    if not _interactive():
        datasets.disable_progress_bars()
    try:
        return load_prompts(
            source,
            count=prompts_needed(recipe.calibration),
            seed=recipe.seed if seed is None else seed,
            tokenizer=tokenizer,
            **options,
        )
    finally:
        if had_bars:
            datasets.enable_progress_bars()


def _prompts_from_stdin() -> list[str]:
    if sys.stdin.isatty():
        raise ValueError("prompt: none given; give prompts as arguments, or one per line on standard input")
    texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not texts:
        raise ValueError("prompt: none given, and standard input is empty")
    return texts


def _task_names(tasks: str) -> list[str]:
    from dllmquant.tasks import TASKS

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"tasks: {unknown[0] if unknown else tasks!r}; valid: one or more of {', '.join(TASKS)}, each once"
        )
    return names


def _check_comparable(earlier: "Evaluation", ours: dict[str, Any], path: Path | None) -> None:
    theirs: dict[str, Any] = {
        "tasks": list(earlier.scores),
        **{name: earlier.metadata.get(name) for name in ("limit", "seed")},
    }
    for name, value in ours.items():
        same = sorted(value) == sorted(theirs[name]) if name == "tasks" else value == theirs[name]
        if not same:
            raise ValueError(
                f"compare: {path} was run with {name} {_spelled(theirs[name])}, this is {_spelled(value)}; "
                "only runs on the same problems can be paired"
            )


def _spelled(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _sampler_options(
    steps: int | None,
    gen_length: int | None,
    block_length: int | None,
    temperature: float | None,
    cfg_scale: float | None,
    remasking: Remasking | None,
    threshold: float | None,
) -> dict[str, Any]:
    """The sampler settings that were given."""
    options = {
        "steps": steps,
        "gen_length": gen_length,
        "block_length": block_length,
        "temperature": temperature,
        "cfg_scale": cfg_scale,
        "remasking": None if remasking is None else remasking.value,
        "threshold": threshold,
    }
    return {name: value for name, value in options.items() if value is not None}


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device: {name!r} cannot be used ({_one_line(error).split('. ')[0]}); valid: cpu, or a GPU"
        ) from None
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Models


def _find_model(name: str, sampler: dict[str, Any] | None = None) -> "tuple[str, PretrainedConfig]":
    """Resolves a model's name and reads its configuration, which shows whether it is one we know.

    Args:
        name: Directory, hub id or name of a bundled model.
        sampler: Sampler settings to check against the checkpoint's.

    Returns:
        What `from_pretrained` takes, and the configuration.

    Raises:
        ValueError: There is no such model, it is no diffusion LLM, or the sampler settings do not fit.
    """
    from transformers import AutoConfig

    from dllmquant.assets import bundled, bundled_names
    from dllmquant.models import registered_adapters

    directory = Path(name).expanduser()
    if directory.is_dir():
        source = str(directory)
        if not (directory / "config.json").is_file():
            raise ValueError(f"model: {name} holds no config.json, so it is not a checkpoint")
    elif name in bundled_names():
        source = bundled(name)
    elif directory.exists():
        raise ValueError(f"model: {name} is a file; give the checkpoint's directory")
    elif name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ValueError(
            f"model: there is no directory {name!r}; valid: a directory, a hub id (owner/name), or a bundled model: "
            f"{', '.join(bundled_names())}"
        )
    else:
        source = name
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model: {name} cannot be read: {_one_line(error)}") from error
    adapters = registered_adapters()
    if config.model_type not in adapters:
        raise ValueError(
            f"model: {name} is a {config.model_type!r}; valid diffusion LLMs: {', '.join(sorted(adapters))}"
        )
    adapters[config.model_type].sampler_config(config, **(sampler or {}))
    return source, config


def _load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {source} has no tokenizer that can be read: {_one_line(error)}") from error
    return tokenizer


def _load_model(source: str, dtype: Dtype, device: str) -> "PreTrainedModel":
    from transformers import AutoModel

    model: PreTrainedModel = AutoModel.from_pretrained(source, dtype=dtype.value, device_map=device)
    model.eval()
    return model


def _is_quick(source: str) -> bool:
    """Whether a model's weights are on this disk and small."""
    directory = Path(source)
    return directory.is_dir() and sum(path.stat().st_size for path in directory.glob("*.safetensors")) < _QUICK_BYTES


def _above_the_bar(line: str) -> None:
    """Prints a line on standard error without breaking a progress bar that may be there."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)


def _interactive() -> bool:
    return sys.stderr.isatty()


@contextmanager
def _tamed_transformers(*, bars: bool) -> Iterator[None]:
    """While the context lasts, transformers says what is wrong and nothing else, with progress bars if asked for."""
    from transformers.utils import logging as noise

    level, had_bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    if not (bars and _interactive()):
        noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(level)
        if had_bars:
            noise.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------------
# Reports


def _quantization_report(quantizer: "DLLMQuantizer", model: "PreTrainedModel", output: Path, seconds: float) -> str:
    from dllmquant.checkpoint import weight_bytes
    from dllmquant.lab.inspection import mean_bits
    from dllmquant.nn.linear import QuantLinear

    recipe, reports, size = quantizer.recipe, quantizer.reports, weight_bytes(model)
    lines = [
        f"{recipe.name}: {recipe.summary()}",
        f"protocol: {recipe.protocol}",
        f"quantized {len(reports)} layers, {size.quantized_parameters:,} weights, in {seconds:.1f} s: "
        f"{size.quantized_bytes:,} bytes, {size.bytes_per_quantized_weight:.3f} per weight",
        f"kept in 16 or more bits: {size.other_parameters:,} weights, {size.other_bytes:,} bytes",
    ]
    if size.attention_bytes:
        lines.append(f"scales of quantized attention: {size.attention_bytes:,} bytes")
    losses = [(report.loss, report.name) for report in reports if report.loss is not None]
    if losses:
        loss, name = max(losses)
        lines.append(
            f"calibrated on {max(report.tokens for report in reports):,} tokens; "
            f"largest squared output error per token {loss:.4g}, in {name}"
        )
    if quantizer.allocation:
        layers = {entry.site: model.get_submodule(entry.site) for entry in quantizer.allocation}
        widths = {site: layer.in_features for site, layer in layers.items() if isinstance(layer, QuantLinear)}
        given = "/".join(map(str, sorted({entry.bits for entry in quantizer.allocation})))
        lines.append(f"activation bits by input: {given}, mean {mean_bits(quantizer.allocation, widths):.3g} per value")
    if quantizer.states is not None:
        if quantizer.states.coverage is not None:
            lines.append(f"calibration states: {quantizer.states.coverage.summary()}")
        lines += [f"note: {note}" for note in quantizer.states.notes]
    lines.append(
        f"wrote {output} ({sum(path.stat().st_size for path in output.glob('*.safetensors')):,} bytes of weights)"
    )
    return "\n".join(lines)


def _scores_table(run: "Evaluation") -> str:
    from dllmquant.lab.tables import aligned

    rows = [
        [
            task,
            str(score.n),
            f"{100 * score.accuracy:.1f}%",
            f"[{100 * score.low:.1f}, {100 * score.high:.1f}]",
            f"{100 * score.truncation_rate:.1f}%",
            f"{score.tokens_per_second:.0f}" if score.generated_tokens else "-",
            f"{score.seconds:.1f}",
        ]
        for task, score in run.scores.items()
    ]
    return aligned(["task", "n", "accuracy", "95% interval", "truncated", "tokens/s", "seconds"], rows)


def _differences_table(differences: Sequence[Any], earlier: "Evaluation", run: "Evaluation", name: str) -> str:
    from dllmquant.lab.tables import aligned

    rows = [
        [
            paired.task,
            str(paired.n),
            f"{100 * paired.difference:+.1f}",
            f"[{100 * paired.low:+.1f}, {100 * paired.high:+.1f}]",
            str(paired.only_a),
            str(paired.only_b),
            f"{paired.p_value:.3g}",
        ]
        for paired in differences
    ]
    header = ["task", "n", "points", "95% interval", "only earlier right", "only this right", "p"]
    lines = [f"this run minus {name}, paired by problem, in percentage points", aligned(header, rows)]
    then, now = ({**either.sampler, "mc_num": either.metadata.get("mc_num")} for either in (earlier, run))
    lines += [f"note: {key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    return "\n".join(lines)
