"""Free-running evaluation on the held-out tasks, and paired comparison of two evaluations.

`math` and `code` are generated with the model's own sampler and scored by exact match: of the final answer (`math`),
of the whole output (`code`). `qa` takes the choice with the highest Monte Carlo likelihood
(`dllmquant.decoding.likelihood`); its choices have the same number of tokens, so no length correction is needed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import dllmquant
from dllmquant.decoding.likelihood import log_likelihoods
from dllmquant.generation import decode_completions, encode_prompts, generate_tokens
from dllmquant.integrations.transformers import recipe_and_protocol
from dllmquant.lab.statistics import PairedDifference, paired_difference, wilson_interval
from dllmquant.models import ModelAdapter, adapter_for
from dllmquant.models.inference import inference
from dllmquant.tasks import TASKS, take
from dllmquant.tasks.items import Item
from dllmquant.tasks.math import extract_answer

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ItemResult:
    """What the model did with one item.

    Attributes:
        task: Name of the task.
        key: What identifies the problem within the task.
        prompt: Text the model saw.
        reference: The right completion.
        completion: What the model generated, up to its EOS, or the choice it found most likely.
        correct: Whether that counts as right.
        exact: Whether the whole completion equals the reference, surrounding blanks aside.
        truncated: Whether a generation has no EOS: it may have been cut.
        steps: Denoising steps of a generation; 0 for items scored by likelihood.
    """

    task: str
    key: str
    prompt: str
    reference: str
    completion: str
    correct: bool
    exact: bool
    truncated: bool
    steps: int


@dataclass(frozen=True)
class TaskScore:
    """The results of one task in numbers.

    Attributes:
        n: Number of items.
        accuracy: Share of the items that are right.
        low: Lower end of the accuracy's 95% Wilson interval.
        high: Upper end of it.
        exact_match: Share of the items whose whole completion equals the reference.
        truncation_rate: Share of the generations without EOS; 0 for a task scored by likelihood.
        forward_passes: Calls of the model, each on a batch.
        seconds: Wall time of the model's work.
        generated_tokens: Tokens of the generations, up to and including their first EOS.
        tokens_per_second: `generated_tokens / seconds`.
    """

    n: int
    accuracy: float
    low: float
    high: float
    exact_match: float
    truncation_rate: float
    forward_passes: int
    seconds: float
    generated_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: every item, the scores of every task, and what they depend on.

    Attributes:
        items: Results in the order of tasks and items.
        scores: Scores by task.
        sampler: The sampler settings the generations used, complete.
        metadata: Recipe and protocol of the model (None and its precision where it is not quantized), versions, git sha
            (None outside a checkout; with `-dirty` when tracked files differ from it), seed, limit, batch size, number
            of Monte Carlo samples, peak memory of the process in bytes (None where the platform does not tell).
    """

    items: tuple[ItemResult, ...]
    scores: dict[str, TaskScore]
    sampler: dict[str, Any]
    metadata: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns the evaluation as JSON-compatible values."""
        return {"format_version": FORMAT_VERSION, **asdict(self), "items": [asdict(item) for item in self.items]}

    def save(self, path: str | Path) -> None:
        """Writes the evaluation as a JSON file; an interrupted write leaves the file as it was."""
        path = Path(path)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as staging:
            partial = Path(staging) / path.name
            partial.write_text(text + "\n", encoding="utf-8")
            os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Reads a file that `save` wrote.

        Raises:
            ValueError: The file holds something else, or another version of the format.
            FileNotFoundError: There is no such file.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            version = document["format_version"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: not an evaluation; valid: a file written by Evaluation.save") from None
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version is {version!r}; valid: {FORMAT_VERSION}")
        try:
            return cls(
                items=tuple(ItemResult(**item) for item in document["items"]),
                scores={task: TaskScore(**score) for task, score in document["scores"].items()},
                sampler=dict(document["sampler"]),
                metadata=dict(document["metadata"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an evaluation ({error}); valid: a file written by Evaluation.save") from None


@dataclass(frozen=True)
class TaskDifference(PairedDifference):
    """A `PairedDifference` on the items of one task.

    Attributes:
        task: Name of the task.
    """

    task: str


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int = 200,
    seed: int = 0,
    batch_size: int = 64,
    mc_num: int = 128,
    progress: bool = True,
    **sampler: Any,
) -> Evaluation:
    """Measures a model on the held-out split of tasks.

    Args:
        model: A diffusion LLM of a registered family, quantized or not.
        tokenizer: Its tokenizer.
        tasks: Names of tasks, each once: "math", "code", "qa".
        limit: Items per task, at least 1.
        seed: Seed of the items, of the sampler's random numbers and of the likelihood's masks. Evaluations with one
            seed and limit hold the same items.
        batch_size: Sequences per forward pass; changes speed, not results, at temperature 0.
        mc_num: Masks drawn per choice for likelihoods.
        progress: Whether to show progress bars.
        **sampler: Settings of the family's sampler that override the checkpoint's defaults; None keeps the default.

    Raises:
        ValueError: A task is unknown or named twice, a number is out of range, the model is not a registered
            diffusion LLM or has no mask token for a task that needs one, a sampler setting is unknown or invalid, or
            the tokenizer has no EOS token.
    """
    _check(tasks, {"limit": limit, "batch_size": batch_size, "mc_num": mc_num})
    adapter = adapter_for(model)
    config = adapter.sampler_config(model.config, **sampler)
    check_mask_token(tasks, adapter)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: it has no EOS token, so generations have no end")
    items: list[ItemResult] = []
    scores: dict[str, TaskScore] = {}
    for task in tasks:
        problems = take(task, "heldout", limit, seed)
        if problems[0].choices:
            run = _choose(model, tokenizer, problems, mc_num=mc_num, seed=seed, batch_size=batch_size, bar=progress)
        else:
            options = {"batch_size": batch_size, "seed": seed, "progress": progress, **sampler}
            run = _generate(model, tokenizer, problems, options)
        items += _results(task, problems, run)
        scores[task] = _score(items[-limit:], run)
    recipe, protocol = recipe_and_protocol(model)
    metadata = {
        "recipe": recipe,
        "protocol": protocol,
        "dllmquant": dllmquant.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "git_sha": _git_sha(Path(dllmquant.__file__).resolve().parent.parent),
        "seed": seed,
        "limit": limit,
        "batch_size": batch_size,
        "mc_num": mc_num,
        "peak_memory_bytes": peak_memory(),
    }
    return Evaluation(tuple(items), scores, asdict(config), metadata)


def check_mask_token(tasks: Sequence[str], adapter: ModelAdapter) -> None:
    """Checks that a family has a mask token if a task is scored by likelihood.

    Raises:
        ValueError: It has none; the message names the tasks that are left.
    """
    scored = [task for task in TASKS if take(task, "heldout", 1)[0].choices]
    if adapter.mask_token_id is None and any(task in scored for task in tasks):
        raise ValueError(
            f"tasks: {', '.join(scored)} is scored by likelihood, for which {adapter.model_type} has no mask token; "
            f"valid: --tasks {','.join(task for task in TASKS if task not in scored)}"
        )


def compare(a: Evaluation, b: Evaluation) -> list[TaskDifference]:
    """Compares two evaluations item by item.

    Args:
        a: The baseline.
        b: The evaluation held against it; a positive difference means that b is better.

    Returns:
        One difference per task, in the order of a.

    Raises:
        ValueError: The evaluations do not hold the same items; the message names some that differ.
    """
    items_a, items_b = ({(item.task, item.key): item for item in run.items} for run in (a, b))
    for odd, where in (
        ([name for name in items_a if name not in items_b], "only in a"),
        ([name for name in items_b if name not in items_a], "only in b"),
        ([name for name in items_a if _text(items_a[name]) != _text(items_b.get(name))], "worded differently"),
    ):
        if odd:
            names = ", ".join(f"{task}: {key!r}" for task, key in odd[:3])
            raise ValueError(
                f"a and b hold different items: {len(odd)} {where}, such as {names}; "
                "valid: two evaluations with the same tasks, seed and limit"
            )
    differences = []
    for task in dict.fromkeys(item.task for item in a.items):
        pairs = [(item.correct, items_b[name].correct) for name, item in items_a.items() if item.task == task]
        paired = paired_difference([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        differences.append(TaskDifference(**asdict(paired), task=task))
    return differences


@dataclass(frozen=True)
class _Run:
    """A model's answers to the items of a task, in their order, and what they cost."""

    completions: list[str]
    truncated: list[bool]
    steps: list[int]
    forward_passes: int
    generated_tokens: int
    seconds: float


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Item], options: dict[str, Any]
) -> _Run:
    start = time.perf_counter()
    generation = generate_tokens(model, tokenizer, [item.prompt for item in problems], **options)
    seconds = time.perf_counter() - start
    ended = generation.tokens == tokenizer.eos_token_id
    before_end = ended.cumsum(dim=1) - ended.to(torch.int64) == 0  # the first EOS belongs to the generation
    return _Run(
        completions=decode_completions(tokenizer, generation),
        truncated=(~ended.any(dim=1)).tolist(),
        steps=generation.steps_used.tolist(),
        forward_passes=generation.forward_passes,
        generated_tokens=int(before_end.sum()),
        seconds=seconds,
    )


