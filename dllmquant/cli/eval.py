"""`dllmquant eval`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllmquant.cli.checks import check_file
from dllmquant.cli.loading import (
    find_model,
    interactive,
    is_quick,
    load_model,
    load_tokenizer,
    tamed_transformers,
    usable_device,
)
from dllmquant.cli.options import (
    BatchSize,
    BlockLength,
    CfgScale,
    Device,
    Dtype,
    DtypeOption,
    GenLength,
    Model,
    RemaskingOption,
    Seed,
    Steps,
    Temperature,
    Threshold,
    sampler_options,
)

if TYPE_CHECKING:
    from dllmquant.lab.evaluate import Evaluation


def eval_(
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
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Settings of a published protocol, such as qdlm-gsm8k; others come first."),
    ] = None,
    mc_num: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Masks drawn per choice. [default: the preset's, or 128]"),
    ] = None,
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
    from dllmquant.lab.evaluate import Evaluation, check_mask_token, evaluate
    from dllmquant.lab.evaluate import compare as compare_evaluations
    from dllmquant.models import registered_adapters
    from dllmquant.presets import Preset, find_preset

    names = _task_names(tasks)
    earlier = None if compare is None else Evaluation.load(compare)
    if earlier is not None:
        _check_comparable(earlier, {"tasks": names, "limit": limit, "seed": seed}, compare)
    if json_file is not None:
        check_file(json_file, "json")
    protocol = Preset() if preset is None else find_preset(preset)
    given = sampler_options(steps, gen_length, block_length, temperature, cfg_scale, remasking, threshold)
    sampler = {**protocol.sampler, **given}
    where = usable_device(device)
    source, config = find_model(model, sampler)
    check_mask_token(names, registered_adapters()[config.model_type])
    with tamed_transformers(bars=not is_quick(source)):
        tokenizer = load_tokenizer(source)
        loaded = load_model(source, dtype, where)
    run = evaluate(
        loaded,
        tokenizer,
        names,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        mc_num=protocol.mc_num if mc_num is None else mc_num,
        progress=interactive(),
        **sampler,
    )
    run = replace(run, metadata=run.metadata | {"model": model})
    typer.echo(_scores_table(run))
    if json_file is not None:
        run.save(json_file)
        typer.echo(f"\nwrote {json_file}")
    if earlier is not None:
        typer.echo(f"\n{_differences_table(compare_evaluations(earlier, run), earlier, run, str(compare))}")


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


def _measured(run: "Evaluation") -> str:
    """Recipe and protocol of what a run measured; empty for files that do not say."""
    recipe, protocol = (run.metadata.get(name) for name in ("recipe", "protocol"))
    return str(protocol or "") if recipe is None else f"recipe {recipe}, protocol {protocol}"


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
    table = aligned(["task", "n", "accuracy", "95% interval", "truncated", "tokens/s", "seconds"], rows)
    return f"{run.metadata['model']}: {_measured(run)}\n{table}"


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
    earlier_model = f" ({_measured(earlier)})" if _measured(earlier) else ""
    title = f"this run ({_measured(run)}) minus {name}{earlier_model}, paired by problem, in percentage points"
    lines = [title, aligned(header, rows)]
    then, now = ({**either.sampler, "mc_num": either.metadata.get("mc_num")} for either in (earlier, run))
    lines += [f"note: {key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
    return "\n".join(lines)
