"""Checks of what commands write to, and the wording of errors."""

import os
from pathlib import Path


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; for failed file operations the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def check_writable(directory: Path, field: str) -> None:
    """Checks that a directory can be made or written to, without making it.

    Args:
        directory: The directory, which need not exist.
        field: What an error calls it.

    Raises:
        ValueError: It is no directory, or not writable.
    """
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{field}: {existing} is a file; give a directory")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{field}: {existing} is not writable")


def check_file(path: Path, field: str) -> None:
    """Checks that a file can be written.

    Args:
        path: The file, which need not exist, nor its directory.
        field: What an error calls it.

    Raises:
        ValueError: It is a directory, or its directory cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{field}: {path} is a directory; give a file")
    check_writable(path.parent, field)


def check_output(output: Path, overwrite: bool) -> None:
    """Checks that a checkpoint can be written to a directory.

    Args:
        output: The directory, which need not exist.
        overwrite: Whether it may hold files already.

    Raises:
        ValueError: It is no directory, not writable, or not empty.
    """
    check_writable(output, "output")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"output: {output} is not empty; give a new directory, or --overwrite")
