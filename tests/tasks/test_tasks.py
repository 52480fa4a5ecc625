import contextlib
import hashlib
import io
import itertools
import random
import re
from collections import Counter
from typing import Any, Literal

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dllmquant import tasks
from dllmquant.tasks import TASKS, Split, iterate, load, take
from dllmquant.tasks.items import Item, is_held_out
from dllmquant.tasks.math import LARGEST, extract_answer, make_drill
from dllmquant.tasks.tokenizer import build_tokenizer
from tests.bundled import bundled_tokenizer

COUNT = 1500
SPLITS: tuple[Split, ...] = ("train", "heldout")


@pytest.fixture(scope="module")
def items() -> dict[tuple[str, str], list[Item]]:
    """`COUNT` items of every task and split, of a seed the tokenizer was not built from."""
    return {(task, split): take(task, split, COUNT, seed=7) for task in TASKS for split in SPLITS}


def both(items: dict[tuple[str, str], list[Item]], task: str) -> list[Item]:
    return items[task, "train"] + items[task, "heldout"]


# Splits and streams


def held_out(key: str) -> bool:
    """The split rule as documented: a tenth of all keys, by the first four bytes of their SHA-256."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < 10


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_by_their_keys(items: dict[tuple[str, str], list[Item]], task: str) -> None:
    train, other = items[task, "train"], items[task, "heldout"]
    assert all(held_out(item.key) and is_held_out(item.key) for item in other)
    assert not any(held_out(item.key) or is_held_out(item.key) for item in train)
    assert not {item.key for item in train} & {item.key for item in other}
    assert not {item.prompt for item in train} & {item.prompt for item in other}


def test_a_tenth_of_all_keys_is_held_out() -> None:
    share = sum(is_held_out(f"some problem {number}") for number in range(20000)) / 20000
    assert share == pytest.approx(0.1, abs=0.01)


def test_a_problem_is_held_out_whatever_its_wording(items: dict[tuple[str, str], list[Item]]) -> None:
    """The split follows the key, which is the chain of operations: other names and things make no other problem."""
    wordings: dict[str, set[str]] = {}
    for item in items["math", "train"]:
        wordings.setdefault(item.key, set()).add(item.prompt)
    assert max(map(len, wordings.values())) > 3


@pytest.mark.parametrize("task", TASKS)
def test_held_out_items_do_not_repeat(items: dict[tuple[str, str], list[Item]], task: str) -> None:
    keys = Counter(item.key for item in items[task, "heldout"])
    assert keys.most_common(1)[0][1] == 1
    assert len({item.prompt for item in items[task, "heldout"]}) == COUNT


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_streams_are_decided_by_their_seed(task: str, split: Split) -> None:
    first = take(task, split, 50, seed=3)
    random.seed(0)
    stream = iterate(task, split, seed=3)
    interleaved = []
    for item in itertools.islice(stream, 50):
        random.random()
        interleaved.append(item)
    assert interleaved == first
    assert take(task, split, 20, seed=3) == first[:20]
    assert take(task, split, 50, seed=4) != first
    assert take(task, split, 50) == take(task, split, 50, seed=0)


def test_keys_of_different_tasks_differ(items: dict[tuple[str, str], list[Item]]) -> None:
    for task in TASKS:
        assert all(item.key.startswith(f"{task} ") for item in both(items, task))


@pytest.mark.parametrize("function", [iterate, lambda task, split: take(task, split, 1), lambda t, s: load(t, s, 1)])
@pytest.mark.parametrize(
    ("task", "split", "message"),
    [
        ("maths", "train", "task: unknown 'maths'; valid: math, code, qa"),
        ("math", "test", "split: unknown 'test'; valid: train, heldout"),
    ],
)
def test_unknown_names_are_errors_at_once(function: Any, task: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(task, split)


# As datasets


@pytest.mark.parametrize("task", TASKS)
def test_datasets_hold_the_items(task: str) -> None:
    dataset = load(task, "heldout", 5, seed=2)
    assert isinstance(dataset, datasets.IterableDataset)
    expected = [
        {"key": i.key, "prompt": i.prompt, "answer": i.answer, "choices": list(i.choices), "label": i.label}
        for i in take(task, "heldout", 5, seed=2)
    ]
    assert list(dataset) == expected
    assert list(dataset) == expected, "a second pass starts over"
    assert dataset.features is not None
    assert list(dataset.features) == ["key", "prompt", "answer", "choices", "label"]
    assert list(load(task, "train", 0)) == []


def test_datasets_are_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, original = 0, TASKS["math"]

    def make_item(rng: random.Random) -> Item:
        nonlocal drawn
        drawn += 1
        return original(rng)

    monkeypatch.setitem(tasks.TASKS, "math", make_item)
    dataset = load("math", "train", 10**9)
    assert drawn == 0
    assert [row["key"] for row in dataset.take(3)] == [item.key for item in take("math", "train", 3)]
    assert drawn < 50


# Answers, each derived again from the text


def test_only_cloze_tasks_have_choices(items: dict[tuple[str, str], list[Item]]) -> None:
    for task in ("math", "code"):
        assert all(item.choices == () and item.label == -1 for item in both(items, task))


def left_to_right(key: str) -> int:
    """Evaluates `12+3*2/5` from left to right."""
    value, *steps = re.findall(r"[-+*/]?\d+", key)
    assert "".join([value, *steps]) == key
    for step in steps:
        value = f"({value}{step})"
    result = eval(value)
    assert result == int(result)
    return int(result)


def told_operation(sentence: str) -> str:
    """The operation a sentence of a word problem describes, with its operand."""
    meanings = {
        "+": r"\b(buys \d+ more|gives [a-z]+ \d+ more|finds \d+)\b",
        "-": r"\b(gives \d+ to|loses \d+|sells \d+)\b",
        "*": r"\b\d+ times\b",
        "/": r"\b\d+ (equal )?parts\b",
    }
    found = [operation for operation, pattern in meanings.items() if re.search(pattern, sentence)]
    operands = re.findall(r"\d+", sentence)
    assert len(found) == len(operands) == 1, sentence
    return found[0] + operands[0]


def test_math_answers_follow_from_the_story(items: dict[tuple[str, str], list[Item]]) -> None:
    for item in both(items, "math"):
        story = item.prompt.removeprefix("q: ").removesuffix(" a:")
        start, *steps, question = re.findall(r"[^.?]+[.?]", story)
        chain = re.findall(r"\d+", start) + [told_operation(step.strip()) for step in steps]
        assert len(re.findall(r"\d+", start)) == 1
        assert question.endswith("?")
        assert item.key == f"math {''.join(chain)}"


def check_work(item: Item, work: str) -> list[str]:
    """Checks the worked steps of a problem against its key; returns their operations."""
    chain = item.key.removeprefix("math ")
    steps = re.findall(r" (\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)\.", work)
    assert work.endswith(".")
    assert work.count(".") == len(steps)
    assert chain == steps[0][0] + "".join(operation + b for _, operation, b, _ in steps)
    for a, operation, b, c in steps:
        assert eval(f"{a} {operation} {b} == {c}")
        assert 1 <= int(c) <= LARGEST
    assert all(before[3] == after[0] for before, after in itertools.pairwise(steps))
    assert steps[-1][3] == str(left_to_right(chain))
    return [operation for _, operation, _, _ in steps]


def test_math_answers_show_their_work(items: dict[tuple[str, str], list[Item]]) -> None:
    lengths, operations = Counter[int](), Counter[str]()
    for item in both(items, "math"):
        work, final = item.answer.split(" #### ")
        drawn = check_work(item, work)
        assert final == str(left_to_right(item.key.removeprefix("math "))) == extract_answer(item.answer)
        lengths[len(drawn)] += 1
        operations.update(drawn)
    assert sorted(lengths) == [1, 2, 3]
    assert sorted(operations) == ["*", "+", "-", "/"]


def test_drills_are_the_same_arithmetic_under_the_same_keys(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(7)
    drills = [make_drill(rng) for _ in range(500)]
    lengths = Counter(len(check_work(item, item.answer)) for item in drills)
    assert sorted(lengths) == [2, 3, 4]
    assert all(item.prompt == f"q: {item.key.removeprefix('math ')} a:" for item in drills)
    assert all(item.choices == () and item.label == -1 for item in drills)
    rows = tokenizer([item.prompt + item.answer for item in drills]).input_ids
    assert tokenizer.batch_decode(rows) == [item.prompt + item.answer for item in drills]
    assert tokenizer.unk_token_id not in set(itertools.chain(*rows))
    assert max(map(len, tokenizer([item.prompt for item in drills]).input_ids)) <= 16


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" 1 + 2 = 3. #### 3", "3"),
        ("#### 12 #### 13", "12"),
        ("####7.", "7"),
        ("#### 45\n", "45"),
        (" 1 + 2 = 3.", None),
        ("#### ", None),
        ("### 5", None),
        ("", None),
    ],
)
def test_extracting_math_answers(completion: str, answer: str | None) -> None:
    assert extract_answer(completion) == answer


def test_code_answers_are_what_python_prints(items: dict[tuple[str, str], list[Item]]) -> None:
    kinds = Counter[str]()
    for item in both(items, "code"):
        program = item.prompt.removeprefix("code: ").removesuffix(" prints:")
        assert item.prompt == f"code: {program} prints:"
        assert item.key == f"code {program}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(program, {})
        assert item.answer == f" {printed.getvalue().removesuffix(chr(10))}", program
        assert printed.getvalue().count("\n") == 1
        kinds.update(re.sub(r'"?\d+"?', "_", statement) for statement in program.split("; ")[1:])
    # Every statement and every printed expression occurs.
    expected = {"x.append(_)", "x.reverse()", "x.sort()", "x.pop()", "x[_] = _", "x.insert(_, _)"}
    expected |= {"s = s + _", "s = _ + s", "s = s[::-_]", "s = s.replace(_, _)"}
    expected |= {f"print({e})" for e in ("x", "x[::-_]", "sorted(x)", "x[_]", "x[-_]", "len(x)", "max(x)", "min(x)")}
    expected |= {f"print({e})" for e in ("s", "s[::-_]", "s[_:]", "s[:-_]", "s * _", "s[_]", "s[-_]", "len(s)")}
    assert set(kinds) == expected


def facts(story: str) -> dict[str, str]:
    """What a story says in the end: beginning of a sentence -> its completion."""
    known: dict[str, str] = {}
    for sentence in re.findall(r"[^.]+\.", story):
        text = sentence.strip()
        if moved := re.match(r"(\w+) goes to (the \w+\.)$", text):
            assert f"{moved[1]} is in" in known
            known[f"{moved[1]} is in"] = moved[2]
        else:
            match = re.match(r"(\w+ is in|the \w+ box holds|\w+ owns) (the [\w ]+\.)$", text)
            assert match is not None, text
            assert match[1] not in known, "two facts about one subject"
            known[match[1]] = match[2]
    return known


def test_exactly_one_choice_is_right(items: dict[tuple[str, str], list[Item]]) -> None:
    labels, moves = Counter[int](), 0
    for item in both(items, "qa"):
        match = re.match(r"read: (.*\.) so (.*)$", item.prompt)
        assert match is not None
        story, cloze = match.groups()
        right = f" {facts(story)[cloze]}"
        assert item.key == f"qa {item.prompt}"
        assert len(item.choices) == len(set(item.choices)) == 4
        assert [choice == right for choice in item.choices].count(True) == 1
        assert item.choices[item.label] == right == item.answer
        labels[item.label] += 1
        moves += "goes to" in story
    assert moves > COUNT / 10
    assert min(labels[label] for label in range(4)) > 0.9 * 2 * COUNT / 4, "the label must not be guessable"


def test_wrong_choices_that_the_story_mentions_come_with_it(items: dict[tuple[str, str], list[Item]]) -> None:
    """A model that only looks for words of the story cannot tell the choices apart."""
    for item in both(items, "qa"):
        mentioned = [choice for choice in item.choices if choice.split()[1].strip(".") in item.prompt]
        assert len(mentioned) >= 2
        assert item.answer in mentioned


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bundled_tokenizer()


@pytest.mark.parametrize("task", TASKS)
def test_every_text_round_trips(
    items: dict[tuple[str, str], list[Item]], tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    texts = [item.prompt + item.answer for item in both(items, task)]
    texts += [choice for item in items[task, "heldout"] for choice in item.choices]
    rows = tokenizer(texts).input_ids
    special = set(tokenizer.all_special_ids)
    assert not any(special & set(row) for row in rows)
    assert tokenizer.batch_decode(rows) == texts


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_completions_concatenate(
    items: dict[tuple[str, str], list[Item]], tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    pairs = [
        (item.prompt, item.choices[index % 4] if item.choices else item.answer)
        for index, item in enumerate(both(items, task))
    ]
    prompts, ends = (tokenizer(list(texts)).input_ids for texts in zip(*pairs, strict=True))
    together = tokenizer([prompt + end for prompt, end in pairs]).input_ids
    assert [prompt + end for prompt, end in zip(prompts, ends, strict=True)] == together


@pytest.mark.parametrize(("task", "prompt", "answer"), [("math", 46, 31), ("code", 42, 31), ("qa", 28, 4)])
def test_texts_fit_the_bundled_model(
    items: dict[tuple[str, str], list[Item]], tokenizer: PreTrainedTokenizerFast, task: str, prompt: int, answer: int
) -> None:
    """Prompts fit the lengths the bundled model is trained with, answers leave room for the end of the text."""
    drawn = both(items, task)
    assert max(map(len, tokenizer([item.prompt for item in drawn]).input_ids)) <= prompt
    assert max(map(len, tokenizer([item.answer for item in drawn]).input_ids)) <= answer


def test_choices_of_an_item_have_equal_lengths(
    items: dict[tuple[str, str], list[Item]], tokenizer: PreTrainedTokenizerFast
) -> None:
    """So their likelihoods compare without a length correction."""
    for item in items["qa", "heldout"][:500]:
        assert len({len(row) for row in tokenizer(list(item.choices)).input_ids}) == 1


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["[EOS]", "[MASK]", "[UNK]"]
    assert (tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer("so[MASK][EOS]").input_ids[-2:] == [1, 0]
    assert tokenizer(" zebra").input_ids == [2]


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same ten tokens wherever they stand."""
    assert sorted(token for token in tokenizer.get_vocab() if re.search(r"\d", token)) == list("0123456789")
    text = ' 99+10=109. 7, 8; "90"'
    assert [token for token in tokenizer(text).tokens() if token.isdigit()] == list("991010978" + "90")


def test_building_is_deterministic() -> None:
    first, second = build_tokenizer(300), build_tokenizer(300)
    assert first.get_vocab() == second.get_vocab()
    assert build_tokenizer(300, seed=1).get_vocab() != first.get_vocab()


def test_saved_tokenizers_reload(
    items: dict[tuple[str, str], list[Item]], tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [f"{item.prompt}{item.answer}" for task in TASKS for item in items[task, "heldout"][:50]]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert loaded.batch_decode(loaded(texts).input_ids) == texts
    for name in ("eos_token_id", "pad_token_id", "mask_token_id", "unk_token_id", "padding_side"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name


def test_splits_are_the_declared_ones() -> None:
    assert Split == Literal["train", "heldout"]
