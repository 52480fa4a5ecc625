"""The command line: one function per command; its docstring is its help."""

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dllmquant.decoding import SamplerConfig

app = typer.Typer(
    name="dllmquant",
    help="Post-training quantization for diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Argument(help="Directory, hub id, or bundled name such as llada-tiny.", metavar="MODEL")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts decoded together.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps in all.")]
GenLength = Annotated[int | None, typer.Option(help="Tokens to generate.")]
BlockLength = Annotated[int | None, typer.Option(help="Tokens per block.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the most likely token.")]
CfgScale = Annotated[float | None, typer.Option(help="Classifier-free guidance; doubles the work.")]
Remasking = Annotated[Literal["low_confidence", "random"] | None, typer.Option(help="Which candidates to keep.")]
Threshold = Annotated[float | None, typer.Option(help="Commit every candidate at least this confident, per step.")]


def _version(show: bool) -> None:
    if show:
        from dllmquant._version import __version__

        typer.echo(f"dllmquant {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the library logs.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for checkpoints, table and picture.")] = Path("demo-output"),
    limit: Annotated[int, typer.Option(min=1, help="Held-out problems per task.")] = 200,
    seed: Seed = 0,
) -> None:
    """Quantize the bundled model by three recipes and measure what each loses.

    Saves and reloads every checkpoint, decodes the same held-out problems with each, prints a table and one problem's
    denoising side by side, and writes OUTPUT/demo.png. Takes a few minutes on two CPU cores.

    Example: `dllmquant demo --output demo-output`
    """
    _quiet()
    from dllmquant.lab.demo import run_demo

    result = run_demo(output, limit=limit, seed=seed, progress=_interactive(), say=lambda line: typer.echo(f"· {line}"))
    typer.echo(f"\n{result.table}\n\n{result.denoising}\n")
    typer.echo(
        f"{result.seconds:.0f} s, peak memory {result.peak_bytes / 2**30:.2f} GiB; "
        f"picture: {result.picture}, numbers: {output / 'demo.json'}"
    )


@app.command()
def quantize(
    model: Model,
    recipe: Annotated[str, typer.Option(help="Built-in name (see `dllmquant recipes`) or path of a YAML file.")],
    output: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='Calibration prompts: a text file, one per line, or .jsonl with "prompt" [and "completion"].'
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of what stays unpacked.")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Write into a directory that is not empty.")] = False,
) -> None:
    """Quantize a model and save it with its tokenizer.

    Examples:

    `dllmquant quantize llada-tiny --recipe dllmquant-w4a4 --output out`

    `dllmquant quantize GSAI-ML/LLaDA-8B-Instruct --recipe dllmquant-w4a16 --prompts mine.jsonl --output out`
    """
    from dllmquant.recipe import Recipe

    resolved = Recipe.load(recipe)
    given = None if prompts is None else _read_prompts(prompts)
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: {output} exists and is not empty; choose another or pass --overwrite")
    _quiet()
    from dllmquant.checkpoint import weight_bytes
    from dllmquant.quantizer import DLLMQuantizer

    loaded, tokenizer = _load(model, device, dtype)
    quantizer = DLLMQuantizer(resolved)
    quantizer.quantize(loaded, tokenizer=tokenizer, prompts=given, seed=seed, save_dir=output, progress=_interactive())
    size = weight_bytes(loaded)
    typer.echo(f"{resolved.name}: {resolved.summary()}")
    typer.echo(
        f"{len(quantizer.reports)} layers packed, {size.bytes_per_quantized_weight:.3f} bytes per weight; "
        f"all weights {size.total_bytes / 1e6:.2f} MB; saved to {output}"
    )


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts; standard input, line by line, if none.")] = None,
    steps: Steps = None,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    cfg_scale: CfgScale = None,
    remasking: Remasking = None,
    threshold: Threshold = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
) -> None:
    """Generate completions with the model family's own sampler.

    Settings that are not given are the checkpoint's own.

    Example: `dllmquant generate llada-tiny "q: tom has 7 apples. tom buys 5 more. how many remain? a:"`
    """
    texts = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise ValueError("prompts: none given, and standard input is empty")
    _quiet()
    from dllmquant.generation import generate as run

    loaded, tokenizer = _load(model, device)
    completions = run(
        loaded,
        tokenizer,
        texts,
        seed=seed,
        batch_size=batch_size,
        progress=_interactive() and len(texts) > batch_size,
        steps=steps,
        gen_length=gen_length,
        block_length=block_length,
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        threshold=threshold,
    )
    for completion in completions:
        typer.echo(completion)


