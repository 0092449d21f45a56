# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One sample step on Swin-T against a plain forward and backward pass.

Sample step: teacher forward, patch similarity entropy of all 12 blocks,
backward to the image. Plain: forward, sum of the feature maps' squares,
backward to the image. Both with frozen random weights, one thread, pinned;
time interleaved in one process, peak memory above the loaded model in a
process for each side.

    OMP_NUM_THREADS=1 python benchmarks/sample_step.py
"""
import statistics
from typing import Callable, Dict

import torch
from mmdet.models.backbones import SwinTransformer
from timing import interleave, median_ratio, peak_memory_mib, pin, run_in_process, timing_parser
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.prior import PatchSimilarityPrior, PriorState

SIZES = {'4x224': (4, 224), '1x448': (1, 448)}


def sides_of(model: nn.Module, images: torch.Tensor) -> Dict[str, Callable[[], None]]:
    """The functions that take one step each: a plain pass, ours, and V1's density.

    Args:
        model (nn.Module): With a backbone that psaq_mm knows, or that alone.
        images (Tensor): Normalized, shape (B, C, H, W).
    """
    model.eval()
    model.requires_grad_(False)
    images = images.requires_grad_(True)
    adapter = find_adapter(model)
    generators = [torch.Generator().manual_seed(i) for i in range(len(images))]

    def plain() -> None:
        images.grad = None
        sum(f.pow(2).sum() for f in adapter.forward_backbone(model, images)).backward()

    def sample(term: PatchSimilarityPrior) -> None:
        images.grad = None
        with adapter.record_attention(model) as recorder:
            adapter.forward_backbone(model, images)
            state = PriorState(images=images, attention=recorder.pop_all(), generators=generators)
            term(state).sum().backward()

    binned, v1 = PatchSimilarityPrior(), PatchSimilarityPrior(form='v1')
    return dict(plain=plain, sample=lambda: sample(binned), v1=lambda: sample(v1))


def build_sides(batch: int, side: int) -> Dict[str, Callable[[], None]]:
    """Those of a Swin-T with random weights."""
    torch.manual_seed(0)
    model = SwinTransformer(drop_path_rate=0.)
    model.init_weights()
    return sides_of(model, torch.randn(batch, 3, side, side))


def main() -> None:
    parser = timing_parser(__doc__.split('\n')[0])
    parser.add_argument('--memory-of', nargs=2, metavar=('SIDE', 'SIZE'))
    args = parser.parse_args()
    pin(args.core)
    if args.memory_of:
        work = build_sides(*SIZES[args.memory_of[1]])[args.memory_of[0]]
        before = peak_memory_mib()
        for _ in range(2):
            work()
        print(peak_memory_mib() - before)
        return
    print('| images | step | seconds | time, ratio | peak MiB | memory, ratio |')
    print('|---|---|---|---|---|---|')
    for size, (batch, side) in SIZES.items():
        seconds = interleave(build_sides(batch, side), args.rounds)
        memory = {name: float(run_in_process(__file__, '--core', str(args.core),
                                             '--memory-of', name, size))
                  for name in seconds}
        for name in seconds:
            print(f'| {size} | {name} | {statistics.median(seconds[name]):.3f} '
                  f'| {median_ratio(seconds, name, "plain"):.3f} | {memory[name]:.0f} '
                  f'| {memory[name] / memory["plain"]:.3f} |', flush=True)


if __name__ == '__main__':
    main()
