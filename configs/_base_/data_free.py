# What all bases share: quantization without data. The preset fills in the sections
# `quantization`, `synthesis`, `evolution` and `calibration` (presets/*.py beside this
# file); what a config or --cfg-options says of them wins.
preset = 'default'  # or 'fast': half of the steps; 'evolve': the student learns too; 'paper'
custom_hooks = [dict(type='psaq_mm.QuantizedCheckpointHook')]  # loads quantized.pth
