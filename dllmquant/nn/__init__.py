"""Packed modules: bit packing, dynamic activation quantization, and the linear layer that combines them."""
