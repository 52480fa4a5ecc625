"""Calibration prompts: built in, the user's own, or from files and data sets."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from dllmquant import tasks

if TYPE_CHECKING:
    import datasets

Prompt = str | tuple[str, str]
"""A prompt, or a prompt and its completion."""
GivenPrompts: TypeAlias = "Sequence[Prompt | Mapping[str, Any]] | datasets.Dataset"
"""Prompts as they are given in Python; see `check_prompts`."""

_VALID_ROW = "a string, (prompt, completion), or fields: 'prompt' and, if any, 'completion', or one field alone"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")


def builtin_prompts(count: int, seed: int) -> list[Prompt]:
    """Returns prompts with completions from the training split of the built-in tasks, the tasks taking turns."""
    streams = [tasks.iterate(task, "train", seed) for task in tasks.TASKS]
    items = (next(streams[index % len(streams)]) for index in range(count))
    return [(item.prompt, item.answer) for item in items]


def check_prompts(prompts: GivenPrompts, needed: int) -> list[Prompt]:
    """Reads prompts given in Python, before any work is done, as `load_prompts` reads the rows of a file.

    Args:
        prompts: A list or a `datasets.Dataset`. An item is a text, a pair of prompt and completion, or a mapping: its
            field "prompt" (and "completion", where there is one), or the only field there is.
        needed: How many the recipe asks for.

    Returns:
        All of them, in their order.

    Raises:
        ValueError: `prompts` is something else, an item is none of these or holds no text, or there are too few.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: a single string; valid: a list of prompts, such as load_prompts draws from a file")
    if not _is_list(prompts):
        raise ValueError(
            f"prompts: {type(prompts).__name__}; valid: a list of strings, (prompt, completion) pairs or mappings with "
            "a field 'prompt', or a datasets.Dataset of such rows"
        )
    found = []
    for index, item in enumerate(prompts):
        prompt = _prompt(item, f"prompts[{index}]", None, None)
        if prompt is None:
            raise ValueError(f"prompts[{index}]: {item!r} holds no text; valid: {_VALID_ROW}")
        found.append(prompt)
    if len(found) < needed:
        raise ValueError(f"prompts: {len(found)} given, the recipe needs {needed}; give more or lower its count")
    return found


def load_prompts(
    source: Any,
    *,
    count: int,
    seed: int,
    field: str | None = None,
    completion_field: str | None = None,
    split: str = "train",
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template: bool = False,
) -> list[Prompt]:
    """Draws calibration prompts from a file or a data set, in an order that depends on the seed alone.

    Args:
        source: A file: `.txt` (a prompt per line), `.jsonl` (a row per line), `.json` (a list of rows) or `.parquet`; a
            data set on the Hugging Face hub, as "owner/name" or "owner/name:config", or a directory of its files, read
            by `datasets.load_dataset`, which downloads the whole split and runs no code of the data set; a
            `datasets.Dataset`; an `IterableDataset`, of which a shuffled buffer is read; or a list of rows. A row is a
            text, a pair of prompt and completion, or a mapping of fields. Files are UTF-8; lines end with a line feed,
            or a carriage return before it.
        count: How many prompts.
        seed: Seed of their order.
        field: The field that holds the prompt. None takes "prompt" (and "completion", where a row has one), or the only
            field there is.
        completion_field: The field that holds the completion; None draws prompts alone.
        split: Split of a data set that is loaded by name; slices such as "train[:10%]" work.
        tokenizer: The model's tokenizer; needed by `chat_template` only.
        chat_template: Whether each prompt becomes a user's turn in the tokenizer's chat template, up to where the
            assistant begins. A BOS token that the template writes and tokenizing would add again is left out.

    Returns:
        `count` prompts, or pairs of prompt and completion. Rows without text in a named field are passed over.

    Raises:
        ValueError: There is no such source, field or chat template; a row or a field is of another type; or fewer rows
            hold text than asked for.
    """
    if count < 1:
        raise ValueError(f"count: {count}; valid: at least 1")
    template = _templater(tokenizer) if chat_template else str
    rows = _Rows.open(source, split, seed, count)
    found: list[Prompt] = []
    seen = 0
    for where, row in rows:
        seen += 1
        prompt = _prompt(row, f"prompts: {where}", field, completion_field)
        if isinstance(prompt, str):
            found.append(template(prompt))
        elif prompt is not None and prompt[1].strip():
            found.append((template(prompt[0]), prompt[1]))
        if len(found) == count:
            return found
    raise ValueError(
        f"prompts: {rows.name} holds {len(found)} prompts ({seen} rows); valid: at least {count}, the count"
    )


