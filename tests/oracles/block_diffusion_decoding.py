"""The published loops of SDAR, LLaDA2 and Fast-dLLM v2, slowly: one prompt, float64, lists, no padding, no cache.

Written from the published algorithms, not from the package. The model is any function from a list of token ids to a
list (per position) of lists (per vocabulary entry) of logits, aligned or, for Fast-dLLM v2, those of the next token; it
attends by blocks. Where the loops differ from the published ones: the mask token is never a candidate, the canvas ends
with the generation, and a share of the schedule never reaches beyond what is masked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

Model = Callable[[list[int]], list[list[float]]]
Noise = Callable[[int], list[float]]


@dataclass
class Step:
    ids: list[int]
    confidence: list[float]
    committed: list[int]
    block: int


@dataclass
class Run:
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [weight / sum(weights) for weight in weights]


def distribution(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """What a token is drawn from: tempered, then the best k, then the best that reach p."""
    values = [value / temperature for value in logits] if temperature > 0 else list(logits)
    if top_k is not None:
        last = sorted(values, reverse=True)[min(top_k, len(values)) - 1]
        values = [value if value >= last else -math.inf for value in values]
    if top_p is not None and top_p < 1:
        probabilities = softmax(values)
        reached = 0.0
        for v in sorted(range(len(values)), key=lambda v: -probabilities[v]):
            if reached > top_p:
                values[v] = -math.inf
            reached += probabilities[v]
    return softmax(values)


def draw(probabilities: list[float], number: float) -> int:
    reached = 0.0
    for token, probability in enumerate(probabilities):
        reached += probability
        if reached > number:
            return token
    raise AssertionError("probabilities do not sum to 1")


def shares(length: int, steps: int) -> list[int]:
    return [length // steps + (1 if i < length % steps else 0) for i in range(steps)]


def look(model: Model, x: list[int], mask_id: int, *, shifted: bool) -> list[list[float]]:
    """Aligned logits of the canvas, without the mask token."""
    rows = [list(row) for row in model(list(x))]
    if shifted:
        rows = [rows[0], *rows[:-1]]
    for row in rows:
        row[mask_id] = -math.inf
    return rows


def write(
    run: Run, x: list[int], chosen: dict[int, int], proposed: list[int], rows: list[list[float]], block: int
) -> None:
    """Records a step and carries it out."""
    confidence = [softmax(row)[token] for row, token in zip(rows, proposed, strict=True)]
    run.steps.append(Step(list(x), confidence, sorted(chosen), block))
    for j, token in chosen.items():
        x[j] = token


def sdar(
    model: Model,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int,
    remasking: str = "low_confidence_dynamic",
    threshold: float = 0.85,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stops: tuple[int, ...] = (),
    noise: Noise | None = None,
) -> Run:
    """SDAR's `block_diffusion_generate`, which is LLaDA2's `generate` where it decodes dynamically."""
    run = Run()
    x = list(prompt) + [mask_id] * gen_length
    whole = len(prompt) // block_length
    for number in range(whole, math.ceil(len(x) / block_length)):
        columns = range(number * block_length, min((number + 1) * block_length, len(x)))
        for step in range(steps + 1):
            masked = [j for j in columns if x[j] == mask_id]
            if not masked:
                break
            rows = look(model, x, mask_id, shifted=False)
            proposed = [row.index(max(row)) for row in rows]
            drawn_from = {j: distribution(rows[j], temperature, top_k, top_p) for j in masked}
            if temperature > 0:
                assert noise is not None
                for j, u in zip(masked, noise(len(masked)), strict=True):
                    proposed[j] = draw(drawn_from[j], u)
            surety = {j: drawn_from[j][proposed[j]] for j in masked}
            share = min(shares(block_length, steps)[step], len(masked))
            if remasking == "sequential":
                chosen = masked[:share]
            else:
                chosen = sorted(masked, key=lambda j: -surety[j])[:share]
                confident = [j for j in masked if surety[j] > threshold]
                if remasking == "low_confidence_dynamic" and len(confident) >= share:
                    chosen = confident
            write(run, x, {j: proposed[j] for j in chosen}, proposed, rows, number - whole)
        if any(token in stops for token in x[len(prompt) :]):
            break
    run.tokens = x[len(prompt) :]
    return run


def fast_dllm(
    model: Model,
    prompt: list[int],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    sub_block_length: int,
    threshold: float = 0.9,
    temperature: float = 0.0,
    top_p: float | None = None,
    stops: tuple[int, ...] = (),
    noise: Noise | None = None,
) -> Run:
    """Fast-dLLM v2's `generate` without its second cache, sub-blocks of the last block cut off with it."""
    run = Run()
    x = list(prompt) + [mask_id] * gen_length
    whole = len(prompt) // block_length

    def stopped() -> bool:
        generated = x[len(prompt) :]
        ends = [j for j, token in enumerate(generated) if token in stops]
        return bool(ends) and mask_id not in generated[: ends[0]]

    for number in range(whole, math.ceil(len(x) / block_length)):
        begin, end = number * block_length, min((number + 1) * block_length, len(x))
        if x[begin] == mask_id:  # what the block before predicts, committed as soon as that is complete
            rows = look(model, x, mask_id, shifted=True)
            proposed = [row.index(max(row)) for row in rows]
            write(run, x, {begin: proposed[begin]}, proposed, rows, number - whole)
        for start in range(begin, end, sub_block_length):
            while not stopped():
                masked = [j for j in range(start, min(start + sub_block_length, end)) if x[j] == mask_id]
                if not masked:
                    break
                rows = look(model, x, mask_id, shifted=True)
                proposed = [row.index(max(row)) for row in rows]
                drawn_from = {j: distribution(rows[j], temperature, None, top_p) for j in masked}
                if temperature > 0:
                    assert noise is not None
                    for j, u in zip(masked, noise(len(masked)), strict=True):
                        proposed[j] = draw(drawn_from[j], u)
                surety = {j: drawn_from[j][proposed[j]] for j in masked}
                chosen = {j for j in masked if surety[j] > threshold}
                chosen.add(max(masked, key=lambda j: surety[j]))
                write(run, x, {j: proposed[j] for j in chosen}, proposed, rows, number - whole)
        if stopped():
            break
    run.tokens = x[len(prompt) :]
    return run
