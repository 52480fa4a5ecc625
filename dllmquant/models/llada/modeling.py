"""The LLaDA architecture for transformers 5: a bidirectional Llama-style transformer that predicts masked tokens.

Module names are those of the published checkpoints (`model.transformer.blocks.N.q_proj`, ...), so their state dicts
load unchanged and without remote code. Positions are relative (RoPE), so left and right padding are equivalent.
"""

import math
import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from dllmquant.checkpoint import write_atomically
from dllmquant.models.llada.configuration import LLaDAConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` [..., size]; the result has `x`'s dtype."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_cos_sin(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the cosine and sine tables of RoPE, float32 [length, head_dim], each half repeated."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), 1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x` [batch, heads, length, head_dim] in float32 or wider and returns it in its own dtype."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class LLaDABlock(nn.Module):
    """One pre-norm block: bidirectional attention, then a SiLU-gated feed-forward layer."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.n_kv_heads = config.n_kv_heads
        self.head_dim = config.d_model // config.n_heads
        qkv_bias = config.include_bias or config.include_qkv_bias
        width, kv_width, hidden = config.d_model, self.n_kv_heads * self.head_dim, config.mlp_hidden_size
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.attn_out = nn.Linear(width, width, bias=config.include_bias)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, hidden, bias=config.include_bias)
        self.up_proj = nn.Linear(width, hidden, bias=config.include_bias)
        self.ff_out = nn.Linear(hidden, width, bias=config.include_bias)

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        split: Tensor = x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
        return split

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Maps the residual stream [batch, length, d_model] to the next one.

        Args:
            x: Residual stream.
            cos: RoPE cosines, float32 [length, head_dim].
            sin: RoPE sines, float32 [length, head_dim].
            attention_mask: None, or bool broadcastable to [batch, heads, length, length], True where attended.
        """
        h = self.attn_norm(x)
        q = apply_rotary(self._heads(self.q_proj(h), self.n_heads), cos, sin)
        k = apply_rotary(self._heads(self.k_proj(h), self.n_kv_heads), cos, sin)
        v = self._heads(self.v_proj(h), self.n_kv_heads)
        if self.n_kv_heads != self.n_heads:
            k = k.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
            v = v.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(-2))
        h = self.ff_norm(x)
        out: Tensor = x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))
        return out


