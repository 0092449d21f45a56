# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Simulated quantized forward of a Swin-T backbone against the float forward.

Ranges are fixed and weights frozen, random weights, one thread, pinned.

    OMP_NUM_THREADS=1 python benchmarks/quantized_forward.py
"""
import statistics

import torch
from experiment import RANGES_ALONE, experiment, quiet
from mmdet.models.backbones import SwinTransformer
from timing import interleave, median_ratio, pin, timing_parser

import psaq_mm


def main() -> None:
    args = timing_parser(__doc__.split('\n')[0]).parse_args()
    quiet()
    pin(args.core)
    torch.manual_seed(0)
    model = SwinTransformer(drop_path_rate=0.)
    model.init_weights()
    model.eval()
    recipe = experiment('w8a8', 'backbone', RANGES_ALONE).recipe
    print('| batch | float s | quantized s | ratio |\n|---|---|---|---|')
    for batch, side in ((4, 224), (1, 448)):
        images = torch.randn(batch, 3, side, side)
        student = psaq_mm.quantize(model, recipe, images=images)
        with torch.no_grad():
            seconds = interleave({'float': lambda x=images: model(x),
                                  'quantized': lambda x=images, s=student: s(x)}, args.rounds)
        print(f'| {batch} x {side} | {statistics.median(seconds["float"]):.3f} '
              f'| {statistics.median(seconds["quantized"]):.3f} '
              f'| {median_ratio(seconds, "quantized", "float"):.2f} |', flush=True)


if __name__ == '__main__':
    main()
