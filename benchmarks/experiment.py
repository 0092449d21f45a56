# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the accuracy benchmarks share: a trained model, its images from all
sources, students of all kinds, and what is measured on real test images."""
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import logging
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from torch import Tensor, nn

import psaq_mm
from psaq_mm import api
from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import load_float_weights, save_json
from psaq_mm.engine import build_float_model, load_config, read_sections
from psaq_mm.engine.test_size import test_size

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'demo'
BCCD = ROOT.parent / 'shared' / 'real' / 'bccd'
TRAINED = ROOT / 'work_dirs' / 'train'
"""Where demo/train.py leaves what is too large to be shipped."""

sys.path.insert(0, str(DEMO))

MODELS = dict(
    demo=(DEMO / 'mask_rcnn_swin_demo.py', DEMO / 'mask_rcnn_swin_demo.pth'),
    cascade=(DEMO / 'cascade_mask_rcnn_swin_demo.py', TRAINED / 'cascade_mask_rcnn_swin_demo'
             / 'cascade_mask_rcnn_swin_demo.pth'),
    upernet=(DEMO / 'upernet_swin_demo.py', DEMO / 'upernet_swin_demo.pth'),
    swin=(DEMO / 'swin_demo.py', DEMO / 'swin_demo.pth'),
    deit=(DEMO / 'deit_demo.py', DEMO / 'deit_demo.pth'),
    bccd=(BCCD / 'mask_rcnn_swin_bccd.py', BCCD / 'mask_rcnn_swin_bccd.pth'))

METRICS = {'coco/bbox_mAP': ('box AP', 100), 'coco/segm_mAP': ('mask AP', 100),
           'mIoU': ('mIoU', 1), 'accuracy/top1': ('top-1', 1), 'sqnr': ('SQNR', 1)}
"""Key to its name in tables and its factor to points (or decibel)."""

MIN_MAX = dict(observer=dict(type='MinMaxObserver'))
"""Of a role in ``quantization``: the naive range."""

NO_PATCH_SIMILARITY = dict(priors=dict(patch_similarity=None))
"""Of ``synthesis``: total variation alone. Its images have the label ``tv``."""

V1_FORM = dict(priors=dict(patch_similarity=dict(
    type='PatchSimilarityPrior', weight=1.0, form='v1', points=10)))
"""Of ``synthesis``: V1's form of the prior. Its images have the label ``v1``."""

TRAINING = DEMO / 'data' / 'families'
"""A few scenes of the training split, beside all of them."""


