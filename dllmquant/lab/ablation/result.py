"""The result of one run, and its file."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllmquant.lab.ablation.document import FORMAT_VERSION
from dllmquant.lab.ablation.plan import PlannedRun
from dllmquant.lab.agreement import (
    Agreement,
    FrontierFlips,
    KLBucket,
)
from dllmquant.lab.evaluate import ItemResult, TaskScore


@dataclass(frozen=True)
class RunResult:
    """What one run measured, or how it failed.

    Attributes:
        model: Name of the model.
        cell: Name of the cell.
        seed: Calibration seed.
        key: Hash of everything the result depends on.
        recipe: The resolved recipe; None for the model itself.
        items: Results of every problem.
        scores: By task.
        agreement: With the original; None if the run failed.
        bytes_per_weight: Bytes per weight of the layers recipes quantize.
        total_bytes: Bytes of all weights.
        seconds: Wall time of "quantization", "evaluation" and "agreement".
        metadata: Versions, git sha, model digest, device, sampler, peak memory in bytes.
        error: None, or the traceback of what went wrong.
    """

    model: str
    cell: str
    seed: int
    key: str
    recipe: dict[str, Any] | None
    items: tuple[ItemResult, ...] = ()
    scores: dict[str, TaskScore] = dataclasses.field(default_factory=dict)
    agreement: Agreement | None = None
    bytes_per_weight: float = 0.0
    total_bytes: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None

    def save(self, path: Path) -> None:
        """Writes the result as JSON; an interrupted write leaves no file, or the old one."""
        write_text(path, to_json({"format_version": FORMAT_VERSION, **asdict(self)}))

    @classmethod
    def load(cls, path: Path) -> "RunResult":
        """Reads a file that `save` wrote.

        Raises:
            ValueError: The file holds something else, or another version of the format.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("format_version") != FORMAT_VERSION:
                raise ValueError("another format version")
            agreement = document.pop("agreement")
            return cls(
                **document
                | {
                    "items": tuple(ItemResult(**item) for item in document["items"]),
                    "scores": {task: TaskScore(**score) for task, score in document["scores"].items()},
                },
                agreement=None
                if agreement is None
                else Agreement(
                    tuple(agreement["first_divergence"]),
                    FrontierFlips(**agreement["frontier"]),
                    tuple(KLBucket(**bucket) for bucket in agreement["kl"]),
                ),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the result of an ablation's run ({error}); delete it to run again") from None


def find_result(run: PlannedRun, output: Path) -> RunResult | None:
    """Returns the result of a run from an ablation's directory, under whatever name; None if there is none.

    Raises:
        ValueError: The file cannot be read.
    """
    for path in sorted((output / "cells").glob(f"*.{run.key[:16]}.json")):
        result = RunResult.load(path)
        if result.key == run.key:
            return dataclasses.replace(result, model=run.model, cell=run.cell)
    return None


def write_text(path: Path, text: str) -> None:
    """Writes a file so that an interrupted write is never mistaken for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as staging:
        partial = Path(staging) / path.name
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def to_json(content: Mapping[str, Any]) -> str:
    """Returns JSON as every file of an ablation has it."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def last_line(error: str) -> str:
    """Returns what a traceback ends with."""
    return error.strip().splitlines()[-1]
