"""Where in the denoising process the calibration states of a checkpoint lie."""

from transformers import PretrainedConfig

from dllmquant.core.coverage import Coverage
from dllmquant.integrations.transformers import DLLMQuantConfig
from dllmquant.lab.inspection.structure import quantization_of
from dllmquant.lab.tables import aligned
from dllmquant.recipe import Recipe


def checkpoint_coverage(config: PretrainedConfig) -> Coverage | None:
    """Returns where in the denoising process a checkpoint's calibration states lie; None if it does not say.

    Raises:
        ValueError: The quantization configuration is malformed.
    """
    quantization = quantization_of(config)
    return None if quantization is None else stored_coverage(quantization)


def stored_coverage(quantization: DLLMQuantConfig) -> Coverage | None:
    """Returns the coverage in a configuration; None if there is none."""
    if quantization.coverage is None:
        return None
    try:
        return Coverage.from_dict(quantization.coverage)
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization_config.coverage is malformed: {error}") from error


def bucket_texts(coverage: Coverage) -> list[str]:
    """Names of the mask-ratio buckets, for people."""
    return [_edges(bucket, coverage.buckets) for bucket in range(coverage.buckets)]


def segment_texts(coverage: Coverage) -> list[str]:
    """Names of the trajectory segments, for people: number and progress."""
    return [f"{segment + 1} ({_edges(segment, coverage.segments)})" for segment in range(coverage.segments)]


def cell_text(coverage: Coverage, segment: int, bucket: int) -> str:
    """The states of a cell, and how many they were selected from if any were recorded, for people."""
    recorded = 0 if coverage.recorded is None else coverage.recorded[segment][bucket]
    return f"{coverage.states[segment][bucket]}" + (f"/{recorded}" if recorded else "")


def _edges(part: int, parts: int) -> str:
    return "-".join(f"{100 * edge / parts:.3g}" for edge in (part, part + 1)) + "%"


def coverage_table(coverage: Coverage, recipe: Recipe) -> str:
    """A row for every segment of the trajectory, a column for every mask-ratio bucket, and what to note."""
    diagonal, empty = set(coverage.diagonal), set(coverage.empty)

    def cell(segment: int, bucket: int) -> str:
        text = cell_text(coverage, segment, bucket)
        if (segment, bucket) in empty:
            return "." if text == "0" and (segment, bucket) not in diagonal else text
        return f"{text} ({coverage.masked_tokens[segment][bucket]}+{coverage.unmasked_tokens[segment][bucket]})"

    header = ["segment", *(f"{text} masked" for text in bucket_texts(coverage))]
    rows = [
        [text, *(cell(segment, bucket) for bucket in range(coverage.buckets))]
        for segment, text in enumerate(segment_texts(coverage))
    ]
    counted = "states" if coverage.recorded is None else "selected/recorded states"
    return "\n".join(
        [
            f"calibration states: {coverage.summary()}",
            aligned(header, rows),
            f"cells: {counted} (masked+other tokens); 0: an even schedule passes through, but no state is there",
            *(f"note: {note}" for note in _coverage_notes(coverage, recipe)),
        ]
    )


def _coverage_notes(coverage: Coverage, recipe: Recipe) -> tuple[str, ...]:
    """What quantizing said: states without masks leave the denoising process out on purpose."""
    if recipe.calibration is None or recipe.calibration.states == "clean":
        return ()
    selected = recipe.calibration.states in ("trajectory", "closed_loop")
    return coverage.notes(recipe.calibration.quotas if selected else None)
