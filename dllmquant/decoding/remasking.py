"""One denoising step as pure functions: guide, forbid, propose a candidate everywhere, commit some of them.

Shapes: ``B`` rows, ``L`` positions, ``V`` vocabulary entries. Logits are aligned: ``logits[:, j]`` predicts position
``j`` (models whose head is shifted by one are realigned by their adapter). No function changes its arguments.

The step is LLaDA's (arXiv 2502.09992 and its published sampler) or, with a confidence threshold, Fast-dLLM's parallel
decoding (arXiv 2505.22618). Deviations from LLaDA's published code:

1. Gumbel-max is evaluated in the log domain, ``argmax(logits - T * log(-log u))``. This is the logarithm of
   ``exp(logits) / (-log u) ** T``, hence the same argmax, but large (for example guided) logits cannot overflow.
2. Gumbel noise is drawn only where a token may be committed in this step. Every other position's candidate is the
   model's argmax, which is also what its recorded confidence belongs to.
3. Softmax is computed in float32, or in float64 for float64 logits, whatever the dtype of the model.
4. Equal scores are committed in the order of their positions, first one first; ``torch.topk`` leaves that open.
5. A step never commits a position outside the active block, even if it is asked for more tokens than are masked there.
6. Deferring EOS and EoT removes both from the confidence softmax at every temperature. The published code does so at
   temperature 0 only: at other temperatures it writes the EOS entry into the noisy copy, where it has no effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_NEVER = float("-inf")


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the model would write at every position, and how eagerly each position wants to be committed.

    Invariants: all tensors are ``[B, L]``; ``score`` is ``-inf`` exactly where nothing may be committed.

    Attributes:
        tokens: int64, the candidate of each position: the (Gumbel-perturbed) argmax of its logits.
        confidence: float32 or float64, the softmax probability of the candidate under the unperturbed logits, at every
            position: at decoded ones it is the probability of the model's own argmax there.
        score: float32 or float64, the order of commitment, highest first: the confidence (with deferred tokens removed
            from the softmax) or random numbers in [0, 1).
    """

    tokens: Tensor
    confidence: Tensor
    score: Tensor


@dataclass(frozen=True, eq=False)
class StepResult:
    """The outcome of one denoising step.

    Invariants: all tensors are ``[B, L]``; ``state`` differs from the previous state at most where ``committed``, and
    ``committed`` is a subset of the positions that were masked and active.

    Attributes:
        state: Integer tensor of the previous state's dtype, the state after the step.
        committed: bool, True where this step replaced a mask token.
        confidence: float32 or float64, the model's softmax probability of its candidate, at every position, measured
            on the state before the step (see :class:`Candidates`).
    """

    state: Tensor
    committed: Tensor
    confidence: Tensor


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Combine two forward passes by unsupervised classifier-free guidance.

    ``unconditional + (scale + 1) * (conditional - unconditional)``, where the unconditional pass saw mask tokens in
    place of the prompt (LLaDA, arXiv 2502.09992). Scale 0 gives the conditional logits.

    Args:
        conditional: Floating tensor ``[..., V]``. Entries of ``-inf`` stay ``-inf``.
        unconditional: Floating tensor of the same shape.
        scale: The guidance scale, at least 0.

    Returns:
        Guided logits ``[..., V]``, float64 if both inputs are, otherwise float32.

    Raises:
        ValueError: If the shapes differ.
    """
    if conditional.shape != unconditional.shape:
        raise ValueError(
            f"unconditional has shape {tuple(unconditional.shape)}; "
            f"valid: the shape of conditional, {tuple(conditional.shape)}"
        )
    given, free = widen(conditional), widen(unconditional)
    guided = free + (scale + 1.0) * (given - free)
    return guided.masked_fill(given == _NEVER, _NEVER)


def forbid(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Give tokens probability zero by setting their logits to ``-inf``.

    Args:
        logits: Floating tensor ``[..., V]``.
        token_ids: Vocabulary entries, each in ``[0, V)``; may be empty.

    Returns:
        A new tensor like ``logits`` (``logits`` itself if ``token_ids`` is empty).

    Raises:
        ValueError: If a token lies outside the vocabulary.
    """
    vocabulary = logits.shape[-1]
    for token in token_ids:
        if not 0 <= token < vocabulary:
            raise ValueError(f"token_ids contains {token}; valid: 0 to {vocabulary - 1}, the vocabulary of the logits")
    if not token_ids:
        return logits
    return logits.index_fill(-1, torch.tensor(list(token_ids), device=logits.device), _NEVER)


