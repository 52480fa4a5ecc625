"""QuaRot (arXiv 2404.00456): rotations of the residual stream (R1) and of the values (R2), folded into the weights.

With R orthogonal and tokens as rows, the residual stream becomes x R: everything that writes to it is multiplied by R
from that side (E ← E R, W ← Rᵀ W, b ← Rᵀ b), everything that reads it undoes it (W ← W R). An RMS norm in between
commutes with R once its gain is 1, so gains are folded into the readers first. R is a random Hadamard: it spreads an
outlier channel evenly over all channels. The paper's R3 (queries and keys) and R4 (input of the down projection) act
while the model runs and are not here.

Choices where the paper is silent:
    1. Gain and rotation are multiplied in float64 and rounded once to the parameters' own dtype.
    2. R2 is the same in all heads and blocks, so it is right whatever key/value head a query head reads.
    3. Heads tied to the embedding are refused: the final norm's gain cannot be folded into one use of a shared matrix.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dllmquant.core.hadamard import random_hadamard
from dllmquant.models import ModelAdapter
from dllmquant.transforms.fold import linear_at

_ROWS = 1 << 14  # rows rotated at once; an embedding in float64 would not fit beside the model


@torch.no_grad()
def rotate_residual(model: nn.Module, adapter: ModelAdapter, *, seed: int = 0) -> None:
    """Rotates the residual stream in place (R1); what the model computes stays the same up to rounding.

    The residual's readers are the consumers of the norms in the adapter's `scale_pairs` and the head; its writers are
    the embedding and `residual_outputs`. After the call the gains of these norms are 1.

    Args:
        model: The model, with a head of its own.
        adapter: Its adapter.
        seed: Seed of the rotation.

    Raises:
        ValueError: The adapter lacks a field this needs, the head is tied to the embedding, a norm is not an RMS norm
            with a gain alone, a layer is not `nn.Linear`, a parameter is shared, a width is not the residual's, or
            there is no Hadamard matrix of that width. The model is then unchanged.
    """
    final_norm = _residual_fields(model, adapter)
    embedding = model.get_submodule(adapter.embedding).get_parameter("weight")
    width = embedding.shape[1]
    norms: list[Tensor] = []
    readers: list[tuple[Tensor, Tensor]] = []
    writers: list[nn.Linear] = []

    def add(norm: str, linears: Iterable[str]) -> None:
        gain = _rms_gain(model, norm, width)
        norms.append(gain)
        readers.extend((_checked(model, name, 1, width).weight, gain.double().clone()) for name in linears)

    for index, block in enumerate(adapter.block_list(model)):
        prefix = f"{adapter.blocks}.{index}."
        for producer, consumers in _norm_pairs(adapter, block):
            add(prefix + producer, (prefix + name for name in consumers))
        writers += [_checked(model, prefix + name, 0, width) for name in adapter.outputs(block)]
    add(final_norm, (adapter.head,))
    touched = [embedding, *norms, *(weight for weight, _ in readers), *(p for w in writers for p in w.parameters())]
    if len({parameter.data_ptr() for parameter in touched}) != len(touched):
        raise ValueError(f"{type(model).__name__}: layers share a parameter; each must own its weight to be rotated")

    rotation = random_hadamard(width, seed).to(embedding.device)
    _multiply(embedding, rotation)
    for weight, gain in readers:
        _multiply(weight, gain[:, None].to(rotation) * rotation)
    for writer in writers:
        _multiply_left(writer, rotation)
    for norm in norms:
        norm.fill_(1)


@torch.no_grad()
def rotate_values(model: nn.Module, adapter: ModelAdapter, *, seed: int = 0) -> None:
    """Rotates the values of every head in place (R2); what the model computes stays the same up to rounding.

    With P the softmax weights, P (V R) Rᵀ W_oᵀ = P V W_oᵀ: the value projection's rows (and bias) of each key/value
    head become Rᵀ W, the output projection's columns of each query head W R.

    Args:
        model: The model.
        adapter: Its adapter.
        seed: Seed of the rotation.

    Raises:
        ValueError: The adapter lacks `value_output` or `heads`, a layer is not `nn.Linear`, its width is not a whole
            number of heads, or there is no Hadamard matrix of a head's width. The model is then unchanged.
    """
    if adapter.value_output is None or adapter.heads is None:
        missing = "value_output" if adapter.value_output is None else "heads"
        raise ValueError(f"adapter {adapter.model_type!r}: {missing} is None; the values cannot be rotated without it")
    query_heads, value_heads = (int(getattr(model.config, key)) for key in adapter.heads)
    value_name, output_name = adapter.value_output
    pairs = []
    for index in range(len(adapter.block_list(model))):
        prefix = f"{adapter.blocks}.{index}."
        value, output = linear_at(model, prefix + value_name), linear_at(model, prefix + output_name)
        size = output.in_features // query_heads
        fused = value.out_features == (query_heads + 2 * value_heads) * size  # queries, keys and values, in that order
        if output.in_features % query_heads or not (fused or value.out_features == value_heads * size):
            raise ValueError(
                f"{prefix}{value_name} has {value.out_features} outputs, {output_name} {output.in_features} inputs; "
                f"valid: as many per head, with {value_heads} value and {query_heads} query heads"
            )
        pairs.append((value, output, value_heads * size))
    rotation = random_hadamard(pairs[0][1].in_features // query_heads, seed)
    for value, output, rows in pairs:
        _multiply_left(value, rotation, rows)
        _multiply(output.weight, rotation)


def _norm_pairs(adapter: ModelAdapter, block: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the (norm, consumers) pairs of a block."""
    return [pair for pair in adapter.pairs(block) if not isinstance(block.get_submodule(pair[0]), nn.Linear)]


