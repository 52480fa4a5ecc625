"""Checkpoint directories that are written whole or not at all. Imports nothing but the standard library."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(directory: Path, write: Callable[[Path], object]) -> None:
    """Writes a checkpoint so that an interrupted write is never mistaken for one.

    Everything is written into a temporary directory beside the target first. The target's old configuration and
    weight files then go, the new files move in, and `config.json`, without which nothing loads, moves last.

    Args:
        directory: Target; made if it does not exist. Other files in it are kept.
        write: Writes the whole checkpoint into the directory it is given.

    Raises:
        OSError: The target is a file or cannot be written.
    """
    if directory.is_file():
        raise FileExistsError(f"{directory} is a file; a checkpoint needs a directory")
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.resolve().parent))
    try:
        write(staging)
        stale = [directory / "config.json", *directory.glob("model*.safetensors"), *directory.glob("model*.index.json")]
        for path in stale:
            path.unlink(missing_ok=True)
        for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(directory / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
