"""What all native families share as transformers models: weights that fit exactly, and checkpoints written whole."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dllmquant.atomic import write_atomically


class NativeModel(PreTrainedModel):
    """A transformers model that loads nothing but its own weights. Abstract: families derive from it."""

    @property
    def base_model(self) -> nn.Module:
        """The model itself: transformers looks here for what its own models have, and the body is a plain module."""
        return self

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint whose weights are exactly the model's; takes what `PreTrainedModel.from_pretrained` takes.

        Args:
            pretrained_model_name_or_path: Directory or hub id of the checkpoint.
            *args: As for `PreTrainedModel.from_pretrained`.
            **kwargs: As for `PreTrainedModel.from_pretrained`. With `ignore_mismatched_sizes=True`, weights of a wrong
                shape are initialised freshly instead of being an error.

        Returns:
            The model, or with `output_loading_info=True` the model and transformers' loading information.

        Raises:
            ValueError: Weights are missing from the checkpoint, have another shape, or do not belong to the model;
                the message names them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        ignores_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        mismatched = () if ignores_sizes else info["mismatched_keys"]
        problems = [
            f"{problem}: {', '.join(sorted(names))}"
            for problem, names in (
                ("missing", info["missing_keys"]),
                ("unexpected", info["unexpected_keys"]),
                ("of another shape", [f"{name} {tuple(got)} (valid: {tuple(own)})" for name, got, own in mismatched]),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"checkpoint {pretrained_model_name_or_path}: its weights do not fit {cls.__name__} "
                f"as its config describes it; {'; '.join(problems)}"
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes a checkpoint as `PreTrainedModel.save_pretrained` does, but an interrupted write is never read.

        A published configuration names the files of the original code in its `auto_map`. They are not written beside
        our weights, so it is left out, unless the model itself is remote code.

        Args:
            save_directory: Target directory; weights of an earlier checkpoint in it are replaced.
            *args: As for `PreTrainedModel.save_pretrained`.
            **kwargs: As for `PreTrainedModel.save_pretrained`. With `is_main_process=False` nothing is written.
        """
        options = save_options(self, save_directory, *args, **kwargs)
        if not options.get("is_main_process", True):
            return  # the main process writes the directory whole
        target, save = Path(save_directory), super().save_pretrained
        if options.get("push_to_hub"):
            options.setdefault("repo_id", target.name)
        with nullcontext() if self.is_remote_code() else _without_auto_map(self.config):
            write_atomically(target, lambda staging: save(staging, **options))


def save_options(
    model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Returns the arguments of a call of `PreTrainedModel.save_pretrained` by name, all but the directory.

    Raises:
        TypeError: It does not take them.
    """
    bound = inspect.signature(PreTrainedModel.save_pretrained).bind(model, save_directory, *args, **kwargs).arguments
    named: dict[str, Any] = bound.pop("kwargs", {})
    return {name: value for name, value in bound.items() if name not in ("self", "save_directory")} | named


@contextmanager
def _without_auto_map(config: PretrainedConfig) -> Iterator[None]:
    auto_map = config.__dict__.pop("auto_map", None)
    try:
        yield
    finally:
        if auto_map is not None:
            config.auto_map = auto_map
