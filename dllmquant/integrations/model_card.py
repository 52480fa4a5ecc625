"""The model card of a checkpoint: what it says of itself, as a page for people and for the Hub."""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from dllmquant.calibration import Cost
from dllmquant.checkpoint import weight_bytes
from dllmquant.core.coverage import Coverage
from dllmquant.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from dllmquant.integrations.transformers import DLLMQuantConfig

_TAGS = ("dllmquant", "quantization", "diffusion-language-model")
_SEAL = re.compile(r"\n<!-- Written by dllmquant, .* sha256:([0-9a-f]{64}) -->\n?\Z")


def model_card(
    model: PreTrainedModel,
    *,
    evaluation: Mapping[str, Mapping[str, float]] | None = None,
    tags: Iterable[str] = (),
    name: str | None = None,
) -> str:
    """Returns the model card of a quantized model: Markdown with YAML front matter.

    The last line holds a hash of all others, by which `is_generated` knows the card as ours.

    Args:
        model: The quantized model.
        evaluation: Results to tell: task -> metric -> number.
        tags: Tags beside those of every card.
        name: Hub id of the checkpoint, if it has one.

    Raises:
        ValueError: A result is not a finite number.
    """
    quantization: DLLMQuantConfig = model.config.quantization_config
    evaluation = {} if evaluation is None else evaluation
    _check_evaluation(evaluation)
    title = f"{(quantization.base_model or model.config.model_type).rpartition('/')[2]}-{_recipe_name(quantization)}"
    parts = [
        f"# {title}",
        _introduction(quantization),
        f"## Load\n\n{_loading(model, name)}",
        f"## What is stored\n\n{_stored(model, quantization)}",
        *([f"## Evaluation\n\n{_results(evaluation)}"] if evaluation else []),
        *([f"## Calibration states\n\n{_states(quantization)}"] if quantization.coverage else []),
        f"## Recipe\n\n```yaml\n{_recipe_text(quantization).rstrip()}\n```",
    ]
    fields: dict[str, Any] = {"tags": list(dict.fromkeys((*_TAGS, model.config.model_type, *tags)))}
    if quantization.base_model:
        fields |= {"base_model": quantization.base_model, "base_model_relation": "quantized"}
    if results := _eval_results(evaluation):
        fields |= {"model_name": title, "eval_results": results}
    data = ModelCardData(library_name="dllmquant", pipeline_tag="text-generation", **fields)
    body = "\n\n".join(parts)
    return _sealed(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")))


def is_generated(text: str) -> bool:
    """Whether a card is one of `model_card`, unedited."""
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def _sealed(text: str) -> str:
    note = "and replaced when the model is saved again, unless it was edited:"
    text = text.rstrip("\n") + "\n"
    return f"{text}\n<!-- Written by dllmquant, {note} sha256:{_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _recipe(quantization: "DLLMQuantConfig") -> Recipe | None:
    """The recipe, if this version of the library understands it: packed weights load and save without."""
    try:
        return Recipe.load(quantization.recipe)
    except RecipeError:
        return None


def _recipe_name(quantization: "DLLMQuantConfig") -> str:
    return str(quantization.recipe.get("name", "quantized"))


def _recipe_text(quantization: "DLLMQuantConfig") -> str:
    recipe = _recipe(quantization)
    return yaml.safe_dump(quantization.recipe) if recipe is None else recipe.to_yaml()


def _introduction(quantization: "DLLMQuantConfig") -> str:
    base, recipe = quantization.base_model, _recipe(quantization)
    of = f"[{base}](https://huggingface.co/{base})" if base else "A diffusion language model"
    by = f"{of}, quantized after training by dllmquant with the recipe `{_recipe_name(quantization)}`"
    return f"{by}: {recipe.summary()}." if recipe else f"{by}."


def _loading(model: PreTrainedModel, name: str | None) -> str:
    auto, remote = _auto_class(model), model.is_remote_code()
    options = ", trust_remote_code=True" if remote else ""
    lines = [
        "import dllmquant  # makes transformers read the packed weights; without it, loading is an error",
        f"from transformers import {', '.join(sorted((auto, 'AutoTokenizer')))}",
        "",
        f'path = "{name}"' if name else 'path = "path/to/this/checkpoint"',
        f"model = {auto}.from_pretrained(path{options})",
        f"tokenizer = AutoTokenizer.from_pretrained(path{options})",
        *([] if remote else ['print(dllmquant.generate(model, tokenizer, ["Once upon a time"]))']),
    ]
    return "\n".join(["```python", *lines, "```"])


def _auto_class(model: PreTrainedModel) -> str:
    """The automatic class that loads a model."""
    registered = getattr(model, "_auto_class", None)
    if registered is not None:
        return str(registered)
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
        known: Any = auto._model_mapping.get(type(model.config), ())
        if isinstance(model, known):
            return auto.__name__
    return AutoModel.__name__


def _stored(model: PreTrainedModel, quantization: "DLLMQuantConfig") -> str:
    recipe, size = _recipe(quantization), weight_bytes(model)
    rows = [
        *([("protocol", f"`{recipe.protocol}`")] if recipe else []),
        ("packed layers", f"{len(quantization.modules)}, {size.quantized_parameters:,} weights"),
        ("their bytes", f"{size.quantized_bytes:,}, {size.bytes_per_quantized_weight:.3f} per weight"),
        *([("bytes of attention scales", f"{size.attention_bytes:,}")] if size.attention_bytes else []),
        ("other parameters", f"{size.other_parameters:,} in {size.other_bytes:,} bytes"),
        ("bytes in all", f"{size.total_bytes:,}"),
        ("dllmquant", f"{quantization.library_version}, layout version {quantization.format_version}"),
        ("seed", str(quantization.seed)),
        ("calibration states, SHA-256", f"`{quantization.states_hash}`" if quantization.states_hash else "none"),
    ]
    return _table(("", ""), rows)


def _states(quantization: "DLLMQuantConfig") -> str:
    assert quantization.coverage is not None
    coverage = Coverage.from_dict(quantization.coverage)
    cost = "" if quantization.cost is None else f" They took {Cost.from_counts(quantization.cost).summary()}."

    def cell(segment: int, bucket: int) -> str:
        states = coverage.states[segment][bucket]
        return f"{states}" if coverage.recorded is None else f"{states} of {coverage.recorded[segment][bucket]}"

    edges = [f"{100 * bucket / coverage.buckets:.3g}" for bucket in range(coverage.buckets + 1)]
    header = ["segment", *(f"{low}-{high}% masked" for low, high in pairwise(edges))]
    rows = [
        [str(segment + 1), *(cell(segment, bucket) for bucket in range(coverage.buckets))]
        for segment in range(coverage.segments)
    ]
    counted = "states" if coverage.recorded is None else "states of those recorded"
    return f"{coverage.summary()}.{cost} Cells: {counted}.\n\n{_table(header, rows)}"


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def _check_evaluation(evaluation: Mapping[str, Mapping[str, float]]) -> None:
    valid = "valid: task -> metric -> finite number"
    for task, metrics in evaluation.items():
        if not isinstance(metrics, Mapping) or not metrics:
            raise ValueError(f"evaluation[{task!r}]: {metrics!r}; {valid}")
        for metric, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"evaluation[{task!r}][{metric!r}]: {value!r}; {valid}")


def _results(evaluation: Mapping[str, Mapping[str, float]]) -> str:
    metrics = list(dict.fromkeys(metric for results in evaluation.values() for metric in results))
    rows = [
        [task, *(_number(results[metric]) if metric in results else "" for metric in metrics)]
        for task, results in evaluation.items()
    ]
    return _table(["task", *metrics], rows)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _eval_results(evaluation: Mapping[str, Mapping[str, float]]) -> list[EvalResult]:
    """The results in the Hub's form, without counts."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=metric,
            metric_value=value,
        )
        for task, metrics in evaluation.items()
        for metric, value in metrics.items()
        if not isinstance(value, int)
    ]
