"""The adapter registry: what the quantizer must know of a model family, as data.

Supporting a model takes one `ModelAdapter` and one call of `register_adapter`; nothing in the package changes:

    from dllmquant.models import ModelAdapter, register_adapter

    register_adapter(
        ModelAdapter(
            model_type="my_dllm",                               # config.model_type
            blocks="model.layers",                              # path of the block list
            linear_groups=(                                     # in execution order, relative to a block
                ("attn.q", "attn.k", "attn.v"),                 # these share one input
                ("attn.o",),
                ("mlp.up",),
                ("mlp.down",),
            ),
            embedding="model.embed",
            head="lm_head",
            mask_token_id="mask_token_id",                      # a config key, or the id itself
        )
    )
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.decoding import (
    AnySamplerConfig,
    BlockDiffusionSamplerConfig,
    CachedDenoiser,
    Denoiser,
    Refiner,
    SamplerConfig,
)


@dataclass(frozen=True)
class Verification:
    """A way a family was verified, and the test that does it.

    Attributes:
        kind: "oracle": its logits equal an independent implementation's; "end-to-end": a tiny instance is quantized,
            saved, reloaded and generates; "published names": the full-size model has the names and shapes of the
            published weights, and every linear layer of its blocks is found.
        how: What was compared or done, in words.
        test: Where: a test file of the repository and a function in it, as pytest takes them.
    """

    kind: Literal["oracle", "end-to-end", "published names"]
    how: str
    test: str


@dataclass(frozen=True)
class ModelAdapter:
    """Where a model family keeps what quantization touches. All paths are exact; nothing is matched by substring.

    In paths relative to a block, a component "*" stands for every index of a module list, such as its experts. Layers
    that a block does not have are left out of it, group by group and pair by pair: the first blocks of a mixture model
    may be dense.

    Attributes:
        model_type: `config.model_type` of the family.
        blocks: Path of the `nn.ModuleList` of transformer blocks.
        linear_groups: Linear layers to quantize, relative to a block, in execution order; the members of a group read
            the same input tensor, so they share one Hessian. With "*", every index makes a group of its own.
        embedding: Path of the token embedding.
        head: Path of the output head (absent from models that tie it to the embedding).
        mask_token_id: The `[MASK]` id, or the name of the configuration key that holds it. None: the family has no mask
            token; masked positions hold uniformly random tokens.
        kept: Linear layers, relative to a block, that stay in 16 bits, such as routers. Every other one must be in
            `linear_groups`.
        eot_token: The token that ends a turn of a chat model, if the family has one beside EOS; used when the tokenizer
            knows it.
        logits_shift: 0 when logits at a position predict that position; 1 when they predict the next one (Dream).
        attention: "bidirectional" over prompt and canvas; "block_causal": to a token's own block and earlier ones; or
            "causal_context": bidirectional over the canvas, causal before it.
        site_names: Other names under which recipes may mean an input, each with the first layer of the group that reads
            it. The built-in recipes speak of LLaDA's layers.
        scale_pairs: (producer, consumers) relative to a block: norms or linear layers whose output channels can be
            scaled if the consumers' input channels are unscaled, without changing the function.
        residual_outputs: Linear layers, relative to a block, whose output is added to the residual stream.
        final_norm: Path of the norm before the head; it feeds nothing else.
        value_output: (value projection, output projection) of the attention, relative to a block. Where one projection
            makes queries, keys and values, the values are its last rows.
        heads: Configuration keys of the number of query heads and of key/value heads.
        arrange: Rearranges a model in place until all there is to quantize is an `nn.Linear`, without changing what it
            computes; called before a model is quantized, and before quantized weights are loaded.
        restore: Takes the state dict of an arranged model, all weights in floats, to that of the model before, without
            tied weights; may empty what it is given. Exports to plain weights need it where there is an `arrange`.
        denoise: (model, ids [B, L], attention mask [B, L]) -> aligned logits [B, L, V], where calling the model on the
            ids does not do.
        refine: The same for samplers that feed predictions back: (model, ids, attention mask, logits of the step
            before or None, columns wanted) -> logits [B, columns, V].
        sampler: The family's sampler and its default settings; `config.sampler_defaults` of a checkpoint overrides
            them.
        checkpoints: Hub ids of published checkpoints that belong to the family.
        verified: How the family was verified.
    """

    model_type: str
    blocks: str
    linear_groups: tuple[tuple[str, ...], ...]
    embedding: str
    head: str
    mask_token_id: str | int | None
    kept: tuple[str, ...] = ()
    eot_token: str | None = None
    logits_shift: Literal[0, 1] = 0
    attention: Literal["bidirectional", "block_causal", "causal_context"] = "bidirectional"
    site_names: tuple[tuple[str, str], ...] = ()
    scale_pairs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    residual_outputs: tuple[str, ...] = ()
    final_norm: str | None = None
    value_output: tuple[str, str] | None = None
    heads: tuple[str, str] | None = None
    arrange: Callable[[nn.Module], None] | None = None
    restore: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    denoise: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    refine: Callable[[nn.Module, Tensor, Tensor, Tensor | None, slice], Tensor] | None = None
    sampler: AnySamplerConfig = field(default_factory=SamplerConfig)
    checkpoints: tuple[str, ...] = ()
    verified: tuple[Verification, ...] = ()

    def validate(self, model: nn.Module) -> None:
        """Checks every path against `model`.

        Raises:
            ValueError: A path does not exist or is not of the expected kind; the message names it.
        """
        config = getattr(model, "config", None)
        blocks = self._resolve(model, self.blocks, "blocks")
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            raise ValueError(f"adapter {self.model_type!r}: blocks={self.blocks!r} is not a non-empty ModuleList")
        self._resolve(model, self.embedding, "embedding")
        if not getattr(config, "tie_word_embeddings", False):
            self._resolve(model, self.head, "head")
        if self.mask_token_id is not None:
            self.mask_id(config)
        self._validate_groups(blocks)
        self._validate_optional(model, blocks)

    def _validate_groups(self, blocks: nn.ModuleList) -> None:
        """Checks that every linear layer of the blocks is in one group, or kept, and that every group exists."""
        where = f"adapter {self.model_type!r}: linear_groups"
        mixture = any("*" in group[0] for group in self.linear_groups)  # whose first blocks may be dense
        listed: list[set[str]] = []
        found: set[str] = set()
        for index, block in enumerate(blocks):
            here = dict.fromkeys(site for site, _ in self.sites(block))
            listed.append({leaf for _, leaves in self.sites(block) for leaf in leaves})
            found.update(here)
            for group in self.linear_groups:
                if group[0] not in here and not mixture:
                    raise ValueError(f"{where}: no module {f'{self.blocks}.{index}.{group[0]}'!r}")
        for group in self.linear_groups:
            if group[0] not in found:
                raise ValueError(f"{where}: no module {group[0]!r} in any block")
        for index, block in enumerate(blocks):
            kept = {leaf for pattern in self.kept for leaf in _matches(block, pattern)}
            for name, module in block.named_modules():
                path = f"{self.blocks}.{index}.{name}"
                if name in listed[index] and not isinstance(module, nn.Linear):
                    raise ValueError(f"{where}: {path!r} is a {type(module).__name__}, not nn.Linear")
                if isinstance(module, nn.Linear) and name not in listed[index] | kept:
                    raise ValueError(f"{where}: {path!r} is in no group; list it, or name it in `kept`")

    def _validate_optional(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        """Checks what only some transforms need, where it is named."""
        for field_name, patterns in (
            ("scale_pairs", [leaf for producer, consumers in self.scale_pairs for leaf in (producer, *consumers)]),
            ("residual_outputs", self.residual_outputs),
            ("kept", self.kept),
        ):
            for pattern in patterns:
                if not any(_matches(block, pattern) for block in blocks):
                    raise ValueError(f"adapter {self.model_type!r}: {field_name}: no module {pattern!r}")
        for leaf in self.value_output or ():
            self._resolve(blocks[0], leaf, "value_output")
        sites = [group[0] for group in self.linear_groups]
        for name, leaf in self.site_names:
            if leaf not in sites:
                raise ValueError(
                    f"adapter {self.model_type!r}: site_names: {name!r} is {leaf!r}; valid: {', '.join(sites)}"
                )
        if self.final_norm is not None:
            self._resolve(model, self.final_norm, "final_norm")
        for key in self.heads or ():
            if not isinstance(getattr(model.config, key, None), int):
                raise ValueError(f"adapter {self.model_type!r}: heads: config has no integer {key!r}")

    def _resolve(self, model: nn.Module, path: str, what: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"adapter {self.model_type!r}: {what}: no module {path!r} in the model") from error

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        """Returns the transformer blocks of `model`."""
        blocks = model.get_submodule(self.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def sites(self, block: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields a block's groups of linear layers in execution order, each with its site: the first name listed.

        Raises:
            ValueError: A block has only some layers of a group.
        """
        for pattern in self.linear_groups:
            for index in _indices(block, pattern[0]):
                group = tuple(_at(leaf, index) for leaf in pattern)
                present = [leaf for leaf in group if _has(block, leaf)]
                if present and len(present) < len(group):
                    missing = next(leaf for leaf in group if leaf not in present)
                    raise ValueError(
                        f"adapter {self.model_type!r}: linear_groups: a block has {present[0]!r} but no {missing!r}"
                    )
                if present:
                    yield pattern[0], group

    def pairs(self, block: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
        """Returns a block's `scale_pairs`: a producer with all consumers the block has."""
        found = []
        for producer, consumers in self.scale_pairs:
            for index in _indices(block, producer):
                leaf = _at(producer, index)
                readers = tuple(name for consumer in consumers for name in _matches(block, _at(consumer, index)))
                if readers and _has(block, leaf):
                    found.append((leaf, readers))
        return found

    def scalable(self, block: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
        """Returns `pairs`, and the value projection with its reader where every channel has one reader.

        Grouped value heads feed several channels of the attention output each, so these cannot be scaled one by one.
        """
        pairs = self.pairs(block)
        if self.value_output is not None:
            value, output = (block.get_submodule(name) for name in self.value_output)
            if value.out_features == output.in_features:
                pairs.insert(1, (self.value_output[0], (self.value_output[1],)))
        return pairs

    def outputs(self, block: nn.Module) -> list[str]:
        """Returns a block's `residual_outputs`."""
        return [leaf for pattern in self.residual_outputs for leaf in _matches(block, pattern)]

    def linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields (full path, module) of every quantizable linear layer, in execution order.

        Raises:
            ValueError: A block has only some layers of a group.
        """
        for index, block in enumerate(self.block_list(model)):
            for _, group in self.sites(block):
                for leaf in group:
                    yield f"{self.blocks}.{index}.{leaf}", block.get_submodule(leaf)

    def mask_id(self, config: Any) -> int:
        """Returns the id of the mask token.

        Raises:
            ValueError: The family has none, the configuration has no such key, or it holds no token id.
        """
        if self.mask_token_id is None:
            raise ValueError(
                f"adapter {self.model_type!r}: the family has no mask token, its masked positions hold random tokens; "
                "nothing that puts mask tokens into a text can be done with it"
            )
        if isinstance(self.mask_token_id, int):
            return self.mask_token_id
        value = getattr(config, self.mask_token_id, None)
        if not isinstance(value, int) or value < 0:
            raise ValueError(
                f"adapter {self.model_type!r}: config.{self.mask_token_id} is {value!r}, not a token id: "
                "without a mask token the model is not a masked diffusion LLM"
            )
        return value

    def sampler_config(self, config: Any, **overrides: Any) -> AnySamplerConfig:
        """Returns the sampler settings: the family's, then the checkpoint's own, then `overrides` that are not None.

        In block diffusion, the length of a block is the configuration's `block_length`, if it has one.

        Raises:
            ValueError: A setting is unknown, settings do not fit together, or blocks have another length than those the
                model attends by.
        """
        kind = type(self.sampler)
        known = tuple(setting.name for setting in fields(kind))
        settings = {name: getattr(self.sampler, name) for name in known}
        block_length = getattr(config, "block_length", None) if kind is BlockDiffusionSamplerConfig else None
        if block_length is not None:
            settings["block_length"] = block_length
        for source in (getattr(config, "sampler_defaults", None) or {}, overrides):
            for name, value in source.items():
                if name not in known:
                    raise ValueError(f"sampler setting {name!r} is unknown; valid: {', '.join(known)}")
                if value is not None:
                    settings[name] = value
        if block_length is not None and settings["block_length"] != block_length:
            raise ValueError(
                f"block_length is {settings['block_length']}; valid: {block_length}, by which the model attends"
            )
        return kind(**settings)

    def denoiser(self, model: PreTrainedModel) -> Denoiser:
        """Returns the function the samplers drive: (ids [B, L], attention mask [B, L]) -> logits [B, L, V].

        The logits are aligned: those at position j predict the token at position j. Where the model's own are shifted,
        nothing predicts the first token of a row; it keeps the logits of its own position, whatever padding precedes.
        """
        own = self.denoise
        if own is not None:
            return functools.partial(own, model)

        def denoise(ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=attention_mask).logits
            return _aligned(logits, attention_mask) if self.logits_shift else logits

        return denoise

    def cached_denoiser(self, model: PreTrainedModel) -> CachedDenoiser | None:
        """Returns what block diffusion drives to compute finished blocks once; None where there is no `open_cache`."""
        open_cache = getattr(model, "open_cache", None)
        return None if open_cache is None else CachedDenoiser(open_cache, self.logits_shift)

    def refiner(self, model: PreTrainedModel) -> Refiner:
        """Returns the function that samplers with self-conditioning drive: see `refine`.

        Raises:
            ValueError: The family has none.
        """
        if self.refine is None:
            raise ValueError(f"adapter {self.model_type!r}: its sampler {type(self.sampler).__name__} needs `refine`")
        return functools.partial(self.refine, model)


def _has(block: nn.Module, path: str) -> bool:
    try:
        return block.get_submodule(path) is not None
    except AttributeError:
        return False


def _indices(block: nn.Module, pattern: str) -> list[str | None]:
    """Returns what the first "*" of a path stands for in a block; [None] for a path without one."""
    head, star, _ = pattern.partition(".*")
    if not star:
        return [None]
    return [name for name, _ in block.get_submodule(head).named_children()] if _has(block, head) else []


def _at(pattern: str, index: str | None) -> str:
    return pattern if index is None else pattern.replace("*", index, 1)


def _matches(block: nn.Module, pattern: str) -> list[str]:
    """Returns the paths of a block that a path with or without "*" stands for."""
    paths = [_at(pattern, index) for index in _indices(block, pattern)]
    return [path for path in paths if _has(block, path)]


def _aligned(logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Moves logits [B, L, V] that predict the next position to the position they predict."""
    real = attention_mask.bool()
    first = real.clone()
    first[:, 1:] &= ~real[:, :-1]
    aligned = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    aligned[first] = logits[first]
    return aligned


_ADAPTERS: dict[str, ModelAdapter] = {}


def register_adapter(adapter: ModelAdapter, *, replace: bool = False) -> None:
    """Makes a model family known to dllmquant.

    Args:
        adapter: The family's adapter.
        replace: Whether an adapter registered under the same `model_type` may be replaced.

    Raises:
        ValueError: The `model_type` is registered already and `replace` is False.
    """
    if adapter.model_type in _ADAPTERS and not replace:
        raise ValueError(f"an adapter for model_type {adapter.model_type!r} is registered; pass replace=True")
    _ADAPTERS[adapter.model_type] = adapter


def registered_adapters() -> dict[str, ModelAdapter]:
    """Returns the registered adapters by model type."""
    return dict(_ADAPTERS)


def adapter_for(model: nn.Module) -> ModelAdapter:
    """Returns the adapter of a model; whether it fits this very model is for `ModelAdapter.validate` to say.

    Raises:
        ValueError: The model's family is not registered.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _ADAPTERS:
        raise ValueError(
            f"model_type {model_type!r} ({type(model).__name__}) is not a known diffusion LLM; "
            f"known: {', '.join(sorted(_ADAPTERS))}. For your own model see dllmquant.models.register_adapter."
        )
    return _ADAPTERS[model_type]
