"""Dream's denoising step as pure functions: restrict the distribution, draw from it, rank the masked positions by it.

Shapes: ``B`` rows, ``L`` positions, ``V`` vocabulary entries, ``n`` masked positions over all rows, in row-major order.
Logits are aligned: ``logits[:, j]`` predicts position ``j``. No function changes its arguments.

Unlike in LLaDA's step (:mod:`dllmquant.decoding.remasking`), the order of commitment is measured on the distribution
that candidates are drawn from: tempered, and cut by top-p and top-k. The recorded confidence is the model's own there
as here. Deviations from the published code (``sample_tokens`` of Dream's ``diffusion_generate``):

1. Softmax is computed in float32, or in float64 for float64 logits, whatever the dtype of the model.
2. A token is drawn by one random number per position, the first whose cumulative probability exceeds it; positions are
   drawn without replacement as the largest of ``score / temperature`` plus Gumbel noise. Both distributions are the
   published ones.
3. Entropy is exact, with 0 log 0 = 0, where the published code adds 1e-10 inside the logarithm.
4. Equal scores are committed in the order of their positions, first one first; ``torch.topk`` leaves that open.
"""

import torch
from torch import Tensor

from dllmquant.decoding.config import Ranking
from dllmquant.decoding.remasking import Candidates, check_noise, check_step, probability, widen

_NEVER = float("-inf")


def restrict(
    logits: Tensor, *, temperature: float = 0.0, top_p: float | None = None, top_k: int | None = None
) -> Tensor:
    """Temper logits, then cut the unlikely tokens.

    Args:
        logits: Floating tensor ``[..., V]``; ``-inf`` stays.
        temperature: Logits are divided by it if it is above 0.
        top_p: If given, the likeliest tokens are kept up to and including the one with which their probability
            exceeds this.
        top_k: If given, so many of the likeliest are kept then, and those as likely as the last of them.

    Returns:
        Logits ``[..., V]``, float64 if the input is, otherwise float32; tokens that are cut have ``-inf``. The
        likeliest token always stays.
    """
    logits = widen(logits)
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0.0
        cut = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(cut, _NEVER)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], _NEVER)
    return logits


def draw_tokens(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per position: the first whose cumulative probability exceeds the random number.

    Args:
        probabilities: Floating tensor ``[n, V]``, not negative, each row with a positive sum.
        uniform: float64 ``[n]`` in [0, 1).

    Returns:
        int64 ``[n]``; never a token of probability 0.

    Raises:
        ValueError: If ``uniform`` has another shape or dtype.
    """
    check_noise("uniform", uniform, tuple(probabilities.shape[:1]))
    cumulative = probabilities.to(torch.float64).cumsum(dim=-1)
    total = cumulative[:, -1]
    wanted = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, wanted.unsqueeze(1), right=True).squeeze(1)
    return drawn.clamp(max=probabilities.shape[-1] - 1)  # beyond the end only where a probability is NaN


def certainty(probabilities: Tensor, tokens: Tensor, ranking: Ranking) -> Tensor:
    """How sure distributions are of their outcome.

    Args:
        probabilities: Floating tensor ``[n, V]``, rows summing to 1.
        tokens: int64 ``[n]``, the candidates.
        ranking: "maskgit_plus": the candidate's probability; "topk_margin": the difference of the two largest
            probabilities; "entropy": the negative entropy in nats.

    Returns:
        ``[n]``, larger where surer.

    Raises:
        ValueError: If ``ranking`` is "origin", which measures nothing.
    """
    if ranking == "maskgit_plus":
        return probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    if ranking == "topk_margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
        return first - second
    if ranking == "entropy":
        entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
        return -entropy
    raise ValueError(f"ranking is {ranking!r}; valid: 'maskgit_plus', 'topk_margin' or 'entropy'")


def propose_ranked(
    logits: Tensor,
    mask: Tensor,
    ranking: Ranking,
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    uniform: Tensor | None = None,
    ranking_temperature: float = 0.0,
    noise: Tensor | None = None,
) -> Candidates:
    """Choose every position's candidate and rank the masked positions.

    Args:
        logits: Floating tensor ``[B, L, V]``.
        mask: bool ``[B, L]``, True where the state still holds the mask token.
        ranking: What the score of a masked position is: see :func:`certainty`; for "origin" minus its ``noise``.
        temperature: At 0 the candidate is the argmax; above 0 it is drawn from what :func:`restrict` leaves.
        top_p: See :func:`restrict`.
        top_k: See :func:`restrict`.
        uniform: float64 ``[n]`` in [0, 1), the random numbers of the candidates; needed exactly when ``temperature``
            is above 0.
        ranking_temperature: Above 0, the best ``k`` scores are those of positions drawn without replacement with
            probabilities proportional to ``exp(certainty / ranking_temperature)``.
        noise: float64 ``[n]`` in [0, 1), the random numbers of the ranking; needed exactly when ``ranking`` is
            "origin" or ``ranking_temperature`` is above 0.

    Returns:
        The candidates. Positions that are not masked have their argmax as candidate.

    Raises:
        ValueError: If shapes or dtypes do not match, or random numbers are missing or superfluous.
    """
    check_step(logits, mask=mask)
    _check_given("uniform", uniform, temperature > 0, f"at temperature {temperature}")
    _check_given(
        "noise",
        noise,
        ranking == "origin" or ranking_temperature > 0,
        f"with ranking {ranking!r} and ranking_temperature {ranking_temperature}",
    )
    logits = widen(logits)
    tokens = logits.argmax(dim=-1)
    probabilities = restrict(logits[mask], temperature=temperature, top_p=top_p, top_k=top_k).softmax(dim=-1)
    if uniform is not None:
        tokens[mask] = draw_tokens(probabilities, uniform)
    if noise is not None:
        check_noise("noise", noise, (len(probabilities),))
    if ranking == "origin":
        assert noise is not None
        measured = -noise
    else:
        measured = certainty(probabilities, tokens[mask], ranking)
        if noise is not None:
            above_zero = noise.clamp(min=torch.finfo(noise.dtype).tiny)  # no position is out of the running
            measured = measured / ranking_temperature - torch.log(-torch.log(above_zero))
    score = torch.full(tokens.shape, _NEVER, dtype=measured.dtype, device=tokens.device)
    score[mask] = measured
    return Candidates(tokens, probability(logits, tokens), score)


def _check_given(name: str, value: Tensor | None, needed: bool, where: str) -> None:
    if needed != (value is not None):
        raise ValueError(
            f"{name} is {'missing' if value is None else 'given'} {where}; valid: {'given' if needed else 'None'}"
        )