def _choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Item],
    *,
    mc_num: int,
    seed: int,
    batch_size: int,
    bar: bool,
) -> _Run:
    """Finds the most likely choice of every item; the choices of an item share their masks."""
    adapter = adapter_for(model)
    denoiser, calls = _counted(adapter.denoiser(model))
    prompts = encode_prompts(tokenizer, [item.prompt for item in problems])
    choices = [tokenizer(list(item.choices), add_special_tokens=False).input_ids for item in problems]
    owners = [owner for owner, ids in enumerate(choices) for _ in ids]
    pad = tokenizer.pad_token_id
    start = time.perf_counter()
    with inference(model, adapter.block_list(model)):
        likelihoods = log_likelihoods(
            denoiser,
            list(zip([prompts[owner] for owner in owners], [row for ids in choices for row in ids], strict=True)),
            mask_token_id=adapter.mask_id(model.config),
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            mc_num=mc_num,
            batch_size=batch_size,
            seed=seed,
            streams=owners,
            device=model.device,
            progress=bar,
        )
    seconds = time.perf_counter() - start
    best = [int(values.argmax()) for values in torch.split(likelihoods, [len(ids) for ids in choices])]
    return _Run(
        completions=[item.choices[index] for item, index in zip(problems, best, strict=True)],
        truncated=[False] * len(problems),
        steps=[0] * len(problems),
        forward_passes=len(calls),
        generated_tokens=0,
        seconds=seconds,
    )