def _residual_fields(model: nn.Module, adapter: ModelAdapter) -> str:
    """Returns the final norm, or says why there is nothing to rotate."""
    norm_pairs = _norm_pairs(adapter, adapter.block_list(model)[0])
    where = f"adapter {adapter.model_type!r}"
    if not norm_pairs:
        raise ValueError(f"{where}: scale_pairs names no norm; the residual cannot be rotated without its readers")
    if not adapter.residual_outputs:
        raise ValueError(f"{where}: residual_outputs is empty; the residual cannot be rotated without its writers")
    if adapter.final_norm is None:
        raise ValueError(
            f"{where}: final_norm is None; the residual cannot be rotated without the norm before the head"
        )
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        raise ValueError(
            "tie_word_embeddings: True in the model's config; valid: False. The final norm's gain cannot be folded "
            "into a head that is also the embedding; give the head its own copy first"
        )
    return adapter.final_norm


def _rms_gain(model: nn.Module, name: str, width: int) -> nn.Parameter:
    """Returns the gain of an RMS norm after trying the norm: only x / rms(x) · gain commutes with rotations."""
    norm = model.get_submodule(name)
    parameters = dict(norm.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].shape != (width,):
        described = ", ".join(f"{key} {tuple(p.shape)}" for key, p in parameters.items())
        raise ValueError(f"{name}: has parameters {described or 'none'}; valid: an RMS norm with one weight ({width},)")
    gain = parameters["weight"]
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(4, width, generator=generator, dtype=torch.float64)  # a mean that LayerNorm would remove
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * gain.double().cpu()
    got = norm(x.to(gain)).double().cpu()
    if not bool((got - expected).norm() <= 0.02 * expected.norm()):  # bfloat16 rounds to 0.4 %
        raise ValueError(f"{name}: {type(norm).__name__} does not compute x / rms(x) · weight; valid: an RMS norm")
    return gain


def _checked(model: nn.Module, name: str, axis: int, width: int) -> nn.Linear:
    """Returns a linear layer whose output (axis 0) or input (axis 1) has the residual's width."""
    linear = linear_at(model, name)
    if linear.weight.shape[axis] != width:
        raise ValueError(f"{name}: {linear.weight.shape[axis]} channels at the residual; the embedding has {width}")
    return linear


def _multiply(weight: Tensor, matrix: Tensor) -> None:
    """W ← W diag(M, M, …) in float64: as many M as fit the columns."""
    matrix = matrix.to(weight.device)
    for rows in weight.view(-1, len(matrix)).split(_ROWS):
        rows.copy_(rows.double() @ matrix)


def _multiply_left(linear: nn.Linear, matrix: Tensor, rows: int | None = None) -> None:
    """W ← diag(M, M, …)ᵀ W and b ← diag(M, M, …)ᵀ b in float64, over the last `rows` rows: as many M as fit them."""
    transposed = matrix.T.to(linear.weight.device)
    for parameter in linear.parameters():
        part = parameter if rows is None else parameter[-rows:]
        blocks = part.view(-1, len(matrix), parameter[0].numel())
        blocks.copy_(transposed @ blocks.double())
