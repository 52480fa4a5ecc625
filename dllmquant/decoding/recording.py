"""Recording the steps of one batch while it is decoded."""

import torch
from torch import Tensor

from dllmquant.decoding.trajectory import Trajectory


class Recorder:
    """Collects the steps of one batch on the CPU."""

    def __init__(self, length: int, prompt_lengths: list[int], gen_length: int, pad_token_id: int) -> None:
        self._length = length
        self._prompt_lengths = prompt_lengths
        self._gen_length = gen_length
        self._pad_token_id = pad_token_id
        self._entries: list[tuple[Tensor, ...]] = []

    def add(self, *entry: Tensor) -> None:
        """Keep (row, step, ids, mask, confidence, committed, block): ``[n]``, the middle four ``[n, length]``."""
        self._entries.append(tuple(value.cpu() for value in entry))

    def trajectory(self) -> Trajectory:
        """Everything added so far, by row and step."""
        row, step, ids, mask, confidence, committed, block = (
            torch.cat(values) for values in zip(*self._entries, strict=True)
        )
        table = (len(self._prompt_lengths), int(step.max()) + 1)

        def placed(values: Tensor, fill: int = 0) -> Tensor:
            tensor = torch.full((*table, *values.shape[1:]), fill, dtype=values.dtype)
            tensor[row, step] = values
            return tensor

        return Trajectory(
            ids=placed(ids, self._pad_token_id),
            mask=placed(mask),
            confidence=placed(confidence.to(torch.float32)),
            committed=placed(committed),
            block=placed(block, -1),
            valid=placed(torch.ones_like(row, dtype=torch.bool)),
            prompt_lengths=torch.tensor(self._prompt_lengths, dtype=torch.int64),
            gen_length=self._gen_length,
            pad_token_id=self._pad_token_id,
        )
