"""The bundled model's tokenizer: whole words, single digits, runs of punctuation; text round-trips exactly."""

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dllmquant.tasks import TASKS, iterate

MASK, EOS, UNKNOWN = "[MASK]", "[EOS]", "[UNK]"

# A space belongs to the word or punctuation after it. Digits stay the same ten tokens wherever they stand: a space
# before one is a token of its own, or part of the full stop, comma or semicolon before it.
_TOKEN = "[.,;]▁(?=[0-9])|[0-9]|▁(?=[0-9])|▁?(?:[a-z]+|[.,;]|[^a-z0-9▁.,;]+)"


def build_tokenizer(items_per_task: int = 20000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the training split of every task.

    Spaces are kept (as `▁`), so decoding restores the text.

    Args:
        items_per_task: Items read from each task; all word forms appear well before 20,000.
        seed: Seed of the item streams.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.WordLevelTrainer(special_tokens=[EOS, MASK, UNKNOWN], show_progress=False)
    texts = (
        f"{item.prompt}{completion}"
        for task in TASKS
        for item in itertools.islice(iterate(task, "train", seed), items_per_task)
        for completion in (item.answer, *item.choices)
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return fast
