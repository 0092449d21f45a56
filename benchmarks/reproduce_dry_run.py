# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Would a full run start? Every shipped config, at full size, end to end.

For each config: a random checkpoint in the layout that its weights were
published in, tools/quantize.py with 2 sample steps, two images made up on the
spot in the layout of its dataset, tools/test.py on them. The metrics mean
nothing; that there are some means that everything fits together.

    python benchmarks/reproduce_dry_run.py            # all: an hour or two on a CPU
    python benchmarks/reproduce_dry_run.py upernet_swin_t_w8a8 deit_t_w4a8
"""
import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Tuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from published_layouts import to_swin_authors_classification, to_swin_authors_detection
from torch import Tensor, nn

from psaq_mm.engine import build_float_model, load_config

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(p.stem for p in (ROOT / 'configs').glob('*_w?a?.py'))


def random_state(model: nn.Module) -> Dict[str, Tensor]:
    """Weights of a model, with classifiers that are sure of something: with
    none of them over the score threshold nothing would be evaluated."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for key in state:
        if key.endswith(('fc_cls.weight', 'retina_cls.weight')):
            state[key] *= 30
        elif key.endswith('retina_cls.bias'):
            state[key].zero_()
    return state


def write_checkpoint(config: Config, name: str, folder: Path) -> Tuple[Path, str]:
    """A random checkpoint in a published layout.

    Returns:
        tuple: The file, and how the log must name the layout.
    """
    torch.manual_seed(0)
    model = build_float_model(config)
    state = random_state(model)
    if name.startswith(('deit', 'swin')):
        state = {k[len('model.'):]: v for k, v in state.items() if k.startswith('model.')}
        if name.startswith('swin_s'):
            torch.save(dict(model=to_swin_authors_classification(state)), folder / 'float.pth')
            return folder / 'float.pth', 'Swin authors (classification)'
        if name.startswith('deit_s'):  # as facebookresearch/deit publishes it
            torch.save(dict(model=state), folder / 'float.pth')
            return folder / 'float.pth', 'timm'
        from safetensors.torch import save_file
        save_file(state, str(folder / 'float.safetensors'))
        return folder / 'float.safetensors', 'timm'
    authors = name.startswith('cascade') or '_b_' in name
    if authors:
        state = to_swin_authors_detection(state)
    torch.save(dict(meta=dict(), state_dict=state), folder / 'float.pth')
    return folder / 'float.pth', 'Swin authors (mmdet 2' if authors else 'OpenMMLab'


def _scene(seed: int, height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def write_coco(config: Config, folder: Path) -> List[str]:
    """Two images with a box each; returns the options that point to them."""
    (folder / 'val2017').mkdir(parents=True)
    (folder / 'annotations').mkdir()
    from mmdet.datasets import CocoDataset
    categories = [dict(id=i + 1, name=n) for i, n in enumerate(CocoDataset.METAINFO['classes'])]
    images, annotations = [], []
    for index in (1, 2):
        cv2.imwrite(str(folder / 'val2017' / f'{index}.jpg'), _scene(index, 480, 640))
        images.append(dict(id=index, file_name=f'{index}.jpg', height=480, width=640))
        box = [100, 120, 200, 150]
        corners = [100, 120, 300, 120, 300, 270, 100, 270]
        annotations.append(dict(id=index, image_id=index, category_id=index, bbox=box,
                                area=30000, iscrowd=0, segmentation=[corners]))
    file = folder / 'annotations' / 'instances_val2017.json'
    file.write_text(json.dumps(dict(images=images, annotations=annotations,
                                    categories=categories)))
    return [f'test_dataloader.dataset.data_root={folder}/', f'test_evaluator.ann_file={file}']


def write_ade(config: Config, folder: Path) -> List[str]:
    """Two images with label maps; returns the options that point to them."""
    for part, suffix in (('images', '.jpg'), ('annotations', '.png')):
        (folder / part / 'validation').mkdir(parents=True)
        for index in (1, 2):
            pixels = _scene(index, 384, 512)
            if part == 'annotations':
                pixels = pixels[..., 0] % 151
            cv2.imwrite(str(folder / part / 'validation' / f'{index}{suffix}'), pixels)
    return [f'test_dataloader.dataset.data_root={folder}']


def write_imagenet(config: Config, folder: Path) -> List[str]:
    """Two images in two of 1000 class folders."""
    for index in range(1000):
        (folder / f'n{index:08d}').mkdir(parents=True)
    for index in (1, 2):
        name = folder / f'n{index:08d}' / f'{index}.JPEG'
        assert cv2.imwrite(str(name), _scene(index, 300, 400))
    return [f'test_dataloader.dataset.root={folder}']


def call(tool: str, *arguments: str) -> Tuple[float, str]:
    """Run a tool; seconds, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(ROOT / 'tools' / tool), *arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f'{tool} {" ".join(arguments)}: status {done.returncode}\n'
                           f'{done.stdout[-3000:]}')
    return time.perf_counter() - start, done.stdout


def dry_run(name: str, folder: Path) -> str:
    """Quantize and evaluate one shipped config; a row of the table.

    Raises:
        RuntimeError: If a tool fails, or the metrics are not as they must be.
    """
    path = ROOT / 'configs' / f'{name}.py'
    config = load_config(path)
    checkpoint, layout = write_checkpoint(config, name, folder)
    if name.startswith('upernet'):
        options, metric = write_ade(config, folder / 'data'), 'mIoU'
    elif name.startswith(('deit', 'swin')):
        options, metric = write_imagenet(config, folder / 'data'), 'accuracy/top1'
    else:
        options = write_coco(config, folder / 'data')
        metric = 'coco/bbox_mAP' if name.startswith('retinanet') else 'coco/segm_mAP'
    quantize, log = call(
        'quantize.py', str(path), str(checkpoint), '--work-dir', str(folder), '--cfg-options',
        'synthesis.num_images=1', 'synthesis.steps=1', 'evolution.rounds=1',
        'evolution.sample_steps=1', 'evolution.student_steps=1', 'evolution.batch_size=1')
    if f'layout of the weights: {layout}' not in log:
        raise RuntimeError(f'{name}: the log does not name the layout {layout}:\n{log[-3000:]}')
    test, _ = call(
        'test.py', str(path), str(folder / 'quantized.pth'), '--work-dir', str(folder),
        '--metrics', str(folder / 'metrics.json'), '--cfg-options',
        'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False', *options)
    metrics = json.loads((folder / 'metrics.json').read_text())['metrics']
    if not math.isfinite(metrics.get(metric, math.nan)):
        raise RuntimeError(f'{name}: no {metric} in {metrics}')
    return f'| {name} | {layout.rstrip("(")} | {quantize:.0f} | {test:.0f} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', metavar='NAME',
                        help='names of shipped configs (default: all)')
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in SHIPPED]
    if unknown:
        parser.error(f'no shipped config is called {", ".join(unknown)}')
    print('| config | layout of the weights | seconds to quantize | to test |')
    print('|---|---|---|---|', flush=True)
    for name in args.names or SHIPPED:
        with tempfile.TemporaryDirectory() as folder:
            print(dry_run(name, Path(folder)), flush=True)


if __name__ == '__main__':
    main()
