"""What happens before solving, on the full-precision path: transforms, attention interaction, activation bits.

fold rotations (QuaRot) ─▶ per block: interaction ─▶ scales (SmoothQuant, AWQ) ─▶ input transforms ─▶ site errors
                                                                          knapsack over all sites (IA-AQ) ◀─┘
"""

from dllmquant.preparation.bits import SiteBits
from dllmquant.preparation.interaction import block_token_weights
from dllmquant.preparation.walk import Preparation, prepare

__all__ = ["Preparation", "SiteBits", "block_token_weights", "prepare"]
