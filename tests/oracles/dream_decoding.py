"""Dream's published sampling loop, slowly: one prompt, float64, lists, no padding, every step run whether it commits.

Written from the published algorithm, not from the package. The model is any function from a list of token ids to a
list (per position) of lists (per vocabulary entry) of logits that are aligned already. `forbid_mask` adds the package's
rule that the mask token is never a candidate; without it the loop is Dream's own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Model = Callable[[list[int]], list[list[float]]]
Noise = Callable[[int], list[float]]


@dataclass
class Step:
    ids: list[int]
    confidence: list[float]
    committed: list[int]


@dataclass
class Run:
    """`steps` are those that committed something; `model_calls` counts all."""

    tokens: list[int]
    steps: list[Step]
    model_calls: int


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def distribution(logits: list[float], temperature: float, top_p: float | None, top_k: int | None) -> list[float]:
    """What a token is drawn from."""
    values = [value / temperature for value in logits] if temperature > 0 else list(logits)
    if top_p is not None and top_p < 1:
        probabilities = softmax(values)
        ranked = sorted(range(len(values)), key=lambda v: -values[v])
        reached = 0.0
        for v in ranked:
            if reached > top_p:
                values[v] = -math.inf
            reached += probabilities[v]
    if top_k is not None:
        last = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        values = [value if value >= last else -math.inf for value in values]
    return softmax(values)


def surety(probabilities: list[float], token: int, alg: str) -> float:
    if alg == "maskgit_plus":
        return probabilities[token]
    if alg == "topk_margin":
        first, second = sorted(probabilities, reverse=True)[:2]
        return first - second
    return sum(p * math.log(p + 1e-10) for p in probabilities)


def decode(  # noqa: C901 - one long loop on purpose
    model: Model,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    steps: int,
    eps: float = 1e-3,
    remasking: str = "origin",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    remasking_temperature: float = 0.0,
    noise: Noise | None = None,
    forbid_mask: bool = True,
) -> Run:
    """Decode one prompt; `noise(n)` gives a random number for each of n masked positions whenever one is needed."""
    x = list(prompt) + [mask_id] * gen_length
    record: list[Step] = []
    calls = 0
    for i in range(steps):
        t = 1 - i * (1 - eps) / steps
        s = 1 - (i + 1) * (1 - eps) / steps
        masked = [j for j in range(len(x)) if x[j] == mask_id]
        logits = [list(row) for row in model(list(x))]
        calls += 1
        if forbid_mask:
            for row in logits:
                row[mask_id] = -math.inf

        if remasking == "origin":
            assert noise is not None
            share = 1 - s / t if i < steps - 1 else 1.0
            chosen = [j for j, u in zip(masked, noise(len(masked)), strict=True) if u < share]
            count = len(chosen)
        else:
            count = int(len(masked) * (1 - s / t)) if i < steps - 1 else len(masked)
        if count == 0:
            continue

        candidate = [row.index(max(row)) for row in logits]
        drawn_from = {j: distribution(logits[j], temperature, top_p, top_k) for j in masked}
        if temperature > 0:
            assert noise is not None
            for j, u in zip(masked, noise(len(masked)), strict=True):
                reached, token = 0.0, 0
                for v, p in enumerate(drawn_from[j]):
                    reached += p
                    if reached > u:
                        token = v
                        break
                candidate[j] = token
        if remasking != "origin":
            score = {j: surety(drawn_from[j], candidate[j], remasking) for j in masked}
            if remasking_temperature > 0:
                assert noise is not None
                for j, u in zip(masked, noise(len(masked)), strict=True):
                    score[j] = score[j] / remasking_temperature - math.log(-math.log(u))
            chosen = sorted(masked, key=lambda j: -score[j])[:count]

        confidence = [softmax(row)[token] for row, token in zip(logits, candidate, strict=True)]
        record.append(Step(list(x), confidence, sorted(chosen)))
        for j in chosen:
            x[j] = candidate[j]
    return Run(x[len(prompt) :], record, calls)
