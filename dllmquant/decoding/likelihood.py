"""The Monte Carlo bound on the likelihood of a target text, as LLaDA's evaluation of multiple-choice tasks computes it.

With ``L`` target tokens ``y``, a count ``l`` uniform on ``1..L`` and a uniform subset ``S`` of ``l`` target positions,

    log p(y | prompt)  ≥  E_l E_S [ -(L / l) · Σ_{j ∈ S} CE_j ],

where ``CE_j`` is the cross-entropy of ``y_j`` under the model that sees the prompt and the target with ``S`` masked
(LLaDA, arXiv 2502.09992; the form with a fixed number of masked tokens, which varies less than independent masking).
The samples of a pair are stratified over ``l``: a uniform first count, then steps of ``L / mc_num``, wrapped into
``1..L``.

Deviations from LLaDA's published evaluation code:

1. Counts are stepped in integers. The published code rounds half-way steps to even numbers, which makes some counts
   more frequent than others, so that its estimate is slightly biased.
2. Every pair has a random stream of its own instead of a share of a global one, and pairs may share one on purpose.
3. A mask that a pair draws more than once is evaluated once and counted as often as it was drawn.
4. There is no classifier-free guidance.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from dllmquant.decoding.sampler import Denoiser


@torch.no_grad()
def log_likelihoods(
    denoiser: Denoiser,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    mask_token_id: int,
    pad_token_id: int,
    mc_num: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Tensor:
    """Estimate the log-likelihood bound of every target given its prompt.

    The masks of a pair depend on ``seed``, its stream, the length of its target and ``mc_num`` alone. The result thus
    depends neither on ``batch_size`` nor on the other pairs, as long as the denoiser computes each row independently
    of the others and of left padding (to the rounding of its own arithmetic). Pairs of one stream and one target
    length get the *same* masks. Give the choices of one question a common stream: the Monte Carlo noise that similar
    choices have in common then does not disturb their ranking. Give different questions different streams, so that
    their errors stay independent.

    Args:
        denoiser: The model, ``(ids int64 [B, L], attention_mask bool [B, L]) -> logits [B, L, V]`` in any floating
            dtype, aligned so that ``logits[:, j]`` predicts position ``j``. Cross-entropies are computed in float32,
            or in float64 if the logits are, over the whole vocabulary (including the mask token, as published).
        pairs: Token ids of (prompt, target); a prompt may be empty, a target may not.
        mask_token_id: The mask token. It may not occur in a pair.
        pad_token_id: Fills left padding; any token but the mask token.
        mc_num: Masks drawn per pair, at least 1.
        batch_size: Masked sequences evaluated together, at least 1.
        seed: Seed of the masks.
        streams: The random stream of each pair; its index if not given.
        device: Where the denoiser expects its inputs; the CPU if not given.
        progress: Whether to show a progress bar that counts masked sequences.

    Returns:
        float64 ``[N]`` on the CPU, in nats, the sum over the target's tokens (not divided by its length).

    Raises:
        ValueError: If a pair, a token id or a number is not as above, or the denoiser returns logits of the wrong
            shape or dtype, or logits that give no cross-entropy (NaN).
    """
    _check_options(mask_token_id, pad_token_id, mc_num, batch_size)
    rows = _checked_pairs(pairs, mask_token_id)
    if streams is None:
        streams = range(len(rows))
    if len(streams) != len(rows):
        raise ValueError(f"streams has {len(streams)} entries; valid: one for each of the {len(rows)} pairs")
    # By length, so that a batch holds little padding.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]) + len(rows[index][1]))
    samples = [
        (index, mask, weight)
        for index in order
        for mask, weight in zip(*_draw_masks(len(rows[index][1]), mc_num, seed, streams[index]), strict=True)
    ]
    totals = torch.zeros(len(rows), dtype=torch.float64)
    with tqdm(total=len(samples), unit="sequence", disable=not progress) as bar:
        for start in range(0, len(samples), batch_size):
            indices, masks, weights = zip(*samples[start : start + batch_size], strict=True)
            ids, attention, masked = _left_padded([rows[index] for index in indices], masks, pad_token_id)
            seen = ids.masked_fill(masked, mask_token_id)
            losses = _cross_entropies(denoiser, seen.to(device), attention.to(device), masked, ids[masked])
            sample = masked.nonzero()[:, 0]
            totals.index_add_(0, torch.tensor(indices)[sample], -torch.stack(weights)[sample] * losses)
            bar.update(len(indices))
    if bool(totals.isnan().any()):
        raise ValueError("logits of the denoiser give a cross-entropy of NaN; valid: logits without NaN or +inf")
    return totals


def _draw_masks(length: int, mc_num: int, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """Distinct masks of a target, bool ``[D, length]``, and their weights in the bound, float64 ``[D]``."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {stream}").getrandbits(63))
    first = torch.randint(length, (), generator=generator)
    counts = (first + torch.arange(mc_num) * length // mc_num) % length + 1
    permutations = torch.rand((mc_num, length), generator=generator, dtype=torch.float64).argsort(dim=1)
    masks, drawn = torch.unique(permutations < counts.unsqueeze(1), dim=0, return_counts=True)
    return masks, drawn.double() / mc_num * length / masks.sum(dim=1)


def _left_padded(
    rows: Sequence[tuple[list[int], list[int]]], masks: Sequence[Tensor], pad_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64, attention mask bool and masked positions bool, all ``[B, longest]``."""
    width = max(len(prompt) + len(target) for prompt, target in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    attention = torch.zeros(ids.shape, dtype=torch.bool)
    masked = torch.zeros(ids.shape, dtype=torch.bool)
    for index, ((prompt, target), mask) in enumerate(zip(rows, masks, strict=True)):
        start = width - len(prompt) - len(target)
        ids[index, start:] = torch.tensor(prompt + target)
        attention[index, start:] = True
        masked[index, width - len(target) :] = mask
    return ids, attention, masked


def _cross_entropies(denoiser: Denoiser, seen: Tensor, attention: Tensor, masked: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every masked token, float64 on the CPU, in row-major order."""
    logits = denoiser(seen, attention)
    if logits.dim() != 3 or logits.shape[:2] != seen.shape or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits of the denoiser have shape {tuple(logits.shape)} and dtype {logits.dtype}; "
            f"valid: a floating tensor [{seen.shape[0]}, {seen.shape[1]}, V]"
        )
    if int(targets.max()) >= logits.shape[-1]:
        raise ValueError(
            f"a target contains token {int(targets.max())}; "
            f"valid: 0 to {logits.shape[-1] - 1}, the vocabulary of the denoiser's logits"
        )
    wanted = logits[masked.to(logits.device)]
    wide = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
    return F.cross_entropy(wide, targets.to(logits.device), reduction="none").cpu().double()


def _check_options(mask_token_id: int, pad_token_id: int, mc_num: int, batch_size: int) -> None:
    for name, count in (("mc_num", mc_num), ("batch_size", batch_size)):
        if count < 1:
            raise ValueError(f"{name} is {count}; valid: an integer of at least 1")
    for name, token in (("mask_token_id", mask_token_id), ("pad_token_id", pad_token_id)):
        if token < 0:
            raise ValueError(f"{name} is {token}; valid: a token id of at least 0")
    if pad_token_id == mask_token_id:
        raise ValueError(
            f"pad_token_id is {pad_token_id}; valid: any token other than mask_token_id, which is the same"
        )


def _checked_pairs(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], mask_token_id: int
) -> list[tuple[list[int], list[int]]]:
    if not pairs:
        raise ValueError("pairs is empty; valid: at least one (prompt, target)")
    rows = [(list(prompt), list(target)) for prompt, target in pairs]
    for index, (prompt, target) in enumerate(rows):
        if not target:
            raise ValueError(f"pairs[{index}] has an empty target; valid: at least one token")
        for token in prompt + target:
            if token < 0 or token == mask_token_id:
                raise ValueError(
                    f"pairs[{index}] contains {token}; valid: token ids of at least 0 other than the mask token "
                    f"{mask_token_id}"
                )
    return rows
