"""Prompts from files, data sets and lists: which rows, which fields, the chat template, and clear errors."""

import json
from collections import Counter

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dllmquant import tasks
from dllmquant.calibration import builtin_prompts, check_prompts, load_prompts
from tests.tiny import tiny_tokenizer

ROWS = [{"question": f"what is {n} + 1?", "answer": f"{n + 1}", "id": n} for n in range(20)]
PAIRS = [(row["question"], row["answer"]) for row in ROWS]


def write(path, rows=ROWS):
    if path.suffix == ".txt":
        path.write_text("".join(f"{row['question']}\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def load(source, count=20, seed=0, **options):
    return load_prompts(source, count=count, seed=seed, **options)


# sources


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "PARQUET"])
@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_files_with_fields(suffix, kind, tmp_path):
    source = kind(write(tmp_path / f"rows.{suffix.lower()}").rename(tmp_path / f"rows.{suffix}"))
    pairs = load(source, field="question", completion_field="answer")
    assert Counter(pairs) == Counter(PAIRS)
    assert Counter(load(source, field="answer")) == Counter(answer for _, answer in PAIRS)


def test_lines_of_a_text(tmp_path):
    path = write(tmp_path / "rows.txt")
    path.write_text("\n" + path.read_text(encoding="utf-8") + "  \n", encoding="utf-8")
    assert Counter(load(path)) == Counter(question for question, _ in PAIRS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_with_line_feeds_only(end, tmp_path):
    """Characters that Unicode calls line ends may occur in a prompt, and raw in a JSON string."""
    texts = ["a\u2028b", "c\u2029\u0085d", "e\x0cf", "g\x1ch\x0bi"]
    plain, rows = tmp_path / "rows.txt", tmp_path / "rows.jsonl"
    plain.write_bytes("".join(text + end for text in texts).encode())
    objects = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    rows.write_bytes(end.join([objects[0], "", *objects[1:]]).encode())
    assert sorted(load(plain, 4)) == sorted(load(rows, 4)) == sorted(texts)
    assert load(plain, 4) == load(texts, 4)  # the end of the last line begins no other: the order is that of the list
    with pytest.raises(ValueError, match=r"holds 4 prompts \(5 rows\)"):
        load(rows, 5)
    rows.write_bytes(rows.read_bytes() + f"{end}{{".encode())
    with pytest.raises(ValueError, match="line 6: not JSON"):
        load(rows, 4)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_a_byte_order_mark_is_no_text(suffix, tmp_path):
    path = write(tmp_path / f"rows.{suffix}")
    expected = load(path, **({} if suffix == "txt" else {"field": "question"}))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path, **({} if suffix == "txt" else {"field": "question"})) == expected
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows\.\w+ holds 0 prompts \(0 rows\)|rows.json: not JSON"):
        load(path, 1)


def test_lists_and_data_sets():
    pairs = load(ROWS, field="question", completion_field="answer")
    assert Counter(pairs) == Counter(PAIRS)
    assert load(datasets.Dataset.from_list(ROWS), field="question", completion_field="answer") == pairs
    assert Counter(load(PAIRS)) == Counter(PAIRS)
    assert Counter(load([list(pair) for pair in PAIRS])) == Counter(PAIRS)
    assert Counter(load([question for question, _ in PAIRS])) == Counter(question for question, _ in PAIRS)
    column = datasets.Dataset.from_list(ROWS)["question"]
    assert load(column) == load([question for question, _ in PAIRS])


