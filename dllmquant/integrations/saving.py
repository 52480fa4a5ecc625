"""How a quantized model is saved: atomically, with a model card, and with remote code that imports the plug-in.

transformers has no hook that tells a quantizer where a model is saved. A quantized model therefore is an instance of a
subclass of its class, of the same name, which differs in `save_pretrained` and `push_to_hub` alone.
"""

import ast
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel

from dllmquant._version import __version__
from dllmquant.atomic import write_atomically
from dllmquant.integrations.model_card import is_generated, model_card
from dllmquant.models.base import save_options

logger = logging.getLogger(__name__)

CARD = "README.md"
_IMPORT = "import dllmquant  # noqa: F401 - makes transformers read the packed weights\n"
_HUB_OPTIONS = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")

Evaluation = Mapping[str, Mapping[str, float]]


class QuantizedSaving:
    """What the class of a quantized model gets in front of its own methods."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        evaluation: Evaluation | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes a checkpoint with its model card; an interrupted write is never read.

        A README.md in the directory is replaced if dllmquant wrote it and nobody edited it; any other is kept.

        Args:
            save_directory: Target directory; weights of an earlier checkpoint in it are replaced.
            *args: As for `PreTrainedModel.save_pretrained`.
            evaluation: Results for the model card: task -> metric -> number.
            **kwargs: As for the `save_pretrained` of the model's own class. With `push_to_hub=True` the checkpoint is
                uploaded as well, with the options of `push_to_hub`.

        Raises:
            ValueError: A result is not a number.
            OSError: The target is a file or cannot be written.
        """
        model, target = cast("PreTrainedModel", self), Path(save_directory)
        options = save_options(model, save_directory, *args, **kwargs)
        push_to_hub = options.pop("push_to_hub", False)
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options} if push_to_hub else {}
        save = super().save_pretrained  # type: ignore[misc] # of the model's own class
        if options.get("is_main_process", True):
            _write(target, lambda staging: save(staging, **options), model, model_card(model, evaluation=evaluation))
        else:
            save(target, **options)
        if push_to_hub:
            shards = {name: options[name] for name in ("max_shard_size",) if name in options}
            self.push_to_hub(hub.pop("repo_id", target.name), evaluation=evaluation, **hub, **shards)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluation: Evaluation | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Iterable[str] = (),
    ) -> CommitInfo:
        """Uploads a checkpoint with its model card to the Hub.

        A README.md that is in the repository already is replaced if dllmquant wrote it and nobody edited it; any other
        keeps its text and gets the tags.

        Args:
            repo_id: The repository, owner/name; made if there is none.
            evaluation: Results for the model card: task -> metric -> number.
            commit_message: Of the commit that is made.
            commit_description: Of the commit that is made.
            private: Whether a repository that is made is private; None leaves it to the owner's settings.
            token: Of a Hub account; None takes the one of the login.
            revision: Branch to commit to; made if there is none.
            create_pr: Whether to open a pull request instead of committing.
            max_shard_size: Largest size of a weight file.
            tags: Added to the card's.

        Returns:
            The commit.

        Raises:
            ValueError: A result is not a number.
        """
        model, api = cast("PreTrainedModel", self), HfApi(token=token, library_name="dllmquant")
        tags = [*(model.model_tags or ()), *([tags] if isinstance(tags, str) else tags)]
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        text = model_card(model, evaluation=evaluation, tags=tags, name=repo_id)
        save = super().save_pretrained  # type: ignore[misc] # of the model's own class
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "checkpoint"
            _write(target, lambda staging: save(staging, max_shard_size=max_shard_size), model, text)
            kept = _published_card(api, repo_id, revision, text)
            if kept is not None:
                (target / CARD).write_text(kept, encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=target,
                commit_message=commit_message or f"Upload model quantized by dllmquant {__version__}",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The subclass cannot be found by its name; the class it extends can.
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return (_empty, (type(self).__bases__[1],), *state)


def extend_saving(model: PreTrainedModel) -> None:
    """Makes a quantized model save itself as `QuantizedSaving` says."""
    if not isinstance(model, QuantizedSaving):
        model.__class__ = _extended(cast("type", type(model)))


@cache
def _extended(cls: type) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (QuantizedSaving, cls), names)


def _empty(cls: type) -> Any:
    """Returns a model without attributes, for `pickle` and `copy` to fill."""
    extended = _extended(cls)
    return extended.__new__(extended)


def _write(target: Path, save: Callable[[Path], object], model: PreTrainedModel, text: str) -> None:
    """Writes a checkpoint and its card; a card that somebody else wrote stays."""

    def write(staging: Path) -> None:
        save(staging)
        _import_plugin_in(staging, model.config)
        if _is_replaceable(target / CARD):
            (staging / CARD).write_text(text, encoding="utf-8")
        else:
            logger.warning("%s: kept, because it was not written by dllmquant or was edited", target / CARD)

    write_atomically(target, write)


def _is_replaceable(card: Path) -> bool:
    return not card.exists() or is_generated(card.read_text(encoding="utf-8", errors="replace"))


def _published_card(api: HfApi, repo_id: str, revision: str | None, text: str) -> str | None:
    """Returns the card that is on the Hub with the tags of `text` added, if it is one to keep."""
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except EntryNotFoundError:
        return None
    if _is_replaceable(Path(path)):
        return None
    card = ModelCard.load(path)
    theirs, ours = (cast("ModelCardData", each.data) for each in (card, ModelCard(text)))
    theirs.tags = list(dict.fromkeys((*(theirs.tags or ()), *(ours.tags or ()))))
    return str(card)


# ---------------------------------------------------------------------------------------------------------------------
# Remote code


def _import_plugin_in(directory: Path, config: PretrainedConfig) -> None:
    """Makes the remote code in a checkpoint import dllmquant, so that who loads it need not."""
    for reference in (getattr(config, "auto_map", None) or {}).values():
        if isinstance(reference, str):
            file = directory / f"{reference.rpartition('--')[2].split('.')[0]}.py"
            if file.is_file():
                file.write_text(with_plugin_import(file.read_text(encoding="utf-8")), encoding="utf-8")


def with_plugin_import(source: str) -> str:
    """Returns a module's source with `import dllmquant` before its first statement.

    The docstring and imports from `__future__` stay in front. A module that imports it already is returned as it is.
    """
    body = ast.parse(source).body
    if any(isinstance(node, ast.Import) and any(alias.name == "dllmquant" for alias in node.names) for node in body):
        return source
    lines = source.splitlines(keepends=True)
    for index, node in enumerate(body):
        if not _stays_first(node, index):
            decorators = getattr(node, "decorator_list", [])
            lines.insert(min(part.lineno for part in (node, *decorators)) - 1, _IMPORT)
            return "".join(lines)
    return "".join(lines).rstrip("\n") + "\n" + _IMPORT


def _stays_first(node: ast.stmt, index: int) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__"
    return index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
