"""What a hub may hold: repositories with revisions, and tokenizers with code of their own."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils
from transformers import AutoTokenizer

from tests.tiny import save_tiny


def cached_hub(directory: Path, repository: str, revisions: Mapping[str, Path]) -> Path:
    """Writes a cache that holds a repository, as if downloaded; its revisions have the files of directories."""
    place = directory / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    for revision, files in revisions.items():
        commit = hashlib.sha1(revision.encode()).hexdigest()
        (place / "refs" / revision).write_text(commit, encoding="utf-8")
        shutil.copytree(files, place / "snapshots" / commit)
    return directory


def save_with_length(directory: Path, length: int, **model: Any) -> Path:
    """Saves a tiny model whose tokenizer can be told from others by its `model_max_length`."""
    save_tiny(directory, **model)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(directory)
    return directory


def give_remote_code(source: Path, modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a checkpoint a tokenizer of its own code, which leaves a file `ran` in the directory when it is run.

    Args:
        source: The checkpoint.
        modules: Where transformers puts the code before it runs it.
        monkeypatch: The test's.
    """
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    path = source / "tokenizer_config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": [None, "tokenization_custom.Custom"]}}
    path.write_text(json.dumps(document), encoding="utf-8")
    (source / "tokenization_custom.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(source)!r}, 'ran').touch()\n"
        "class Custom(PreTrainedTokenizerFast):\n    pass\n",
        encoding="utf-8",
    )