def test_streams_are_shuffled():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    first, again, other = (load(stream, 12, seed, field="question") for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 12
    assert load(tasks.load("math", "train", 30, 0), 5, field="prompt", completion_field="answer")[0][1]


def test_a_directory_of_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl")
    assert Counter(load(tmp_path / "data", field="question")) == Counter(question for question, _ in PAIRS)
    assert len(load(tmp_path / "data", 2, field="question", split="train[:10%]")) == 2


@pytest.mark.parametrize(
    ("source", "expected"),
    [("owner/name", ("owner/name", None)), ("owner/name:main", ("owner/name", "main")), ("name", ("name", None))],
)
def test_names_of_data_sets(source, expected, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load(source, field="question", split="test")) == 20
    assert calls == [(expected, {"split": "test"})]  # nothing is trusted to run code


@pytest.mark.parametrize("error", [ConnectionError, FileNotFoundError, ValueError, RuntimeError])
def test_data_sets_that_cannot_be_loaded(error, monkeypatch):
    def load_dataset(*args, **options):
        raise error("Couldn't reach it\n (offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"prompts: data set 'a/b:c', split 'dev', cannot be loaded: Couldn't reach it \(offline\)"
    with pytest.raises(ValueError, match=message):
        load("a/b:c", field="question", split="dev")


def test_offline_is_a_clear_error():
    with pytest.raises(
        ValueError, match=r"prompts: data set 'no/such-thing', split 'train', cannot be loaded: .*no/such"
    ):
        load("no/such-thing")


# rows


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    seven = load(path, 7, field="question")
    assert seven == load(path, 20, field="question")[:7] == load(ROWS, 7, field="question")
    assert seven != load(path, 7, 1, field="question")
    assert seven != [question for question, _ in PAIRS[:7]]
    # Every row may be first.
    assert len({load(ROWS, 1, seed, field="question")[0] for seed in range(80)}) > 15


def test_rows_without_text_are_passed_over():
    rows = [*ROWS, {"question": " ", "answer": "x"}, {"question": None, "answer": "x"}, {"question": "y", "answer": ""}]
    assert Counter(load(rows, field="question", completion_field="answer")) == Counter(PAIRS)
    assert Counter(load(rows, 21, field="question")) == Counter([*(q for q, _ in PAIRS), "y"])
    assert load(["", " ", "x", ("a", " ")], 1) == ["x"]


def test_fields_that_need_no_name():
    rows = [{"prompt": "a", "completion": "b", "more": 1}]
    assert load(rows, 1) == [("a", "b")]
    assert load(rows, 1, field="prompt") == ["a"]
    assert load(rows, 1, completion_field="completion") == [("a", "b")]
    assert load([{"prompt": "a", "completion": None}], 1) == ["a"]
    assert load([{"text": "a"}], 1) == ["a"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {}, "row .*: no field 'prompt'; set field to one of its fields: question, answer, id"),
        (ROWS, {"field": "quest"}, "no field 'quest'; its fields: question, answer, id"),
        (ROWS, {"field": "question", "completion_field": "solution"}, "no field 'solution'; its fields: question"),
        (ROWS, {"field": "id"}, "field 'id' holds int; valid: text"),
        (ROWS, {"field": "question", "count": 21}, r"holds 20 prompts \(20 rows\); valid: at least 21, the count"),
        ([*ROWS[:2], {"question": ""}], {"field": "question", "count": 3}, r"holds 2 prompts \(3 rows\)"),
        (["text"], {"field": "question", "count": 1}, "row 0: a text without fields"),
        (["text"], {"completion_field": "answer", "count": 1}, "row 0: a text without fields"),
        ([7], {"count": 1}, "row 0: 7; valid: a string"),
        ([("a", "b", "c")], {"count": 1}, "row 0: .*valid: a string"),
        ([], {"count": 1}, r"the given list holds 0 prompts \(0 rows\)"),
        (ROWS, {"count": 0}, "count: 0; valid: at least 1"),
        (7, {}, "the given int; valid: a file, a data set or its name, or a list of rows"),
        (
            "what is this?",
            {},
            "'what is this.' is neither a file ending in .txt, .jsonl, .json, .parquet, nor a direct",
        ),
    ],
)
def test_errors_name_row_and_field(rows, options, message):
    with pytest.raises(ValueError, match=message):
        load(rows, **options)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_errors_name_the_file(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    with pytest.raises(ValueError, match=f"prompts: no file .*rows.{suffix}"):
        load(path)
    write(path)
    with pytest.raises(ValueError, match=f"rows.{suffix} holds 20 prompts"):
        load(path, 21, **({} if suffix == "txt" else {"field": "question"}))
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=f"rows.{suffix}.*(not UTF-8 text|not a parquet file)"):
        load(path)


