"""Models, tokenizers and devices by the names a user gives, and the progress bars of loading them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllmquant.cli.checks import one_line
from dllmquant.cli.options import Dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Loading less than this is over before a progress bar can be read.
_QUICK_BYTES = 2**30


def usable_device(name: str) -> str:
    """Resolves the name of a device.

    Args:
        name: What torch calls it, or `auto` for a GPU if there is one, else the CPU.

    Returns:
        The name for torch.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device: {name!r} cannot be used ({one_line(error).split('. ')[0]}); valid: cpu, or a GPU"
        ) from None
    return name


def find_model(name: str, sampler: dict[str, Any] | None = None) -> "tuple[str, PretrainedConfig]":
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
        raise ValueError(f"model: {name} cannot be read: {one_line(error)}") from error
    adapters = registered_adapters()
    if config.model_type not in adapters:
        raise ValueError(
            f"model: {name} is a {config.model_type!r}; valid diffusion LLMs: {', '.join(sorted(adapters))}"
        )
    adapters[config.model_type].sampler_config(config, **(sampler or {}))
    return source, config


def load_tokenizer(source: str) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a model.

    Args:
        source: What `find_model` returned.

    Returns:
        The tokenizer.

    Raises:
        ValueError: The model has none that can be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {source} has no tokenizer that can be read: {one_line(error)}") from error
    return tokenizer


def load_model(source: str, dtype: Dtype, device: str) -> "PreTrainedModel":
    """Loads a model for evaluation.

    Args:
        source: What `find_model` returned.
        dtype: Type of its weights.
        device: Where it goes.

    Returns:
        The model.
    """
    from transformers import AutoModel

    model: PreTrainedModel = AutoModel.from_pretrained(source, dtype=dtype.value, device_map=device)
    model.eval()
    return model


def is_quick(source: str) -> bool:
    """Whether a model's weights are on this disk and small."""
    directory = Path(source)
    return directory.is_dir() and sum(path.stat().st_size for path in directory.glob("*.safetensors")) < _QUICK_BYTES


def interactive() -> bool:
    """Whether someone watches standard error, so that a progress bar makes sense."""
    return sys.stderr.isatty()


@contextmanager
def tamed_transformers(*, bars: bool) -> Iterator[None]:
    """While the context lasts, transformers says what is wrong and nothing else, with progress bars if asked for."""
    from transformers.utils import logging as noise

    level, had_bars = noise.get_verbosity(), noise.is_progress_bar_enabled()
    noise.set_verbosity_error()
    if not (bars and interactive()):
        noise.disable_progress_bar()
    try:
        yield
    finally:
        noise.set_verbosity(level)
        if had_bars:
            noise.enable_progress_bar()
