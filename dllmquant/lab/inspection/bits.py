"""The activation bits that were allocated to the inputs of a checkpoint's layers."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from dllmquant.integrations.transformers import DLLMQuantConfig
from dllmquant.lab.inspection.structure import Structure, leaf_of, quantization_of
from dllmquant.lab.tables import aligned
from dllmquant.preparation import SiteBits

_LISTED_HEADS = 8  # of more heads than these the table tells how many have which bits


@dataclass(frozen=True)
class ActivationBits:
    """Activation bits that differ between the inputs of a model's layers.

    Invariant: `bits` has a row for every block and in it an entry for every site.

    Attributes:
        sites: Inputs of a block, each by the names of the layers that read it.
        bits: [blocks][sites], the bits of every head, or one number for the whole input; empty where the input is not
            quantized.
        mean: Mean bits per activation value.
    """

    sites: tuple[str, ...]
    bits: tuple[tuple[tuple[int, ...], ...], ...]
    mean: float


def checkpoint_bits(config: PretrainedConfig) -> ActivationBits | None:
    """Returns the activation bits of a checkpoint if they were allocated, else None.

    Raises:
        ValueError: The quantization configuration is malformed or names a layer the model does not have.
    """
    quantization = quantization_of(config)
    return None if quantization is None else activation_bits(Structure.of(config), quantization)


def mean_bits(allocation: Iterable[SiteBits], widths: Mapping[str, int]) -> float:
    """Returns the mean bits per activation value.

    Args:
        allocation: The bits of every unit, at least one.
        widths: Channels of every site; its units have equal shares of them.
    """
    entries = list(allocation)
    units = Counter(entry.site for entry in entries)
    shares = [widths[entry.site] / units[entry.site] for entry in entries]
    return sum(entry.bits * share for entry, share in zip(entries, shares, strict=True)) / sum(shares)


def activation_bits(structure: Structure, quantization: DLLMQuantConfig) -> ActivationBits | None:
    """Returns the bits a configuration says were allocated; None if there was no allocation."""
    if not quantization.allocation:
        return None
    where = {
        f"{block}.{leaf}": (row, column)
        for row, block in enumerate(structure.blocks)
        for column, site in enumerate(structure.sites)
        for leaf in site
    }
    entries, units = [], {}
    for stored in quantization.allocation:
        try:
            entry = SiteBits(**stored)
            if entry.site not in where or type(entry.bits) is not int:
                raise ValueError(f"the model has no site {entry.site!r} of {entry.bits!r} bits")
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config.allocation is malformed: {error}") from error
        entries.append(entry)
        units[(*where[entry.site], entry.unit)] = entry.bits
    bits = tuple(
        tuple(
            tuple(width for (at, of, _), width in units.items() if (at, of) == (row, column))
            for column in range(len(structure.sites))
        )
        for row in range(len(structure.blocks))
    )
    widths = {entry.site: structure.linears[entry.site].in_features for entry in entries}
    sites = tuple("+".join(map(leaf_of, site)) for site in structure.sites)
    return ActivationBits(sites, bits, mean_bits(entries, widths))


def bits_text(bits: Sequence[int]) -> str:
    """The bits of one site, for people: those of every head, or of many heads how many have which."""
    if len(bits) <= _LISTED_HEADS:
        return "/".join(map(str, bits)) or "-"
    return " ".join(f"{count}×{width}" for width, count in sorted(Counter(bits).items()))


def bits_table(bits: ActivationBits) -> str:
    """A row for every block, a column for every input."""
    heads = "; several numbers: head by head" if any(len(entry) > 1 for row in bits.bits for entry in row) else ""
    rows = [[str(index), *map(bits_text, row)] for index, row in enumerate(bits.bits)]
    title = f"activation bits by block and input, mean {round(bits.mean, 3)}{heads}"
    return f"{title}\n{aligned(['block', *bits.sites], rows)}"
