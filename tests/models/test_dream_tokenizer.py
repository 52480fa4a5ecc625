"""Dream's tokenizer, read from a directory laid out as the published checkpoints are, without their remote code."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

import dllmquant
from dllmquant.cli.loading import load_tokenizer
from dllmquant.models import DreamTokenizer
from tests.tiny import tiny_dream

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "tom has 7 apples.",
    " how many\n\n remain?",
    "Tom's  cafe\u0301 12",
    "<|im_start|>user\ntom<|mask|><|mask|> 5<|im_end|>",
]


def added(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": True} | flags


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Dream with the files of a published tokenizer; the code that `auto_map` names is not there."""
    path = tmp_path_factory.mktemp("published")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["tom has 7 apples. tom buys 5 more. how many remain?"], vocab_size=300, min_frequency=1, show_progress=False
    )
    bpe.save_model(str(path))
    first = len(json.loads((path / "vocab.json").read_text(encoding="utf-8")))
    ids = {token: first + index for index, token in enumerate(SPECIAL)}
    document = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): added(token) for token, index in ids.items()},
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "chat_template": CHAT,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(document), encoding="utf-8")
    end = ids["<|endoftext|>"]
    tiny_dream(
        vocab_size=first + len(SPECIAL), mask_token_id=ids["<|mask|>"], eos_token_id=end, pad_token_id=end
    ).save_pretrained(path)
    return path


def expected_ids(directory: Path, text: str) -> list[int]:
    """What a plain Qwen2 BPE makes of a text, given the same files one by one."""
    vocab = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    lines = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges: Any = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#")]
    plain = Qwen2Tokenizer(vocab=vocab, merges=merges)
    plain.add_special_tokens({"additional_special_tokens": SPECIAL})
    ids: list[int] = plain(text).input_ids
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_qwen2(published: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published)
    assert type(tokenizer) is DreamTokenizer
    assert tokenizer(text).input_ids == expected_ids(published, text)


def test_special_tokens_and_template(published: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published, trust_remote_code=False)
    ids = {token: index for token, index in tokenizer.get_vocab().items() if token in SPECIAL}
    assert sorted(ids.values()) == list(range(len(tokenizer) - len(SPECIAL), len(tokenizer)))
    for name, token in (("mask", "<|mask|>"), ("eos", SPECIAL[0]), ("pad", SPECIAL[0]), ("bos", "<|beginoftext|>")):
        assert getattr(tokenizer, f"{name}_token_id") == ids[token]
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "tom"}], tokenize=False, add_generation_prompt=True
    )
    assert written == "<|im_start|>user\ntom<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(f"tom<|mask|>{SPECIAL[0]}").input_ids, skip_special_tokens=True) == "tom"


def test_saved_and_read_back(published: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(published)
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["tokenizer_class"] == "DreamTokenizer"
    assert "auto_map" not in saved
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is DreamTokenizer
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.mask_token_id, again.chat_template) == (tokenizer.mask_token_id, CHAT)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_a_published_directory_is_quantized_and_generates(published: Path, tmp_path: Path) -> None:
    assert type(load_tokenizer(str(published))) is DreamTokenizer  # as the command line reads it
    quantizer = dllmquant.DLLMQuantizer.from_pretrained(published, recipe="rtn-w8a8")
    model = quantizer.quantize(tmp_path / "out", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = dllmquant.generate(model, tokenizer, ["tom has", "how many remain?"])
    assert texts == dllmquant.generate(model, AutoTokenizer.from_pretrained(published), ["tom has", "how many remain?"])
    assert any(texts)