def gumbel_argmax(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw from ``softmax(logits / temperature)`` by the Gumbel-max trick, in float64.

    ``argmax_v logits_v - T * log(-log u_v)``, the argmax of LLaDA's ``exp(logits_v) / (-log u_v) ** T``. Float64
    because low-precision Gumbel noise truncates the tail and thereby lowers the temperature (arXiv 2409.02908).

    Args:
        logits: Floating tensor ``[..., V]``.
        temperature: A finite number above 0.
        uniform: float64 tensor of the same shape with numbers in [0, 1); an entry of 0 excludes its token.

    Returns:
        int64 tensor ``[...]`` of vocabulary entries.

    Raises:
        ValueError: If ``temperature`` is not above 0 or ``uniform`` has another shape or dtype.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; valid: a number above 0 (at 0, take the argmax)")
    check_noise("uniform", uniform, tuple(logits.shape))
    gumbel = -torch.log(-torch.log(uniform))
    return (logits.to(torch.float64) + temperature * gumbel).argmax(dim=-1)


def propose(
    logits: Tensor,
    mask: Tensor,
    active: Tensor,
    *,
    temperature: float = 0.0,
    uniform: Tensor | None = None,
    random_score: Tensor | None = None,
    deferred: Sequence[int] = (),
) -> Candidates:
    """Choose every position's candidate and score the positions that may be committed.

    A position may be committed if it is masked and inside the active block; let ``n`` be their number over all rows.

    Args:
        logits: Floating tensor ``[B, L, V]``.
        mask: bool ``[B, L]``, True where the state still holds the mask token.
        active: bool ``[B, L]``, True inside the block that each row is decoding.
        temperature: At 0 the candidate is the argmax; above 0 it is drawn by :func:`gumbel_argmax`.
        uniform: float64 ``[n, V]`` in [0, 1), the noise of the positions that may be committed in row-major order;
            needed exactly when ``temperature`` is above 0.
        random_score: float64 ``[n]`` in [0, 1): commit in random order ("random" remasking) instead of by confidence.
        deferred: Tokens removed from the softmax of the score (not from ``confidence``), so that positions whose
            candidate is one of them score 0 and are committed last (LLaDA appendix B.4: EOS and EoT).

    Returns:
        The candidates. NaN logits give NaN confidences at their positions and nothing else.

    Raises:
        ValueError: If shapes or dtypes do not match, ``uniform`` is missing or superfluous, ``random_score`` is
            combined with ``deferred``, or a deferred token lies outside the vocabulary.
    """
    check_step(logits, mask=mask, active=active)
    if (temperature > 0) != (uniform is not None):
        raise ValueError(
            f"uniform is {'missing' if uniform is None else 'given'} at temperature {temperature}; "
            "valid: given exactly when temperature is above 0"
        )
    if random_score is not None and deferred:
        raise ValueError(f"deferred is {tuple(deferred)} with random_score; valid: (), random scores defer nothing")

    logits = widen(logits)
    eligible = mask & active
    tokens = logits.argmax(dim=-1)
    if uniform is not None:
        tokens[eligible] = gumbel_argmax(logits[eligible], temperature, uniform)
    confidence = probability(logits, tokens)
    score = confidence
    if deferred:
        is_deferred = torch.isin(tokens, torch.tensor(list(deferred), device=tokens.device))
        score = probability(forbid(logits, deferred), tokens).masked_fill(is_deferred, 0.0)
    if random_score is not None:
        check_noise("random_score", random_score, (int(eligible.sum()),))
        score = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        score[eligible] = random_score
    return Candidates(tokens, confidence, score.masked_fill(~eligible, _NEVER))


def commit_most_confident(state: Tensor, candidates: Candidates, counts: Tensor) -> StepResult:
    """Commit each row's ``k`` best candidates (LLaDA's low-confidence and random remasking).

    Args:
        state: Integer tensor ``[B, L]``.
        candidates: What :func:`propose` made of this state.
        counts: Integer tensor ``[B]``, the ``k`` of each row, at least 0. A row that has fewer eligible positions
            commits all of them.

    Returns:
        The state after the step.

    Raises:
        ValueError: If the shapes do not match.
    """
    _check_state(state, candidates)
    _check_counts(state, counts)
    return _commit(state, candidates, _rank(candidates.score) < counts.unsqueeze(1))


def commit_above_threshold(state: Tensor, candidates: Candidates, threshold: float) -> StepResult:
    """Commit every candidate whose score reaches the threshold, and always each row's best one.

    Fast-dLLM's confidence-aware parallel decoding (arXiv 2505.22618): the best candidate is committed
    unconditionally, so that every step makes progress.

    Args:
        state: Integer tensor ``[B, L]``.
        candidates: What :func:`propose` made of this state.
        threshold: A probability in (0, 1].

    Returns:
        The state after the step. Rows without an eligible position do not change.

    Raises:
        ValueError: If ``threshold`` lies outside (0, 1] or the shapes do not match.
    """
    _check_state(state, candidates)
    _check_threshold(threshold)
    return _commit(state, candidates, (candidates.score >= threshold) | (_rank(candidates.score) == 0))


def commit_dynamic(state: Tensor, candidates: Candidates, threshold: float, counts: Tensor) -> StepResult:
    """Commit every candidate whose score exceeds the threshold, and at least each row's ``k`` best.

    SDAR's and LLaDA2's dynamic remasking: a step's share of the schedule is the least it commits.

    Args:
        state: Integer tensor ``[B, L]``.
        candidates: What was proposed at this state.
        threshold: A probability in (0, 1].
        counts: Integer tensor ``[B]``, the ``k`` of each row, at least 0. A row that has fewer eligible positions
            commits all of them.

    Returns:
        The state after the step.

    Raises:
        ValueError: If ``threshold`` lies outside (0, 1] or the shapes do not match.
    """
    _check_state(state, candidates)
    _check_threshold(threshold)
    _check_counts(state, counts)
    return _commit(state, candidates, (candidates.score > threshold) | (_rank(candidates.score) < counts.unsqueeze(1)))


def _commit(state: Tensor, candidates: Candidates, chosen: Tensor) -> StepResult:
    committed = chosen & (candidates.score > _NEVER)
    after = torch.where(committed, candidates.tokens.to(state.dtype), state)
    return StepResult(after, committed, candidates.confidence)


def _rank(score: Tensor) -> Tensor:
    """Rank of each entry within its row, 0 for the highest; equal scores rank by position."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """The softmax probability ``[...]`` of ``tokens`` ``[...]`` under ``logits`` ``[..., V]``."""
    return logits.softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def check_step(logits: Tensor, **positions: Tensor) -> None:
    """Raise ``ValueError`` unless logits are floating ``[B, L, V]`` and every other tensor is bool ``[B, L]``."""
    if logits.dim() != 3 or not logits.dtype.is_floating_point:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and dtype {logits.dtype}; valid: a floating tensor [B, L, V]"
        )
    for name, value in positions.items():
        if value.shape != logits.shape[:2] or value.dtype != torch.bool:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}; "
                f"valid: a bool tensor of shape {tuple(logits.shape[:2])}"
            )


def _check_state(state: Tensor, candidates: Candidates) -> None:
    if state.shape != candidates.score.shape:
        raise ValueError(
            f"state has shape {tuple(state.shape)}; valid: the shape of the candidates, {tuple(candidates.score.shape)}"
        )


def _check_threshold(threshold: float) -> None:
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}; valid: a probability in (0, 1]")


def _check_counts(state: Tensor, counts: Tensor) -> None:
    if counts.shape != state.shape[:1]:
        raise ValueError(f"counts has shape {tuple(counts.shape)}; valid: ({state.shape[0]},), one count per row")


def check_noise(name: str, noise: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless random numbers are float64 of a shape."""
    if tuple(noise.shape) != shape or noise.dtype != torch.float64:
        raise ValueError(
            f"{name} has shape {tuple(noise.shape)} and dtype {noise.dtype}; valid: a float64 tensor of shape {shape}"
        )
