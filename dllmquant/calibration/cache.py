"""Recorded trajectories on disk, under a key of everything that decides what is recorded.

A file is `<key>.safetensors`: the tensors of a `Trajectory`, and as metadata the layout's version, the key, the two
numbers of a `Trajectory`, the forward passes it took and a SHA-256 of the tensors. A file that does not hold what it
says is recorded anew.
"""

import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dllmquant._version import __version__
from dllmquant.decoding import AnySamplerConfig, Trajectory

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_TENSORS = ("ids", "mask", "confidence", "committed", "block", "valid", "prompt_lengths")
_CHUNK = 1 << 26  # bytes hashed at a time: a large weight is not copied to the CPU as a whole


@dataclass(frozen=True, eq=False)
class Recording:
    """A trajectory and what it took.

    Attributes:
        trajectory: The recorded runs.
        forward_passes: Calls of the model that recorded them, each on a batch.
    """

    trajectory: Trajectory
    forward_passes: int


def cache_directory(cache: str | Path) -> Path:
    """Returns the directory a recipe's `calibration.cache` means; "default" lies in the Hugging Face cache home."""
    return Path(HF_HOME) / "dllmquant" / "trajectories" if cache == "default" else Path(cache).expanduser()


def trajectory_key(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: AnySamplerConfig,
    *,
    seed: int,
    batch_size: int,
    special_ids: Mapping[str, int | None],
) -> str:
    """Returns the key of a recording: equal keys record equal trajectories, to the rounding of the arithmetic.

    It covers the weights and buffers bit by bit; the structure of the model with the settings its modules print or hold
    as dataclasses (the bits of quantized activations are no buffers); its configuration but for where it was loaded
    from; the prompts' token ids; the sampler's settings; the seed; the batch size, which changes rounding and how many
    forward passes it takes; and the versions of this library and layout. It does not cover the device, which changes
    rounding only.

    Args:
        model: The model that is recorded.
        prompts: Token ids of every prompt.
        config: How it decodes.
        seed: Seed of the sampler.
        batch_size: Prompts decoded together.
        special_ids: Tokens the sampler treats specially, by name.

    Returns:
        64 hexadecimal digits.
    """
    settings = {
        "library": __version__,
        "format": FORMAT_VERSION,
        "config": {
            k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")
        },
        "structure": str(model),
        "schemes": [
            (name, attribute, repr(value))
            for name, module in model.named_modules()
            for attribute, value in sorted(vars(module).items())
            if _is_scheme(value)
        ],
        "prompts": [[int(token) for token in row] for row in prompts],
        "sampler": dataclasses.asdict(config),
        "seed": seed,
        "batch_size": batch_size,
        "special_ids": dict(special_ids),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _hash_tensor(digest, name, tensor)
    return digest.hexdigest()


def cached_trajectory(directory: Path, key: str, record: Callable[[], Recording]) -> Recording:
    """Returns the recording stored under a key, or records and stores it.

    A damaged file is recorded anew and replaced, with a warning. Files move into place whole, so an interrupted or
    concurrent run leaves none that is half written.

    Args:
        directory: Where files lie; made if it does not exist, before anything is recorded.
        key: From `trajectory_key`.
        record: Makes the recording; not called when it is stored.

    Raises:
        OSError: The directory cannot be made.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{key}.safetensors"
    if path.is_file():
        try:
            recording = _read(path, key)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            logger.warning("cache: %s is damaged (%s); recording anew", path, error)
        else:
            logger.info("cache: trajectories of %d prompts from %s", recording.trajectory.num_prompts, path)
            return recording
    recording = record()
    try:
        _write(path, key, recording)
    except (OSError, SafetensorError) as error:  # what was recorded is not lost for a full disk
        logger.warning("cache: %s cannot be written (%s); going on without", path, error)
    return recording


def _is_scheme(value: object) -> bool:
    """Whether an attribute is a setting that no buffer holds: a dataclass, or several."""
    if isinstance(value, tuple | list):
        return any(map(_is_scheme, value))
    return dataclasses.is_dataclass(value)


def _write(path: Path, key: str, recording: Recording) -> None:
    trajectory = recording.trajectory
    tensors = {name: getattr(trajectory, name).contiguous() for name in _TENSORS}
    metadata = {
        "format": str(FORMAT_VERSION),
        "key": key,
        "gen_length": str(trajectory.gen_length),
        "pad_token_id": str(trajectory.pad_token_id),
        "forward_passes": str(recording.forward_passes),
        "sha256": _hash_tensors(tensors),
    }
    handle, name = tempfile.mkstemp(prefix=f".{key}.partial-", dir=path.parent)
    os.close(handle)
    staging = Path(name)
    try:
        save_file(tensors, staging, metadata=metadata)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _read(path: Path, key: str) -> Recording:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    for name, expected in (("format", str(FORMAT_VERSION)), ("key", key), ("sha256", _hash_tensors(tensors))):
        if metadata.get(name) != expected:
            raise ValueError(f"{name} is {metadata.get(name)!r}, expected {expected!r}")
    gen_length, pad_token_id, passes = (int(metadata[n]) for n in ("gen_length", "pad_token_id", "forward_passes"))
    return Recording(Trajectory(**tensors, gen_length=gen_length, pad_token_id=pad_token_id), passes)


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        _hash_tensor(digest, name, tensor)
    return digest.hexdigest()


def _hash_tensor(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    flat = tensor.detach().reshape(-1)
    step = max(1, _CHUNK // tensor.element_size())
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
