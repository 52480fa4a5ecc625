"""LLaDA's published sampling loop and Fast-dLLM's threshold rule, slowly: one prompt, float64, lists, no padding.

Written from the published algorithm, not from the package. The model is any function from a list of token ids to a
list (per position) of lists (per vocabulary entry) of logits. `forbid_mask` adds the package's rule that the mask token
is never a candidate; without it the loop is LLaDA's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Model = Callable[[list[int]], list[list[float]]]


@dataclass
class Step:
    ids: list[int]
    confidence: list[float]
    committed: list[int]
    block: int


@dataclass
class Run:
    tokens: list[int]
    steps: list[Step]
    model_calls: int


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def _argmax(values: list[float]) -> int:
    best = 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
    return best


def decode(  # noqa: C901 - one long loop on purpose
    model: Model,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int = 1,
    threshold: float | None = None,
    temperature: float = 0.0,
    noise: Callable[[int], list[list[float]]] | None = None,
    random_order: Callable[[int], list[float]] | None = None,
    cfg_scale: float = 0.0,
    never: tuple[int, ...] = (),
    late: tuple[int, ...] = (),
    forbid_mask: bool = True,
) -> Run:
    """Decode one prompt; `noise(n)` and `random_order(n)` give the random numbers of a step's n open positions."""
    x = list(prompt) + [mask_id] * gen_length
    record: list[Step] = []
    calls = 0
    num_blocks = gen_length // block_length
    for block in range(num_blocks):
        low = len(prompt) + block * block_length
        high = low + block_length
        steps_here = steps // num_blocks
        masked_at_start = sum(1 for j in range(low, high) if x[j] == mask_id)
        quota = [masked_at_start // steps_here] * steps_here
        for i in range(masked_at_start % steps_here):
            quota[i] += 1
        i = 0
        while any(x[j] == mask_id for j in range(low, high)):
            logits = [list(row) for row in model(list(x))]
            calls += 1
            if cfg_scale > 0:
                blind = [mask_id] * len(prompt) + x[len(prompt) :]
                other = model(blind)
                calls += 1
                for j in range(len(x)):
                    for v in range(len(logits[j])):
                        logits[j][v] = other[j][v] + (cfg_scale + 1) * (logits[j][v] - other[j][v])
            for row in logits:
                for token in never:
                    row[token] = -math.inf
                if forbid_mask:
                    row[mask_id] = -math.inf

            candidate = [_argmax(row) for row in logits]
            opened = [j for j in range(low, high) if x[j] == mask_id]
            if temperature > 0:
                assert noise is not None
                for j, uniforms in zip(opened, noise(len(opened)), strict=True):
                    noisy = [
                        math.exp(value) / (-math.log(u)) ** temperature
                        for value, u in zip(logits[j], uniforms, strict=True)
                    ]
                    candidate[j] = _argmax(noisy)
            confidence = [_softmax(row)[token] for row, token in zip(logits, candidate, strict=True)]

            score = {}
            for j in opened:
                ranked = [-math.inf if v in late else value for v, value in enumerate(logits[j])]
                score[j] = 0.0 if candidate[j] in late else _softmax(ranked)[candidate[j]]
            if random_order is not None:
                score = dict(zip(opened, random_order(len(opened)), strict=True))

            order = sorted(opened, key=lambda j: -score[j])
            if threshold is None:
                chosen = order[: quota[i]]
            else:
                chosen = [j for place, j in enumerate(order) if place == 0 or score[j] >= threshold]
            record.append(Step(list(x), confidence, sorted(chosen), block))
            for j in chosen:
                x[j] = candidate[j]
            i += 1
    return Run(x[len(prompt) :], record, calls)
