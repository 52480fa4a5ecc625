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

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllmquant.decoding import AnySamplerConfig, Denoiser, SamplerConfig


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

    Attributes:
        model_type: `config.model_type` of the family.
        blocks: Path of the `nn.ModuleList` of transformer blocks.
        linear_groups: Linear layers to quantize, relative to a block, in execution order; the members of a group read
            the same input tensor, so they share one Hessian.
        embedding: Path of the token embedding.
        head: Path of the output head (absent from models that tie it to the embedding).
        mask_token_id: The `[MASK]` id, or the name of the configuration key that holds it.
        eot_token: The token that ends a turn of a chat model, if the family has one beside EOS; used when the tokenizer
            knows it.
        logits_shift: 0 when logits at a position predict that position; 1 when they predict the next one (Dream).
        attention: "bidirectional" over the whole canvas, or "block_causal".
        site_names: Other names under which recipes may mean an input, each with the first layer of the group that reads
            it. The built-in recipes speak of LLaDA's layers.
        scale_pairs: (producer, consumers) relative to a block: norms or linear layers whose output channels can be
            scaled if the consumers' input channels are unscaled, without changing the function.
        residual_outputs: Linear layers, relative to a block, whose output is added to the residual stream.
        final_norm: Path of the norm before the head; it feeds nothing else.
        value_output: (value projection, output projection) of the attention, relative to a block.
        heads: Configuration keys of the number of query heads and of key/value heads.
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
    mask_token_id: str | int
    eot_token: str | None = None
    logits_shift: Literal[0, 1] = 0
    attention: Literal["bidirectional", "block_causal"] = "bidirectional"
    site_names: tuple[tuple[str, str], ...] = ()
    scale_pairs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    residual_outputs: tuple[str, ...] = ()
    final_norm: str | None = None
    value_output: tuple[str, str] | None = None
    heads: tuple[str, str] | None = None
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
        self.mask_id(config)
        for producer, consumers in self.scale_pairs:
            for leaf in (producer, *consumers):
                self._resolve(blocks[0], leaf, "scale_pairs")
        self._validate_optional(model, blocks[0])
        for name, module in self.linears(model):
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"adapter {self.model_type!r}: linear_groups: {name!r} is a {type(module).__name__}, not nn.Linear"
                )

    def _validate_optional(self, model: nn.Module, block: nn.Module) -> None:
        """Checks what only some transforms need, where it is named."""
        for field_name, leaves in (("residual_outputs", self.residual_outputs), ("value_output", self.value_output)):
            for leaf in leaves or ():
                self._resolve(block, leaf, field_name)
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

    def linears(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields (full path, module) of every quantizable linear layer, in execution order.

        Raises:
            ValueError: A path does not exist.
        """
        for index in range(len(self.block_list(model))):
            for group in self.linear_groups:
                for leaf in group:
                    name = f"{self.blocks}.{index}.{leaf}"
                    yield name, self._resolve(model, name, "linear_groups")

    def mask_id(self, config: Any) -> int:
        """Returns the id of the mask token.

        Raises:
            ValueError: The configuration has no such key, or it holds no token id.
        """
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

        Raises:
            ValueError: A setting is unknown or settings do not fit together.
        """
        kind = type(self.sampler)
        known = tuple(setting.name for setting in fields(kind))
        settings = {name: getattr(self.sampler, name) for name in known}
        for source in (getattr(config, "sampler_defaults", None) or {}, overrides):
            for name, value in source.items():
                if name not in known:
                    raise ValueError(f"sampler setting {name!r} is unknown; valid: {', '.join(known)}")
                if value is not None:
                    settings[name] = value
        return kind(**settings)

    def denoiser(self, model: PreTrainedModel) -> Denoiser:
        """Returns the function the samplers drive: (ids [B, L], attention mask [B, L]) -> logits [B, L, V].

        The logits are aligned: those at position j predict the token at position j. Where the model's own are shifted,
        nothing predicts the first token of a row; it keeps the logits of its own position, whatever padding precedes.
        """

        def denoise(ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = model(input_ids=ids, attention_mask=attention_mask).logits
            return _aligned(logits, attention_mask) if self.logits_shift else logits

        return denoise


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