class Subject:
    """A float model with trained weights, and what is real about it.

    Args:
        name (str): In :data:`MODELS`.
        work_dir (Path): Where images are kept between runs.
        preset (str): Preset of settings. Defaults to ``default``.
    """

    def __init__(self, name: str, work_dir: Path, preset: str = 'default') -> None:
        file, checkpoint = MODELS[name]
        if not checkpoint.exists():
            sys.exit(f'{checkpoint} is not here' + (
                f': python demo/train.py demo/{file.name} --half trains it'
                if DEMO in file.parents else ': nothing to measure'))
        if name != 'bccd':
            from scenes import render_split
            render_split('val', DEMO / 'data')
            render_split('train', TRAINING, 96)
        self.name, self.work_dir = name, work_dir / name
        self.work_dir.mkdir(parents=True, exist_ok=True)
        config = self.work_dir / f'{name}_{preset}.py'
        config.write_text(f"_base_ = ['{file}', 'psaq_mm::_base_/w8a8.py']\n"
                          f"preset = '{preset}'\n")
        self.config = load_config(config)
        self.sections = read_sections(self.config)
        self.size = self.sections.synthesis.size
        if name in ('swin', 'deit'):
            self.size = (112, 112)
        self.model = build_float_model(self.config)
        load_float_weights(self.model, str(checkpoint))
        self.adapter = find_adapter(self.model)
        self.test_size = test_size(self.config)
        loader = Runner.build_dataloader(copy.deepcopy(self.config.test_dataloader))
        self._probe = [self.model.data_preprocessor(batch, False)['inputs']
                       for batch, _ in zip(loader, range(16))]
        self._features = [self._backbone(self.model, x) for x in self._probe]

    def _backbone(self, model: nn.Module, images: Tensor) -> List[Tensor]:
        with torch.no_grad():
            taps = self.adapter.forward_taps(model, images, ('backbone', )).taps
        return list(taps.values())

    def sqnr(self, student: nn.Module) -> float:
        """SQNR of the backbone's feature maps on real test images: the mean
        over stages, in decibel, over up to 16 batches of the test set."""
        signal = [0.] * len(self._features[0])
        noise = list(signal)
        for images, expected in zip(self._probe, self._features):
            for i, (a, b) in enumerate(zip(expected, self._backbone(student, images))):
                signal[i] += float(a.double().square().sum())
                noise[i] += float((a.double() - b.double()).square().sum())
        return statistics.mean(10 * math.log10(s / max(n, 1e-300))
                               for s, n in zip(signal, noise))

    def evaluate(self, student: nn.Module, metrics: bool = True) -> Dict[str, float]:
        """SQNR, and the metrics of the config's own evaluator on its test set."""
        found = {} if student is self.model else dict(sqnr=self.sqnr(student))
        if not metrics:
            return found
        loader = Runner.build_dataloader(copy.deepcopy(self.config.test_dataloader))
        evaluator = Evaluator(copy.deepcopy(self.config.test_evaluator))
        evaluator.dataset_meta = loader.dataset.metainfo
        with torch.no_grad():
            for batch in loader:
                evaluator.process(data_samples=student.test_step(batch), data_batch=batch)
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of pycocotools
            values = evaluator.evaluate(len(loader.dataset))
        return {**found, **{k: float(v) for k, v in values.items()}}

    def real_images(self, count: int, seed: int) -> Tensor:
        """Training images as the test pipeline prepares them, shape
        (count, C, H, W); another choice for each seed."""
        loader: Any = copy.deepcopy(self.config.test_dataloader)
        dataset: ConfigDict = loader.dataset
        if self.name == 'bccd':
            dataset.ann_file = 'train32.json'
        elif 'root' in dataset:
            dataset.root = str(TRAINING / 'train_crops')
        else:
            dataset.data_root = f'{TRAINING}/'
            dataset.data_prefix = {k: v.replace('val', 'train')
                                   for k, v in dataset.data_prefix.items()}
            if dataset.get('ann_file'):
                dataset.ann_file = 'train.json'
        data = Runner.build_dataloader(loader).dataset
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        chosen = [data[i] for i in order[:count].tolist()]
        batch = dict(inputs=[c['inputs'] for c in chosen],
                     data_samples=[c['data_samples'] for c in chosen])
        with torch.no_grad():
            return self.model.data_preprocessor(batch, False)['inputs']

    def noise(self, count: int, seed: int) -> Tensor:
        """Gaussian noise within the valid pixels."""
        lower, upper = self.adapter.valid_range(self.model)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, lower.shape[1], *self.size, generator=generator)
        return torch.minimum(torch.maximum(images, lower), upper)

    def synthetic(self, label: str, seed: int, **changes: Any) -> Tensor:
        """Images by the prior, kept in a file of that label.

        Args:
            label (str): Name of these settings.
            seed (int): Seed of the run.
            **changes: What differs from the preset's ``synthesis``.
        """
        file = self.work_dir / f'{label}_{seed}.pt'
        if not file.exists():
            start = time.perf_counter()
            settings = merged(dataclasses.asdict(self.sections.synthesis),
                              dict(image_size=self.size), changes)
            images = psaq_mm.synthesize(self.model, seed=seed, **settings)
            torch.save(dict(images=images, seconds=time.perf_counter() - start), file)
        saved = torch.load(file)
        self.seconds = saved['seconds']
        return saved['images']

    def student(self, images: Tensor, seed: int = 0, *,
                quantization: Optional[Mapping[str, Any]] = None,
                evolution: Optional[Mapping[str, Any]] = None,
                synthesis: Optional[Mapping[str, Any]] = None,
                real_size: bool = False) -> nn.Module:
        """A quantized copy of the model: calibrated, evolved, and with its last
        ranges at test size, as tools/quantize.py does it.

        Args:
            images (Tensor): To calibrate on, and to start the game with.
            seed (int): Of the game. Defaults to 0.
            quantization (Mapping, optional): Changes of the preset's section.
            evolution (Mapping, optional): The same; ``rounds=0`` for no game.
            synthesis (Mapping, optional): The same.
            real_size (bool): Whether the images have the test size already.
        """
        sections = self.config.to_dict()
        student = copy.deepcopy(self.model)
        psaq_mm.quantize(student, **merged(sections['quantization'], quantization or {}))
        psaq_mm.calibrate(student, images)
        rules = merged(sections['evolution'], evolution or {})
        if rules['rounds']:
            prior = merged(sections['synthesis'], dict(image_size=self.size), synthesis or {})
            psaq_mm.evolve(student, self.model, images, seed=seed, synthesis=prior, **rules)
        if self.test_size is not None and not real_size:
            learnt = bool(rules['rounds']) and rules['learn'] != 'weights'
            other_size = tuple(images.shape[-2:]) != tuple(self.test_size)
            if other_size or (rules['rounds'] and not learnt):
                api.refit(student, images, self.test_size, learnt)
        return student


