"""The bundled tokenizer, built once per test run (a shorter stream gives the same vocabulary in another order)."""

import functools

from transformers import PreTrainedTokenizerFast

from dllmquant.tasks.tokenizer import build_tokenizer


@functools.cache
def bundled_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(3000)