def test_errors_name_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": }\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: not JSON"):
        load(path, 1)
    path.write_text('\n\n{"prompt": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 3: field 'prompt' holds int"):
        load(path, 1)


def test_json_that_is_no_list_of_rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"prompt": "a"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.json: holds dict; valid: a list of rows"):
        load(path, 1)
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.json: not JSON .*; a row per line is called .jsonl"):
        load(path, 1)


# chat templates


def chatty(*, adds_bos):
    """A tokenizer with a template that writes its BOS token, as many do."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "hi": 1, "a": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="[UNK]")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} [assistant]{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("adds_bos", [True, False])
def test_prompts_become_turns_with_one_bos_token(adds_bos):
    tokenizer = chatty(adds_bos=adds_bos)
    (alone,) = load(["hi"], 1, tokenizer=tokenizer, chat_template=True)
    assert alone == ("" if adds_bos else "<s>") + "[user] hi [assistant]"
    assert tokenizer(alone).input_ids.count(0) == 1
    assert load([("hi", "a")], 1, tokenizer=tokenizer, chat_template=True) == [(alone, "a")]
    assert load(["hi"], 1, tokenizer=tokenizer) == ["hi"]


def test_chat_templates_that_do_not_exist():
    with pytest.raises(ValueError, match="tokenizer: none given; chat_template=True needs the model's"):
        load(["hi"], 1, chat_template=True)
    with pytest.raises(ValueError, match="chat_template: the tokenizer has none"):
        load(["hi"], 1, tokenizer=tiny_tokenizer(), chat_template=True)


# built-in and given ones


def test_builtin_prompts_take_turns():
    prompts = builtin_prompts(7, 3)
    expected = [tasks.take(task, "train", 3, 3) for task in tasks.TASKS]
    assert prompts == [(item.prompt, item.answer) for item in (expected[i % 3][i // 3] for i in range(7))]


def test_loaded_prompts_pass_the_check():
    loaded = load(ROWS, field="question", completion_field="answer")
    assert check_prompts(loaded, 20) == loaded
    assert check_prompts(builtin_prompts(3, 0), 3) == builtin_prompts(3, 0)
    with pytest.raises(ValueError, match="prompts: 20 given, the recipe needs 21"):
        check_prompts(load(PAIRS), 21)


KINDS = {
    "texts": (["a", "b\u2028c"], ["a", "b\u2028c"]),
    "pairs": ([("a", "b"), ["c", "d"], ("e",), ("f", "")], [("a", "b"), ("c", "d"), "e", ("f", "")]),
    "mappings": (
        [{"prompt": "a"}, {"prompt": "b", "completion": "c"}, {"prompt": "d", "completion": None}, {"text": "e"}],
        ["a", ("b", "c"), "d", "e"],
    ),
    "a mixture": (["a", ("b", "c"), {"prompt": "d", "more": 1}], ["a", ("b", "c"), "d"]),
    "a data set": (datasets.Dataset.from_list([{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}]), ["a", "b"]),
    "pairs of a data set": (datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]), [("a", "b")]),
    "a column": (datasets.Dataset.from_list(ROWS)["question"], [row["question"] for row in ROWS]),
    "a tuple": (("a", "b"), ["a", "b"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_given_prompts_are_read_in_their_order(kind):
    given, expected = KINDS[kind]
    assert check_prompts(given, len(expected)) == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pairs"])
def test_given_prompts_are_those_of_a_file_with_the_same_rows(kind, tmp_path):
    given, expected = KINDS[kind]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(list(given)), encoding="utf-8")
    assert Counter(load(path, len(expected))) == Counter(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.jsonl", "prompts: a single string; valid: a list of prompts"),
        (7, "prompts: int; valid: a list of strings, .* or a datasets.Dataset"),
        ({"prompt": ["a"]}, "prompts: dict; valid: a list"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "prompts: DatasetDict; valid: a list"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "prompts: IterableDataset; valid: a list"),
        ((text for text in "ab"), "prompts: generator; valid: a list"),
        (["a", ""], r"prompts\[1\]: '' holds no text; valid: a string"),
        (["a", {"prompt": None}], r"prompts\[1\]: \{'prompt': None\} holds no text"),
        (["a", ("", "b")], r"prompts\[1\]: \('', 'b'\) holds no text"),
        (["a", 7], r"prompts\[1\]: 7; valid: a string, \(prompt, completion\), or fields: 'prompt' and, if any"),
        (["a", None], r"prompts\[1\]: None; valid"),
        ([[{"role": "user", "content": "a"}]], r"prompts\[0\]: .*; valid: a string"),
        ([{"prompt": 7}], r"prompts\[0\]: field 'prompt' holds int; valid: text"),
        ([{"prompt": "a", "completion": 7}], r"prompts\[0\]: field 'completion' holds int; valid: text"),
        (["a", ROWS[0]], r"prompts\[1\]: no field 'prompt'; set field to one of its fields: question, answer, id"),
        (datasets.Dataset.from_list(ROWS), r"prompts\[0\]: no field 'prompt'; set field .* \(in load_prompts"),
        ([{}], r"prompts\[0\]: no field 'prompt'"),
        ([], "prompts: 0 given, the recipe needs 1"),
    ],
)
def test_given_prompts_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        check_prompts(given, 1)