@app.command(name="eval")
def evaluate_command(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Comma-separated: math, code, qa.")] = "math,code",
    limit: Annotated[int, typer.Option(min=1, help="Held-out problems per task.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where per-problem results go.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Results of another run of the same problems.")] = None,
    mc_num: Annotated[int, typer.Option(min=1, help="Monte Carlo samples per choice (qa).")] = 32,
    steps: Steps = None,
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    cfg_scale: CfgScale = None,
    remasking: Remasking = None,
    threshold: Threshold = None,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")] = "cpu",
) -> None:
    """Measure a model on held-out problems by free-running generation.

    Example: `dllmquant eval out --tasks math,code --limit 1000 --json q.json --compare fp.json`
    """
    from dllmquant.tasks import TASKS

    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise ValueError(f"--tasks: unknown {name!r}; valid: {', '.join(TASKS)}")
    _quiet()
    from dllmquant.lab.evaluate import Evaluation, evaluate
    from dllmquant.lab.evaluate import compare as compare_evaluations

    other = None if compare is None else Evaluation.load(compare)
    loaded, tokenizer = _load(model, device)
    result = evaluate(
        loaded,
        tokenizer,
        names,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        mc_num=mc_num,
        progress=_interactive(),
        steps=steps,
        gen_length=gen_length,
        block_length=block_length,
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
        threshold=threshold,
    )
    if json_file is not None:
        result.save(json_file)
    for name, score in result.scores.items():
        typer.echo(
            f"{name}: {score.accuracy:.1%} [{score.low:.1%}, {score.high:.1%}] of {score.n}; "
            f"truncated {score.truncation_rate:.1%}; {score.forward_passes} forward passes; "
            f"{score.tokens_per_second:.0f} tokens/s"
        )
    if other is not None:
        for d in compare_evaluations(other, result):
            typer.echo(
                f"{d.task} against {compare}: {100 * d.difference:+.1f} points "
                f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}], McNemar p = {d.p_value:.2g}"
            )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe with every setting spelled out.")] = None,
) -> None:
    """List the built-in recipes, or print one.

    Example: `dllmquant recipes dllmquant-w4a4 > mine.yaml`
    """
    from dllmquant.recipe import Recipe

    if name is not None:
        typer.echo(Recipe.load(name).to_yaml(), nl=False)
        return
    width = max(map(len, Recipe.names()))
    for known in Recipe.names():
        typer.echo(f"{known:<{width}}  {Recipe.load(known).summary()}")


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(help="Checkpoint directory, or a bundled name.", metavar="DIR")],
) -> None:
    """Show what a checkpoint holds: recipe, seed, packed layers, bytes.

    Example: `dllmquant inspect out`
    """
    path = Path(_resolve(directory))
    if not (path / "config.json").is_file():
        raise ValueError(f"DIR: {path} holds no config.json, so it is not a checkpoint")
    _quiet()
    from dllmquant.checkpoint import weight_bytes

    model, _ = _load(str(path), "cpu", tokenizer=False)
    size = weight_bytes(model)
    files = {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}
    typer.echo(f"model: {type(model).__name__} ({model.config.model_type}), {str(model.dtype).removeprefix('torch.')}")
    typer.echo("files: " + ", ".join(f"{file} {count:,} bytes" for file, count in files.items()))
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        typer.echo(f"not quantized: {size.other_parameters:,} parameters, {size.other_bytes:,} bytes")
        return
    from dllmquant.recipe import Recipe

    recipe = Recipe.load(config.recipe)
    typer.echo(f"recipe: {recipe.name}: {recipe.summary()}")
    typer.echo(f"written by: dllmquant {config.library_version}, seed {config.seed}, format {config.format_version}")
    typer.echo(f"calibration states: {config.states_hash or 'none'}")
    typer.echo(
        f"packed: {size.quantized_parameters:,} weights in {len(config.modules)} layers, "
        f"{size.quantized_bytes:,} bytes, "
        f"{size.bytes_per_quantized_weight:.3f} bytes per weight"
    )
    for scheme, count in sorted(_schemes(config.modules).items()):
        typer.echo(f"  {count} layers: {scheme}")
    typer.echo(f"not packed: {size.other_parameters:,} parameters, {size.other_bytes:,} bytes")


def _schemes(modules: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Counts the packed layers by weight and activation scheme."""
    counts: dict[str, int] = {}
    for scheme in modules.values():
        weight, activation = scheme["weight"], scheme["activation"]
        text = f"weights {_grid(weight)}; activations {'16 bits' if activation is None else _grid(activation)}"
        counts[text] = counts.get(text, 0) + 1
    return counts


def _grid(scheme: dict[str, Any]) -> str:
    group = "whole rows" if scheme["group_size"] is None else f"groups of {scheme['group_size']}"
    return f"{scheme['bits']} bits, {group}, {'symmetric' if scheme['symmetric'] else 'asymmetric'}"


def _read_prompts(path: Path) -> list[str | tuple[str, str]]:
    """Reads calibration prompts from a text or .jsonl file."""
    if not path.is_file():
        raise ValueError(f"--prompts: no file {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return list(lines)
    prompts: list[str | tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            prompt, completion = record["prompt"], record.get("completion")
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f'--prompts: {path}, line {number}: not a JSON object with "prompt"') from None
        prompts.append(prompt if completion is None else (prompt, completion))
    return prompts


def _resolve(model: str) -> str:
    """Returns the directory of a bundled model, or the name as it is."""
    from dllmquant.assets import bundled, bundled_names

    return bundled(model) if model in bundled_names() and not Path(model).exists() else model


def _load(
    model: str, device: str, dtype: str = "auto", *, tokenizer: bool = True
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Loads a model and its tokenizer, without remote code."""
    from transformers import AutoModel, AutoTokenizer

    import dllmquant.integrations.transformers
    import dllmquant.models  # noqa: F401 - registers the families

    path = _resolve(model)
    loaded = AutoModel.from_pretrained(path, dtype=dtype).to(device)
    return loaded, AutoTokenizer.from_pretrained(path) if tokenizer else None


def _interactive() -> bool:
    """Progress bars are for people who watch."""
    return sys.stderr.isatty()


def _quiet() -> None:
    """Loading a tiny model needs no progress bar."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; errors in the input end with one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if "--debug" in arguments:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
