"""DiffusionGemma: transformers' own model, rearranged so that its shared weights are quantized once."""
