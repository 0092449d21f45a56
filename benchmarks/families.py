# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""All families: accuracy of the demo models, cost of a sample step at full size.

    python benchmarks/families.py                       # both tables
    python benchmarks/families.py --families upernet    # one family's rows

Accuracy: the small models of demo/, trained by demo/train.py, on the demo's
validation scenes: float, then W8A8 and W4A8 with ranges from data-free images
(one run for each seed) and, with the same quantizer, from 32 real training
images (others for each seed).

Cost: one step of the prior on one image, B=1, for each shipped config at full
size with random weights, against a plain forward and backward pass of the same
backbone; time interleaved in one process, memory in a process for each side.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from sample_step import sides_of
from timing import interleave, median_ratio, peak_memory_mib, pin, run_in_process, timing_parser
from torch import Tensor, nn

import psaq_mm
from psaq_mm.checkpoint import load_float_weights
from psaq_mm.engine import build_float_model, load_config, read_sections

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'demo'
sys.path.insert(0, str(DEMO))
DATA = DEMO / 'data'
TRAINING = DATA / 'families'  # a few scenes of the training split, beside all of them
REAL_IMAGES = 32

FAMILIES = dict(
    mask_rcnn=('mask_rcnn_swin_demo', {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}),
    cascade=('cascade_mask_rcnn_swin_demo',
             {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}),
    upernet=('upernet_swin_demo', {'mIoU': 'mIoU'}),
    swin=('swin_demo', {'accuracy/top1': 'top-1'}),
    deit=('deit_demo', {'accuracy/top1': 'top-1'}))
FULL_SIZE = [f'{family}_{size}' for family, sizes in (
    ('mask_rcnn_swin', 'ts'), ('retinanet_swin', 't'), ('cascade_mask_rcnn_swin', 'tsb'),
    ('upernet_swin', 'tsb'), ('deit', 'tsb'), ('swin', 'ts')) for size in sizes]


def evaluate(config: Config, model: nn.Module) -> Dict[str, float]:
    """Metrics of a model by the config's own data and evaluator."""
    loader = Runner.build_dataloader(copy.deepcopy(config.test_dataloader))
    evaluator = Evaluator(copy.deepcopy(config.test_evaluator))
    evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in loader:
            evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
    with contextlib.redirect_stdout(io.StringIO()):  # the tables of pycocotools
        metrics = evaluator.evaluate(len(loader.dataset))
    return {k: float(v) for k, v in metrics.items()}


def real_images(config: Config, model: nn.Module, number: int) -> Tensor:
    """The ``number``-th 32 training images, as the test pipeline prepares them."""
    loader: Any = copy.deepcopy(config.test_dataloader)
    dataset: ConfigDict = loader.dataset
    if 'root' in dataset:
        dataset.root = str(TRAINING / 'train_crops')
    else:
        dataset.data_root = f'{TRAINING}/'
        dataset.data_prefix = {k: v.replace('val', 'train')
                               for k, v in dataset.data_prefix.items()}
    if dataset.get('ann_file'):
        dataset.ann_file = 'train.json'
    data = Runner.build_dataloader(loader).dataset
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [data[i] for i in order[number * REAL_IMAGES:(number + 1) * REAL_IMAGES]]
    batch = dict(inputs=[c['inputs'] for c in chosen],
                 data_samples=[c['data_samples'] for c in chosen])
    with torch.no_grad():
        return model.data_preprocessor(batch, False)['inputs']


def cells(rows: List[Dict[str, float]], names: Dict[str, str]) -> str:
    """``name mean (each seed)`` for each metric, in points."""
    parts = []
    for key, name in names.items():
        scale = 100 if key.startswith('coco/') else 1
        values = [scale * row[key] for row in rows]
        each = f' ({", ".join(f"{v:.1f}" for v in values)})' if len(values) > 1 else ''
        parts.append(f'{name} {statistics.mean(values):.2f}{each}')
    return '; '.join(parts)


