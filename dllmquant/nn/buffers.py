"""Modules whose buffers keep their dtype when a model is cast."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class FixedDtypeModule(nn.Module):
    """A module whose own buffers move with it but are never cast: codes and scales mean nothing in another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
