# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Size of quantized.pth against the float checkpoint, W8 and W4.

The quantized part is the packed integers, scales and zero points of all
quantized modules, against their float32 weights; the files are those written.

    python benchmarks/checkpoint_size.py
"""
import tempfile
from pathlib import Path

import torch
from experiment import BCCD, RANGES_ALONE, experiment, quiet
from mmengine.config import Config
from torch import nn

import psaq_mm
from psaq_mm.checkpoint import size_of_quantized
from psaq_mm.engine import build_float_model, load_config

ROOT = Path(__file__).resolve().parents[1]


def measure(name: str, model: nn.Module) -> None:
    """Print a row for each bit width."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(dict(state_dict=model.state_dict()), f'{folder}/float.pth')
        float_file = Path(folder, 'float.pth').stat().st_size
        for bits in (8, 4):
            recipe = experiment(f'w{bits}a8', 'backbone', RANGES_ALONE).recipe
            student = psaq_mm.quantize(model, recipe, images=torch.randn(1, 3, 64, 64))
            psaq_mm.save(student, f'{folder}/quantized.pth')
            file = Path(folder, 'quantized.pth').stat().st_size
            size = size_of_quantized(student)
            print(f'| {name} | W{bits} | {size["float_bytes"] / 1e6:.2f} '
                  f'| {size["stored_bytes"] / 1e6:.2f} '
                  f'| {size["stored_bytes"] / size["float_bytes"]:.4f} '
                  f'| {float_file / 1e6:.1f} | {file / 1e6:.1f} |', flush=True)


def main() -> None:
    quiet()
    print('| model | bits | float MB | quantized MB | ratio | float file MB | file MB |')
    print('|---|---|---|---|---|---|---|')
    configs = dict(demo=ROOT / 'demo' / 'mask_rcnn_swin_demo.py',
                   bccd=BCCD / 'mask_rcnn_swin_bccd.py')
    for name, path in configs.items():
        if path.exists():
            measure(name, build_float_model(load_config(path)))
    for size in 'ts':
        config: Config = load_config(ROOT / 'configs' / f'mask_rcnn_swin_{size}_w8a8.py')
        measure(f'Mask R-CNN Swin-{size.upper()}', build_float_model(config))


if __name__ == '__main__':
    main()
