# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The whole default job on a full-size Mask R-CNN Swin-S with random weights.

Prints seconds per phase and peak memory, against the same number of plain
forward and backward passes of the backbone on the same images.

    python benchmarks/full_size.py --device cuda
    python benchmarks/full_size.py --device cpu --steps 2      # a short version
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from psaq_mm.engine import build_float_model, load_config, read_recipe
from psaq_mm.synthesis import sized_for

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'mask_rcnn_swin_s_w8a8.py'


def plain_passes(device: str, steps: int) -> None:
    """Print seconds and peak MiB of plain forward and backward passes."""
    config = load_config(CONFIG)
    model = build_float_model(config).to(device).requires_grad_(False)
    synthesis = sized_for(model, read_recipe(config).synthesis)
    images = torch.randn(synthesis.batch_size, 3, *synthesis.size, device=device,
                         requires_grad=True)
    start = time.perf_counter()
    for _ in range(steps):
        images.grad = None
        sum(f.pow(2).sum() for f in model.backbone(images)).backward()
    if device != 'cpu':
        torch.cuda.synchronize()
    print(json.dumps([time.perf_counter() - start, peak_mib(device)]))


def quantize(device: str, steps_per_phase: int) -> None:
    """Print the seconds of each phase and peak MiB of the tool's own run."""
    from psaq_mm.engine.runner import PSAQRunner
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(CONFIG, {'synthesis.steps': steps_per_phase,
                                      'log_level': 'WARNING'})
        config.work_dir = folder
        torch.manual_seed(0)
        model = build_float_model(config)
        runner = PSAQRunner.for_quantization(
            config, model, source=dict(file='random', sha256='random'), meta={}, device=device)
        runner.quantize()
        print(json.dumps([runner.pipeline.seconds, peak_mib(device)]))


def peak_mib(device: str) -> float:
    """Peak memory: of the GPU, or of this process."""
    if device != 'cpu':
        return torch.cuda.max_memory_allocated() / 2**20
    from timing import peak_memory_mib
    return peak_memory_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda')
    parser.add_argument('--steps', type=int, default=None,
                        help='steps in each phase (default: those of the config)')
    parser.add_argument('--side', choices=['plain', 'job'])
    args = parser.parse_args()
    synthesis = read_recipe(load_config(CONFIG)).synthesis
    steps = args.steps or synthesis.steps
    total = steps * len(synthesis.shifts) * -(-synthesis.num_images // synthesis.batch_size)
    if args.side == 'plain':
        plain_passes(args.device, total)
        return
    if args.side == 'job':
        quantize(args.device, steps)
        return
    results = {}
    for side in ('plain', 'job'):  # a process each: peak memory is per process
        out = subprocess.run([sys.executable, __file__, '--device', args.device, '--steps',
                              str(steps), '--side', side], check=True, stdout=subprocess.PIPE,
                             text=True).stdout
        results[side] = json.loads(out.strip().splitlines()[-1])
    seconds, peak = results['plain']
    print(f'{args.device}, {total} steps of {synthesis.batch_size} images')
    print('| | seconds | peak MiB |\n|---|---|---|')
    print(f'| plain passes | {seconds:.1f} | {peak:.0f} |')
    phases, peak = results['job']
    for name, value in phases.items():
        print(f'| {name} | {value:.1f} | |')
    print(f'| whole job | {sum(phases.values()):.1f} | {peak:.0f} |')
    print(f'synthesis / plain: {phases["synthesis"] / seconds:.3f}')


if __name__ == '__main__':
    main()