def load_preset(base: str) -> Dict[str, Any]:
    """The ``quantization`` section of a file in configs/_base_."""
    preset = Config.fromfile(str(ROOT / 'configs' / '_base_' / f'{base}.py'))
    return preset.quantization.to_dict()


def accuracy(family: str, seeds: Sequence[int], bases: Sequence[str], scope: str) -> None:
    """Print the rows of a family."""
    name, metrics = FAMILIES[family]
    config = load_config(DEMO / f'{name}_w8a8.py')
    sections = read_sections(config)
    presets = {base: load_preset(base) for base in bases}
    model = build_float_model(config)
    load_float_weights(model, str(DEMO / f'{name}.pth'))
    print(f'| {family} | float | | {cells([evaluate(config, model)], metrics)} |', flush=True)
    images = {}
    for seed in seeds:
        images['data-free', seed] = psaq_mm.synthesize(
            model, seed=seed, **dataclasses.asdict(sections.synthesis))
        images[f'{REAL_IMAGES} real', seed] = real_images(
            config, model, seeds.index(seed))
    for base in bases:
        for source in ('data-free', f'{REAL_IMAGES} real'):
            rows = []
            for seed in seeds:
                student = copy.deepcopy(model)
                psaq_mm.quantize(student, **dict(presets[base], scope=scope))
                psaq_mm.calibrate(student, images[source, seed])
                rows.append(evaluate(config, student))
            print(f'| {family} | {base.upper()} | {source} | {cells(rows, metrics)} |',
                  flush=True)


def full_size_sides(name: str) -> Dict[str, Any]:
    """The steps of a shipped config on one image of its default size."""
    torch.manual_seed(0)
    config = load_config(ROOT / 'configs' / f'{name}_w8a8.py')
    height, width = read_sections(config).synthesis.size
    sides = sides_of(build_float_model(config), torch.randn(1, 3, height, width))
    return {k: sides[k] for k in ('plain', 'sample')}


def main() -> None:
    parser = timing_parser(__doc__.split('\n')[0])
    parser.add_argument('--families', nargs='*', choices=sorted(FAMILIES), default=list(FAMILIES))
    parser.add_argument('--bases', nargs='+', default=['w8a8', 'w4a8'])
    parser.add_argument('--scope', choices=['backbone', 'model'], default='backbone')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--no-cost', action='store_true', help='leave out the second table')
    parser.add_argument('--memory-of', nargs=2, metavar=('SIDE', 'CONFIG'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    pin(args.core)
    if args.memory_of:
        work = full_size_sides(args.memory_of[1])[args.memory_of[0]]
        before = peak_memory_mib()
        for _ in range(2):
            work()
        print(peak_memory_mib() - before)
        return
    from scenes import render_split
    if args.families:
        render_split('val', DATA)
        render_split('train', TRAINING, REAL_IMAGES * max(3, len(args.seeds)))
        print(f'scope {args.scope}, seeds {args.seeds}: mean (each seed)\n')
        print('| model | bits | ranges from | metrics |\n|---|---|---|---|', flush=True)
    for family in args.families:
        accuracy(family, args.seeds, args.bases, args.scope)
    if args.no_cost:
        return
    print('\n| full-size config, one image | sample step, seconds | to a plain pass '
          '| peak MiB | to a plain pass |\n|---|---|---|---|---|')
    for name in FULL_SIZE:
        seconds = interleave(full_size_sides(name), args.rounds)
        memory = {side: float(run_in_process(__file__, '--core', str(args.core),
                                             '--memory-of', side, name)) for side in seconds}
        print(f'| {name} | {statistics.median(seconds["sample"]):.2f} '
              f'| {median_ratio(seconds, "sample", "plain"):.3f} | {memory["sample"]:.0f} '
              f'| {memory["sample"] / memory["plain"]:.3f} |', flush=True)


if __name__ == '__main__':
    main()
