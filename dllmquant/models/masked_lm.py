"""The outside of the families whose body lies in `model` and whose output head is `lm_head`, or the embedding."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from dllmquant.models.base import NativeModel
from dllmquant.models.layers import RMSNorm, expand_attention_mask


class NativeMaskedLM(NativeModel):
    """Embeds, runs the body, and applies the head to every position. Abstract: families derive from it.

    A family sets `model`, which maps embeddings [batch, length, hidden_size] and a mask to the last hidden state,
    normed, and `lm_head` unless the configuration ties it to the embedding.

    Attributes:
        embedding: Name of the token embedding in the body.
    """

    base_model_prefix = "model"
    _supports_sdpa = True
    embedding: ClassVar[str] = "embed_tokens"

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        found: nn.Module = getattr(self.model, self.embedding)
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        setattr(self.model, self.embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the output head: a linear layer, or the embedding itself when `tie_word_embeddings` is set."""
        head: nn.Module = self.get_input_embeddings() if self.config.tie_word_embeddings else self.lm_head
        return head

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Applies the head to the last hidden state [batch, length, hidden_size]."""
        head = self.get_output_embeddings()
        logits: Tensor = F.linear(hidden, head.weight) if isinstance(head, nn.Embedding) else head(hidden)
        return logits

    def visible(self, attention_mask: Tensor | None, embeds: Tensor) -> Tensor | None:
        """Turns a user's attention mask into the one of the blocks; here, every token sees every real one.

        Args:
            attention_mask: None, padding mask [batch, length], or bool [1 or batch, 1 or heads, length, length].
            embeds: Embeddings [batch, length, hidden_size].

        Returns:
            None, or bool broadcastable to [batch, heads, length, length], True where attended.

        Raises:
            ValueError: The mask has another shape, or a four-dimensional mask is not boolean.
        """
        return expand_attention_mask(attention_mask, embeds.shape[:2], self.config.num_attention_heads)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        use_cache: bool = False,
        **unused: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Computes the logits of every position.

        Args:
            input_ids: Token ids [batch, length]; exactly one of `input_ids` and `inputs_embeds`.
            attention_mask: Padding mask [batch, length], or bool [1 or batch, 1 or heads, length, length].
            inputs_embeds: Embeddings [batch, length, hidden_size].
            output_hidden_states: Whether to return the final (normed) hidden state.
            return_dict: Whether to return a `MaskedLMOutput` rather than a tuple.
            use_cache: Must be False: there are no caches.
            **unused: Must be empty.

        Returns:
            Logits [batch, length, vocab_size].

        Raises:
            ValueError: Both or neither kind of input, an unknown argument, a cache, or a mask of a wrong shape.
        """
        name = type(self).__name__
        if use_cache or any(value is not None for value in unused.values()):
            raise ValueError(f"{name} forward: unsupported arguments {sorted(unused)} (use_cache={use_cache})")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{name} forward: give exactly one of input_ids and inputs_embeds")
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = self.model(embeds, self.visible(attention_mask, embeds))
        output = MaskedLMOutput(
            logits=self.logits_of(hidden), hidden_states=(hidden,) if output_hidden_states else None
        )
        return output if return_dict else output.to_tuple()
