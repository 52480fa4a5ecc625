"""Checks of what is given to a sampler: special tokens and prompts."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor


def check_token_ids(mask: int | None, pad: int, eos: int | None, eot: int | None) -> None:
    """Raise ``ValueError`` if a special token is negative, or one of the others is the mask token, if there is one."""
    for name, token in (
        ("mask_token_id", mask),
        ("pad_token_id", pad),
        ("eos_token_id", eos),
        ("eot_token_id", eot),
    ):
        if token is not None and token < 0:
            raise ValueError(f"{name} is {token}; valid: a token id of at least 0")
    for name, token in (("pad_token_id", pad), ("eos_token_id", eos), ("eot_token_id", eot)):
        if token is not None and token == mask:
            raise ValueError(f"{name} is {token}; valid: any token other than mask_token_id, which is the same")


def required_eos(enabled: bool, option: str, eos_token_id: int | None) -> tuple[int, ...]:
    """The EOS token if an option needs it, or nothing; ``ValueError`` if the option needs it and there is none."""
    if not enabled:
        return ()
    if eos_token_id is None:
        raise ValueError(f"eos_token_id is None with {option} True; valid: the EOS token of the model")
    return (eos_token_id,)


def token_rows(prompts: Sequence[Sequence[int] | Tensor], mask_token_id: int | None) -> list[Tensor]:
    """The prompts as int64 CPU tensors ``[l]``.

    Raises:
        ValueError: If there is no prompt, or one is no sequence of token ids, without the mask token if there is one.
    """
    if not len(prompts):
        raise ValueError("prompts is empty; valid: at least one prompt")
    rows = [_token_row(index, prompt) for index, prompt in enumerate(prompts)]
    for index, row in enumerate(rows):
        if bool((row < 0).any()):
            raise ValueError(f"prompts[{index}] contains {int(row.min())}; valid: token ids of at least 0")
        if mask_token_id is not None and bool((row == mask_token_id).any()):
            where = (row == mask_token_id).nonzero().squeeze(1).tolist()
            raise ValueError(
                f"prompts[{index}] contains the mask token {mask_token_id} at {where}; valid: any other token"
            )
    return rows


def _token_row(index: int, prompt: Sequence[int] | Tensor) -> Tensor:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype.is_floating_point or prompt.dtype == torch.bool:
            raise ValueError(
                f"prompts[{index}] has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; "
                "valid: a one-dimensional integer tensor"
            )
        return prompt.to("cpu", torch.int64)
    try:
        return torch.tensor([operator.index(token) for token in prompt], dtype=torch.int64)
    except TypeError as error:
        raise ValueError(f"prompts[{index}] is not a sequence of token ids ({error}); valid: integers") from error
