"""Checkpoint directories that are written whole or not at all. Imports nothing but the standard library."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_STAGING = ".dllmquant-partial-"


def write_atomically(directory: Path, write: Callable[[Path], object]) -> None:
    """Writes a checkpoint so that an interrupted write is never mistaken for one.

    Everything is written into a hidden directory inside the target, which is on the target's file system even where
    that is a mount point. The target's old configuration and weight files, and what has the name of a new file, are
    then moved aside; the new files move in, and `config.json`, without which nothing loads, moves last. If that fails,
    the old files move back. Old files are deleted when all new ones are in place, and so is what writes that were
    killed have left behind.

    Args:
        directory: Target; made if it does not exist. Other files in it are kept.
        write: Writes the whole checkpoint into the directory it is given.

    Raises:
        OSError: The target is a file or cannot be written. If the files are complete but cannot move in, the message
            says where they are.
    """
    if directory.is_file():
        raise FileExistsError(f"{directory} is a file; a checkpoint needs a directory")
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
    new, old = staging / "new", staging / "old"
    try:
        new.mkdir()
        old.mkdir()
        write(new)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _exchange(directory, new, old)
    for leftover in directory.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _exchange(directory: Path, new: Path, old: Path) -> None:
    """Moves what the new files replace from the target to `old`, and the new files in; all of it or nothing."""
    incoming = sorted((path.name for path in new.iterdir()), key=lambda name: name == "config.json")
    stale = [directory / "config.json", *directory.glob("model*.safetensors"), *directory.glob("model*.index.json")]
    replaced = dict.fromkeys((*(path.name for path in stale), *incoming))
    moves = [(directory / name, old / name) for name in replaced if os.path.lexists(directory / name)]
    moves += [(new / name, directory / name) for name in incoming]
    try:
        for source, target in moves:
            source.replace(target)
    except BaseException as error:
        try:
            for source, target in reversed(moves):  # the old config.json comes last
                if os.path.lexists(target) and not os.path.lexists(source):
                    target.replace(source)
        except OSError as failure:
            raise OSError(
                f"{directory}: neither could the new files move in ({error}) nor the old ones back ({failure}); "
                f"those that are not there are in {new.parent}"
            ) from error
        if not isinstance(error, OSError):
            shutil.rmtree(new.parent, ignore_errors=True)
            raise
        raise OSError(f"{directory}: its old files stay, the new ones, complete, are in {new}: {error}") from error