def merged(*sections: Mapping[str, Any]) -> Dict[str, Any]:
    """Sections of a config, later ones over earlier ones, key by key."""
    result: Dict[str, Any] = {}
    for section in sections:
        for key, value in section.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both and 'type' not in value \
                else copy.deepcopy(value)
    return result


def base_of(setting: str) -> Dict[str, Any]:
    """The base of a setting such as ``w4a8``; widths that have none take the
    closest one that has."""
    base = ROOT / 'configs' / '_base_' / f'{setting}.py'
    if not base.exists():
        base = base.with_name('w4a4.py' if int(setting[3]) <= 4 else 'w4a8.py')
    return dict(Config.fromfile(str(base)).to_dict())


def bits_of(setting: str) -> Dict[str, Any]:
    """What a setting says of ``quantization``."""
    weight, activation = int(setting[1]), int(setting[3])
    return merged(base_of(setting)['quantization'],
                  dict(weight=dict(bits=weight), activation=dict(bits=activation)))


def rules_of(setting: str) -> Dict[str, Any]:
    """What a setting says of ``evolution``."""
    return dict(base_of(setting).get('evolution', {}))


class Results:
    """Measured values in a JSON file, so that a long run can be continued, and
    several can share what they measure.

    Args:
        file (Path): Written after each measurement.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: Dict[str, Dict[str, float]] = {}
        self._read()

    def _read(self) -> None:
        if self.file.exists():
            self.values.update(json.loads(self.file.read_text()))

    def has(self, *key: Any) -> bool:
        self._read()
        return '/'.join(map(str, key)) in self.values

    def add(self, found: Mapping[str, float], *key: Any) -> None:
        """Keep what was measured for a key, and show it."""
        name = '/'.join(map(str, key))
        self._read()
        self.values[name] = dict(found)
        save_json(self.values, self.file)
        shown = ', '.join(f'{METRICS[k][0]} {METRICS[k][1] * v:.2f}'
                          for k, v in found.items() if k in METRICS)
        print(f'{name}: {shown}, {found.get("seconds", 0):.0f} s', file=sys.stderr, flush=True)

    def fill(self, names: Iterable[str], settings: Iterable[str], scope: str,
             seeds: Iterable[int], measure: Callable[[str, str, str, int], Mapping[str, float]]) \
            -> None:
        """Measure what is not there yet: each name at each setting, seed by seed.

        Args:
            names (Iterable[str]): Rows or variants.
            settings (Iterable[str]): Such as ``w4a8``.
            scope (str): ``backbone`` or ``model``.
            seeds (Iterable[int]): Seeds of the runs.
            measure (Callable): Takes name, setting, scope and seed.
        """
        for seed, setting, name in itertools.product(seeds, settings, names):
            if not self.has(name, setting, scope, seed):
                self.add(measure(name, setting, scope, seed), name, setting, scope, seed)

    def over_seeds(self, seeds: Iterable[int], *key: Any) -> List[Dict[str, float]]:
        """Values of all seeds that are there."""
        names = ['/'.join(map(str, (*key, seed))) for seed in seeds]
        return [self.values[name] for name in names if name in self.values]


def cell(rows: List[Dict[str, float]], key: str) -> str:
    """Mean of a metric over seeds, in points, and its spread in brackets."""
    values = [METRICS[key][1] * row[key] for row in rows if key in row]
    if not values:
        return ''
    if len(values) == 1:
        return f'{values[0]:.1f}'
    return f'{statistics.mean(values):.2f} ({min(values):.1f} to {max(values):.1f})'


def quiet() -> None:
    """No log lines between the rows of a table."""
    logging.disable(logging.WARNING)
