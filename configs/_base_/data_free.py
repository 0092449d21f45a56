# What all bases share: quantization without data. `recipe` names the bits and `preset` how
# much is done; what a config or --cfg-options says in `quantization`, `synthesis`,
# `calibration` and `evolution` changes them (docs/configuration.md).
preset = 'default'  # or 'fast': half of the steps; 'paper': the game of the paper
custom_hooks = [dict(type='psaq_mm.QuantizedCheckpointHook')]  # loads quantized.pth
