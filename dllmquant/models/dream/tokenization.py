"""The tokenizer of Dream and DiffuCoder: Qwen2's, under the name the published checkpoints give it."""

from typing import Any

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Reads the published `vocab.json`, `merges.txt` and special tokens, so that their remote code is not needed.

    Args:
        *args: As for `Qwen2Tokenizer`.
        **kwargs: As for `Qwen2Tokenizer`. The published `auto_map` is dropped: it names a file that `save_pretrained`
            does not write.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)
        super().__init__(*args, **kwargs)