class _Rows:
    """Rows of a source in random order, each with its place for messages."""

    def __init__(self, name: str, rows: Iterator[tuple[str, Any]]) -> None:
        self.name = name
        self._rows = rows

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return self._rows

    @classmethod
    def open(cls, source: Any, split: str, seed: int, count: int) -> "_Rows":
        import datasets

        name = f"the given {type(source).__name__}"
        unit = "row"
        if isinstance(source, str | Path):
            path = Path(source).expanduser()
            if path.suffix.lower() in _READERS:
                name, unit = str(path), "line" if path.suffix.lower() in (".txt", ".jsonl") else "row"
                source = _read_file(path)
            else:
                name = f"data set {source!s} ({split})"
                source = _load_dataset(str(source), split)
        if isinstance(source, datasets.IterableDataset):
            stream = source.shuffle(seed=seed, buffer_size=max(1000, 16 * count))
            return cls(name, ((f"{name}, shuffled row {i}", row) for i, row in enumerate(stream)))
        if not _is_list(source):
            raise ValueError(f"prompts: {name}; valid: a file, a data set or its name, or a list of rows")
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).tolist()
        first = 1 if unit == "line" else 0
        return cls(name, ((f"{name}, {unit} {i + first}", source[i]) for i in order))


def _is_list(source: Any) -> bool:
    """Whether something has rows that can be counted and told apart."""
    if isinstance(source, Sequence):
        return not isinstance(source, str)
    import datasets

    return isinstance(source, datasets.Dataset)


def _prompt(row: Any, where: str, field: str | None, completion_field: str | None) -> Prompt | None:
    """The prompt of a row; None where a field it needs, or the prompt, holds no text."""
    if not isinstance(row, Mapping):
        if field is not None or completion_field is not None:
            raise ValueError(f"{where}: a text without fields; valid: no field and no completion_field")
        parts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, list | tuple) else ()
        if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{where}: {row!r}; valid: {_VALID_ROW}")
        if not parts[0].strip():
            return None
        return parts[0] if len(parts) == 1 else (parts[0], parts[1])
    known = ", ".join(map(str, row))
    guessed = field is None
    if field is None:
        if "prompt" not in row and len(row) != 1:
            raise ValueError(
                f"{where}: no field 'prompt'; set field to one of its fields: {known} "
                "(in load_prompts, or by --prompt-field)"
            )
        field = "prompt" if "prompt" in row else next(iter(row))
    prompt = _text(row, field, where, known)
    if completion_field is not None:
        completion = _text(row, completion_field, where, known)
        return (prompt, completion) if prompt and completion else None
    if guessed and prompt and "completion" in row:
        completion = _text(row, "completion", where, known)
        return (prompt, completion) if completion else prompt
    return prompt


def _text(row: Mapping[str, Any], field: str, where: str, known: str) -> str | None:
    """The text of a field; None where there is nothing or blanks only."""
    if field not in row:
        raise ValueError(f"{where}: no field {field!r}; its fields: {known}")
    value = row[field]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} holds {type(value).__name__}; valid: text")
    return value if value and value.strip() else None


def _templater(tokenizer: PreTrainedTokenizerBase | None) -> Callable[[str], str]:
    if tokenizer is None:
        raise ValueError("tokenizer: none given; chat_template=True needs the model's")
    if not tokenizer.chat_template:
        raise ValueError("chat_template: the tokenizer has none; set tokenizer.chat_template, or pass False")
    bos = tokenizer.bos_token
    added_anyway = bos is not None and list(tokenizer("a").input_ids[:1]) == [tokenizer.bos_token_id]

    def template(prompt: str) -> str:
        turn = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
        return text.removeprefix(str(bos)) if added_anyway else text

    return template


def _read_file(path: Path) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"prompts: no file {path}")
    try:
        return _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text ({error})") from None


def _read_text(path: Path) -> str:
    """The text of a file, line ends as they are, without a byte order mark."""
    return path.read_bytes().decode("utf-8-sig")


def _read_lines(path: Path) -> list[Any]:
    # Not splitlines(): it also splits at characters that a JSON string or a prompt may hold, such as U+2028.
    lines = [line.removesuffix("\r") for line in _read_text(path).split("\n")]
    return lines if lines[-1] else lines[:-1]


def _read_json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(_read_lines(path), 1):
        try:
            rows.append(json.loads(line) if line.strip() else "")
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {path}, line {number}: not JSON ({error})") from None
    return rows


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: {path}: not JSON ({error}); a row per line is called .jsonl") from None
    if not isinstance(rows, list):
        raise ValueError(f"prompts: {path}: holds {type(rows).__name__}; valid: a list of rows")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]
    from pyarrow import ArrowInvalid

    try:
        return list(pyarrow.parquet.read_table(path).to_pylist())
    except ArrowInvalid as error:
        raise ValueError(f"prompts: {path}: not a parquet file ({error})") from None


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _read_lines,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _load_dataset(name: str, split: str) -> Any:
    """Loads a split of a data set on the hub or of a local directory."""
    import datasets

    directory = Path(name).expanduser().is_dir()
    match = _HUB_ID.fullmatch(name)
    if (not directory and match is None) or Path(name).expanduser().is_file():
        raise ValueError(
            f"prompts: {name!r} is neither a file ending in {', '.join(_READERS)}, nor a directory, nor the name of a "
            "data set (owner/name or owner/name:config)"
        )
    path, config = (str(Path(name).expanduser()), None) if match is None or directory else match.group("name", "config")
    try:
        return datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, split, configuration, scripts
        reason = " ".join(str(error).split())
        raise ValueError(f"prompts: data set {name!r}, split {split!r}, cannot be loaded: {reason}") from error