class LLaDAModel(nn.Module):
    """The transformer body and its output matrix, under the published module names."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            }
        )
        if not config.weight_tying:
            self.transformer["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=config.include_bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns logits [batch, length, embedding_size] and the last hidden state for embeddings `x`."""
        config, body = self.config, self.transformer
        blocks, embedding = cast("nn.ModuleList", body["blocks"]), cast("nn.Embedding", body["wte"])
        if config.input_emb_norm:
            x = x * math.sqrt(config.d_model)
        cos, sin = rotary_cos_sin(x.shape[1], config.d_model // config.n_heads, config.rope_theta, x.device)
        for block in blocks:
            x = block(x, cos, sin, attention_mask=attention_mask)
        x = body["ln_f"](x)
        logits = F.linear(x, embedding.weight) if config.weight_tying else body["ff_out"](x)
        return (logits / math.sqrt(config.d_model) if config.scale_logits else logits), x


def expand_attention_mask(attention_mask: Tensor | None, ids_shape: torch.Size, n_heads: int) -> Tensor | None:
    """Turns a user's attention mask into what the attention needs.

    Args:
        attention_mask: None; a padding mask [batch, length] (nonzero = real token); or a bool mask [1 or batch, 1 or
            heads, length, length], True where attended (block-causal decoding).
        ids_shape: Shape [batch, length] of the inputs.
        n_heads: Number of query heads.

    Returns:
        None when no mask was given, else a bool mask broadcastable to [batch, heads, length, length].

    Raises:
        ValueError: The mask has another shape, or a four-dimensional mask is not boolean.
    """
    if attention_mask is None:
        return None
    if attention_mask.shape == ids_shape:
        return attention_mask.bool()[:, None, None, :]
    batch, length = ids_shape
    valid = {(b, h, length, length) for b in (1, batch) for h in (1, n_heads)}
    if tuple(attention_mask.shape) in valid:
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention_mask: 4-D masks must be bool (True = attended), got {attention_mask.dtype}")
        return attention_mask
    raise ValueError(
        f"attention_mask: shape {tuple(attention_mask.shape)} does not fit inputs {tuple(ids_shape)}; "
        f"valid: [batch, length] or bool [1 or batch, 1 or {n_heads} heads, length, length]"
    )


class LLaDAModelLM(PreTrainedModel):
    """LLaDA with its output head: predicts the token under every `[MASK]`, attending in both directions."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012 - declared so by the base class
    _supports_sdpa = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a checkpoint whose weights are exactly the model's; takes what `PreTrainedModel.from_pretrained` takes.

        Args:
            pretrained_model_name_or_path: Directory or hub id of the checkpoint.
            *args: As for `PreTrainedModel.from_pretrained`.
            **kwargs: As for `PreTrainedModel.from_pretrained`. With `ignore_mismatched_sizes=True`, weights of a wrong
                shape are initialised freshly instead of being an error.

        Returns:
            The model, or with `output_loading_info=True` the model and transformers' loading information.

        Raises:
            ValueError: Weights are missing from the checkpoint, have another shape, or do not belong to the model;
                the message names them.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        ignores_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        mismatched = () if ignores_sizes else info["mismatched_keys"]
        problems = [
            f"{problem}: {', '.join(sorted(names))}"
            for problem, names in (
                ("missing", info["missing_keys"]),
                ("unexpected", info["unexpected_keys"]),
                ("of another shape", [f"{name} {tuple(got)} (valid: {tuple(own)})" for name, got, own in mismatched]),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"checkpoint {pretrained_model_name_or_path}: its weights do not fit {cls.__name__} "
                f"as its config describes it; {'; '.join(problems)}"
            )
        return (model, info) if wants_info else model

    def save_pretrained(  # type: ignore[override] # everything but the directory is passed through by name
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Writes a checkpoint as `PreTrainedModel.save_pretrained` does, but an interrupted write is never read.

        Args:
            save_directory: Target directory; weights of an earlier checkpoint in it are replaced.
            **kwargs: As for `PreTrainedModel.save_pretrained`.
        """
        target, save = Path(save_directory), super().save_pretrained
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", target.name)
        write_atomically(target, lambda staging: save(staging, **kwargs))

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        embedding: nn.Module = self.model.transformer["wte"]
        return embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head: a linear layer, or the embedding itself when `weight_tying` is set."""
        head: nn.Module = self.model.transformer["wte" if self.config.weight_tying else "ff_out"]
        return head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        use_cache: bool = False,
        **unused: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Predicts the token at every position.

        Args:
            input_ids: Token ids [batch, length]; exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: Padding mask [batch, length], or bool [1 or batch, 1 or heads, length, length].
            inputs_embeds: Embeddings [batch, length, d_model].
            labels: Targets [batch, length], -100 where no loss is taken. Logits are not shifted.
            output_hidden_states: Whether to return the final (normed) hidden state.
            return_dict: Whether to return a `MaskedLMOutput` rather than a tuple.
            use_cache: Must be False: attention is bidirectional, so keys and values of a step do not survive it.
            **unused: Must be empty.

        Returns:
            Logits [batch, length, embedding_size], and the mean cross-entropy when labels are given.

        Raises:
            ValueError: Both or neither kind of input, an unknown argument, a cache, or a mask of a wrong shape.
        """
        if use_cache or any(value is not None for value in unused.values()):
            raise ValueError(f"LLaDA forward: unsupported arguments {sorted(unused)} (use_cache={use_cache})")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LLaDA forward: give exactly one of input_ids and inputs_embeds")
        embeds = self.model.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        mask = expand_attention_mask(attention_mask, embeds.shape[:2], self.config.n_heads)
        logits, hidden = self.model(embeds, mask)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        output = MaskedLMOutput(loss=loss, logits=logits, hidden_states=(hidden,) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()