def _counted(denoiser: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[Tensor, Tensor], Tensor], list[int]]:
    """The denoiser, and a list that grows by the batch size of each of its calls."""
    calls: list[int] = []

    def counted(ids: Tensor, attention_mask: Tensor) -> Tensor:
        calls.append(len(ids))
        return denoiser(ids, attention_mask)

    return counted, calls


def _results(task: str, problems: Sequence[Item], run: _Run) -> list[ItemResult]:
    results = []
    for item, completion, truncated, steps in zip(problems, run.completions, run.truncated, run.steps, strict=True):
        exact = completion.strip() == item.answer.strip()
        correct = extract_answer(completion) == extract_answer(item.answer) if task == "math" else exact
        results.append(
            ItemResult(task, item.key, item.prompt, item.answer, completion, correct, exact, truncated, steps)
        )
    return results


def _score(items: Sequence[ItemResult], run: _Run) -> TaskScore:
    n, correct = len(items), sum(item.correct for item in items)
    low, high = wilson_interval(correct, n)
    return TaskScore(
        n=n,
        accuracy=correct / n,
        low=low,
        high=high,
        exact_match=sum(item.exact for item in items) / n,
        truncation_rate=sum(item.truncated for item in items) / n,
        forward_passes=run.forward_passes,
        seconds=run.seconds,
        generated_tokens=run.generated_tokens,
        tokens_per_second=run.generated_tokens / run.seconds,
    )


def _text(item: ItemResult | None) -> tuple[str, str] | None:
    return None if item is None else (item.prompt, item.reference)


def _check(tasks: Sequence[str], counts: dict[str, int]) -> None:
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks is {tasks!r}; valid: a list of one or more of {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks: unknown {task!r}; valid: {', '.join(TASKS)}")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks is {list(tasks)}; valid: each task once")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; valid: an integer of at least 1")


def _git_sha(root: Path) -> str | None:
    """The commit of the checkout at `root`, or None if it is none or git cannot tell."""
    if not (root / ".git").exists():
        return None  # an installed package inside somebody else's repository
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> int | None:
    """Returns the largest resident size of this process so far, in bytes; None where the platform does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
