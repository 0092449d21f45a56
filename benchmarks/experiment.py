# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the accuracy benchmarks share: a trained model, its images from all
sources, students of all kinds, and what is measured on real test images."""
import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
)

import torch
import torch.nn.functional as F
from agreement import Detections, agreement_ap, detections_of
from mmengine.config import ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from torch import Tensor, nn

import psaq_mm
from psaq_mm import Recipe, SynthesisSettings
from psaq_mm.adapters import Adapter, find_adapter
from psaq_mm.adapters.tested_size import tested_size
from psaq_mm.checkpoint import load_float_weights, save_json
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.pipeline import Pipeline
from psaq_mm.recipe.quantization import BUDGETS
from psaq_mm.synthesis import sized_for

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'demo'
BCCD = Path(os.environ.get('PSAQ_BCCD', ROOT.parent / 'shared' / 'real' / 'bccd'))
"""Where a detector of blood cells and its photographs are; not in the repository."""
NUCLEI = Path(os.environ.setdefault(  # the config reads it too
    'PSAQ_NUCLEI', str(ROOT.parent / 'shared' / 'real' / 'nuclei')))
"""Where microscope images of nuclei are; not in the repository."""
PHOTOGRAPHS = dict(bccd=(BCCD, 'train32.json'), nuclei=(NUCLEI, 'train.json'))
"""Folder and training annotations of what is no demo model."""
NUCLEI_DETECTOR = ROOT / 'benchmarks' / 'models' / 'mask_rcnn_swin_nuclei.py'
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
    bccd=(BCCD / 'mask_rcnn_swin_bccd.py', BCCD / 'mask_rcnn_swin_bccd.pth'),
    nuclei=(NUCLEI_DETECTOR, NUCLEI_DETECTOR.with_suffix('.pth')))

METRICS = {'coco/bbox_mAP': ('box AP', 100), 'coco/segm_mAP': ('mask AP', 100),
           'mIoU': ('mIoU', 1), 'agreement': ('mIoU with float', 1),
           'agreement/bbox': ('box AP with float', 100),
           'agreement/segm': ('mask AP with float', 100),
           'accuracy/top1': ('top-1', 1), 'sqnr': ('SQNR', 1)}
"""Key to its name in tables and its factor to points (or decibel)."""

Changes = Mapping[str, Any]
"""Of a recipe: section to what differs, as of :meth:`psaq_mm.Recipe.changed`."""

MIN_MAX = dict(observer=dict(_delete_=True, type='MinMaxObserver'))
"""Of a role in ``quantization``: the naive range."""

NEAREST: Changes = dict(quantization=dict(weight=dict(rounding='nearest')))
"""Weights without GPTQ."""

ROI_INPUTS_AS_REST: Changes = dict(quantization=dict(overrides={'@roi_head': dict(input=dict(
    _delete_=True, observer=dict(type='PercentileObserver', percentile=0.9995)))}))
"""Without the width and margin that the preset gives inputs of RoI heads."""

UNLIMITED: Changes = dict(quantization=dict(
    ROI_INPUTS_AS_REST['quantization'], channel_limit=None))
"""Wide channels as they are, and inputs of RoI heads as the rest."""

PLAIN: Changes = dict(quantization=dict(UNLIMITED['quantization'], **NEAREST['quantization']))
"""As rows are that compare images."""

RANGES_ALONE: Changes = dict(PLAIN, calibration=dict(image_size=None))
"""Where only time or size is measured: what else is done to weights changes neither."""

NO_PATCH_SIMILARITY: Changes = dict(synthesis=dict(priors=dict(patch_similarity=None)))
"""Total variation alone."""

V1_FORM: Changes = dict(synthesis=dict(priors=dict(patch_similarity=dict(
    _delete_=True, type='PatchSimilarityPrior', weight=1.0, form='v1', points=10))))
"""V1's form of the prior."""

ROUNDS: Changes = dict(evolution=dict(rounds=5))
"""The student learns from views of the images."""

ALL_STEPS: Changes = dict(synthesis=dict(steps=100))
"""Of images that are compared. Presets take half of them, or less."""

MEASURED = ROOT / 'benchmarks' / 'measured'
"""Where values are kept, a file for each model."""

TRAINING = DEMO / 'data' / 'families'
"""A few scenes of the training split, beside all of them."""

SYNTHETIC = 'synthetic'

OLD = 'one scale for all tokens', 'not rotated', 'before 0.3', 'before 0.2'
"""In the place of a fingerprint: measured when tokens had no scales of their own, when no input
was rotated, when the first layer's range was that of the images, and when these were made
otherwise."""


class Experiment(NamedTuple):
    """How a student is made, and from which images.

    Args:
        images (str): ``synthetic``, or ``noise8``, ``real32``, ``unrelated8`` (or other
            numbers).
        recipe (Recipe): All settings.
    """
    images: str
    recipe: Recipe

    @property
    def fingerprint(self) -> str:
        """str: Changes with everything that the student depends on."""
        sections = self.recipe.to_dict()
        for name in ('synthesis', 'evolution'):
            sections[name].pop('save_interval')
        for name in ('weight', 'activation'):
            del sections['quantization'][name]['rotate']  # always False
        if not self.recipe.quantization.budget:
            for name in (*BUDGETS, 'candidate_bits'):
                del sections['quantization'][name]
        if not self.recipe.evolution.rounds:
            del sections['evolution']
        if not self.recipe.reconstruction.steps:
            del sections['reconstruction']
        if self.images != SYNTHETIC and not (
                self.recipe.evolution.rounds and self.recipe.evolution.sample_steps):
            sections['synthesis'] = dict(image_size=sections['synthesis']['image_size'])
        return fingerprint_of([self.images, sections])


UNSHIPPED_WIDTHS = dict(w2a4=('w4a4', 2), w4a3=('w3a3', 4))
"""Setting to the shipped recipe whose rules it has, and its bits of weights."""


def experiment(setting: str, scope: str, *changes: Changes, preset: str = 'default',
               images: str = SYNTHETIC) -> Experiment:
    """A shipped recipe with changes.

    Args:
        setting (str): Such as ``w4a8``, or of :data:`UNSHIPPED_WIDTHS`.
        scope (str): ``backbone`` or ``model``.
        *changes (Mapping): One on top of the other.
        preset (str): Of :meth:`psaq_mm.Recipe.shipped`. Defaults to ``default``.
        images (str): As of :class:`Experiment`. Defaults to ``synthetic``.
    """
    base, bits = UNSHIPPED_WIDTHS.get(setting, (setting, None))
    recipe = Recipe.shipped(base, preset).changed(dict(quantization=dict(scope=scope)))
    if bits is not None:
        recipe = recipe.changed(dict(quantization=dict(weight=dict(bits=bits))))
    if images.startswith(('real', 'unrelated')):  # they have been through the test pipeline
        recipe = recipe.changed(dict(calibration=dict(image_size=None)))
    for change in changes:
        recipe = recipe.changed(change)
    return Experiment(images, recipe)


def fingerprint_of(values: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class Subject:
    """A float model with trained weights, and what is real about it.

    Args:
        name (str): In :data:`MODELS`.
        work_dir (Path): Where images are kept between runs.
        scenes (int): Test scenes of a demo model; the first 120 are those of its
            config. Defaults to 0: that config's test set.
    """

    def __init__(self, name: str, work_dir: Path, scenes: int = 0) -> None:
        file, self.checkpoint = MODELS[name]
        for needed in (PHOTOGRAPHS[name][0] if name in PHOTOGRAPHS else file, file):
            if not needed.exists():
                sys.exit(f'{needed} is not here: nothing to measure or to compare with')
        if scenes and DEMO not in file.parents:
            sys.exit(f'--scenes: {name} has no scenes that could be rendered; leave it out')
        self.name, self.work_dir, self.scenes = name, work_dir / name, scenes
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.config = load_config(file)
        self.test_size = tested_size(self.config)

    @functools.cached_property
    def model(self) -> nn.Module:
        """nn.Module: The float model."""
        if not self.checkpoint.exists():
            trained_by = dict(bccd='', nuclei='benchmarks/train_nuclei.py').get(
                self.name, f'demo/train.py demo/{MODELS[self.name][0].name}')
            sys.exit(f'{self.checkpoint} is not here' + (
                f': python {trained_by} --half trains it' if trained_by
                else ': nothing to measure'))
        if self.name not in PHOTOGRAPHS:
            from scenes import render_split
            folder = DEMO / 'data'
            if self.scenes:
                folder /= f'{self.scenes}_scenes'
                self._test_on(folder)
            render_split('val', folder, self.scenes)
            render_split('train', TRAINING, 96)
        model = build_float_model(self.config)
        load_float_weights(model, str(self.checkpoint))
        return model

    def _test_on(self, folder: Path) -> None:
        """Take another test set: more scenes of the same kind."""
        sections = [self.config.test_dataloader.dataset, self.config.test_evaluator]
        for section, key in itertools.product(sections, ('data_root', 'root', 'ann_file')):
            if str(section.get(key, '')).startswith(str(DEMO)):
                section[key] = str(folder / Path(section[key]).relative_to(DEMO / 'data'))

    @functools.cached_property
    def adapter(self) -> Adapter:
        """Adapter: Of the model."""
        return find_adapter(self.model)

    @functools.cached_property
    def _probe(self) -> List[Tuple[Tensor, List[Tensor]]]:
        """Test images, and the float model's feature maps of them."""
        preprocess: Any = self.model.data_preprocessor
        loader = Runner.build_dataloader(copy.deepcopy(self.config.test_dataloader))
        images = [preprocess(batch, False)['inputs'] for batch, _ in zip(loader, range(16))]
        return [(x, self._backbone(self.model, x)) for x in images]

    def _backbone(self, model: nn.Module, images: Tensor) -> List[Tensor]:
        with torch.no_grad():
            taps = self.adapter.forward_taps(model, images, ('backbone', )).taps
        return list(taps.values())

    def sqnr(self, student: nn.Module) -> float:
        """SQNR of the backbone's feature maps on real test images: the mean
        over stages, in decibel, over up to 16 batches of the test set."""
        signal = [0.] * len(self._probe[0][1])
        noise = list(signal)
        for images, expected in self._probe:
            for i, (a, b) in enumerate(zip(expected, self._backbone(student, images))):
                signal[i] += float(a.double().square().sum())
                noise[i] += float((a.double() - b.double()).square().sum())
        return statistics.mean(10 * math.log10(s / max(n, 1e-300))
                               for s, n in zip(signal, noise))

    def _classes(self, model: nn.Module) -> Iterator[Tensor]:
        """The class of each position that a segmentor gives, one-hot, shape
        (positions, classes), for each batch of test images."""
        for images, _ in self._probe:
            with torch.no_grad():
                logits = self.adapter.forward_taps(model, images, ('logits', )).taps['logits.0']
            yield F.one_hot(logits.argmax(1), logits.shape[1]).flatten(0, 2).bool()

    def agreement(self, student: nn.Module) -> float:
        """Mean IoU of a segmentor's classes with those of the float model, on the
        test images of :meth:`sqnr`: how far it still decides as the model
        does that was to be quantized, whether that is right or wrong."""
        pairs = list(zip(self._classes(self.model), self._classes(student)))
        both = sum((a & b).sum(0) for a, b in pairs)
        either = sum((a | b).sum(0) for a, b in pairs)
        return 100 * float((both / either)[either > 0].mean())

    @functools.cached_property
    def _float_detections(self) -> List[Detections]:
        """What the float model finds in the test images."""
        return self._test(self.model)[1]

    def _test(self, student: nn.Module) -> Tuple[Dict[str, float], List[Detections]]:
        """Metrics of the config's own evaluator on its test set, and what a detector finds
        in each image."""
        loader = Runner.build_dataloader(copy.deepcopy(self.config.test_dataloader))
        evaluator = Evaluator(copy.deepcopy(self.config.test_evaluator))
        evaluator.dataset_meta = loader.dataset.metainfo
        detections = []
        with torch.no_grad():
            for batch in loader:
                samples = student.test_step(batch)
                detections += [detections_of(s) for s in samples if 'pred_instances' in s]
                evaluator.process(data_samples=samples, data_batch=batch)
        with contextlib.redirect_stdout(io.StringIO()):  # the tables of pycocotools
            values = evaluator.evaluate(len(loader.dataset))
        return {k: float(v) for k, v in values.items()}, detections

    @functools.cached_property
    def classes(self) -> List[str]:
        """list[str]: Names of the classes of the test set."""
        loader = Runner.build_dataloader(copy.deepcopy(self.config.test_dataloader))
        return list(loader.dataset.metainfo['classes'])

    def test(self, model: nn.Module) -> Dict[str, float]:
        """Metrics of the config's own evaluator on its test set."""
        return self._test(model)[0]

    def evaluate(self, student: nn.Module, metrics: bool = True) -> Dict[str, float]:
        """SQNR, and the metrics of the config's own evaluator on its test set; of
        detectors and segmentors the agreement with the float model too."""
        found = {} if student is self.model else dict(sqnr=self.sqnr(student))
        if not metrics:
            return found
        values, detections = self._test(student)
        if student is self.model:
            self._float_detections = detections
            return values
        if hasattr(student, 'decode_head'):
            found['agreement'] = self.agreement(student)
        for kind in ('bbox', 'segm'):
            if f'coco/{kind}_mAP' in values:
                found[f'agreement/{kind}'] = agreement_ap(self._float_detections, detections, kind)
        return {**found, **values}

    def _training_images(self, count: int, seed: int) -> List[Dict[str, Any]]:
        """Some of the training set, as the test pipeline packs them."""
        loader: Any = copy.deepcopy(self.config.test_dataloader)
        dataset: ConfigDict = loader.dataset
        if self.name in PHOTOGRAPHS:
            dataset.ann_file = PHOTOGRAPHS[self.name][1]
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
        return [data[i] for i in order[:count].tolist()]

    def raw_images(self, count: int, seed: int) -> List[Tensor]:
        """Training images as the test pipeline resizes them, BGR of shape (3, H, W)."""
        return [chosen['inputs'] for chosen in self._training_images(count, seed)]

    def real_images(self, count: int, seed: int) -> Tensor:
        """Training images as the test pipeline prepares them, shape
        (count, C, H, W); another choice for each seed."""
        preprocess: Any = self.model.data_preprocessor  # the model registers its host's datasets
        chosen = self._training_images(count, seed)
        batch = dict(inputs=[c['inputs'] for c in chosen],
                     data_samples=[c['data_samples'] for c in chosen])
        with torch.no_grad():
            return preprocess(batch, False)['inputs']

    def unrelated_images(self, count: int, seed: int) -> Tensor:
        """Photographs of another domain, as ``tools/quantize.py --images`` takes them: blood
        cells for the demo models, the demo's scenes for BCCD."""
        folder = BCCD / 'images'
        if self.name == 'bccd':
            from scenes import render_split
            render_split('train', TRAINING, 96)
            folder = TRAINING / 'train'
        return psaq_mm.load_images(self.model, folder, count, seed, self.config)

    def noise(self, count: int, seed: int, size: Tuple[int, int]) -> Tensor:
        """Gaussian noise within the valid pixels."""
        lower, upper = self.adapter.valid_range(self.model)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, lower.shape[1], *size, generator=generator)
        return torch.minimum(torch.maximum(images, lower), upper)

    def synthetic(self, settings: SynthesisSettings, seed: int) -> Tuple[Tensor, float]:
        """Images by the prior, kept in a file, and the seconds that they took."""
        values = {k: v for k, v in asdict(settings).items() if k != 'save_interval'}
        file = self.work_dir / f'images_{fingerprint_of(values)}_{seed}.pt'
        if not file.exists():
            start = time.perf_counter()
            images = psaq_mm.synthesize(self.model, settings, seed)
            torch.save(dict(images=images, seconds=time.perf_counter() - start), file)
        saved = torch.load(file)
        return saved['images'], saved['seconds']

    def images_of(self, made: Experiment, seed: int) -> Tuple[Tensor, float]:
        """What a student is made from, and the seconds that the images took."""
        settings = sized_for(self.model, made.recipe.synthesis)
        number = re.fullmatch(r'(noise|real|unrelated)(\d+)', made.images)
        if number is None:
            return self.synthetic(settings, seed)
        if number[1] == 'noise':
            return self.noise(int(number[2]), seed, settings.size), 0.
        take = self.real_images if number[1] == 'real' else self.unrelated_images
        return take(int(number[2]), seed), 0.

    def student(self, made: Experiment, seed: int,
                model: Optional[nn.Module] = None) -> Tuple[nn.Module, float]:
        """A quantized copy of the model, as tools/quantize.py makes it.

        Args:
            made (Experiment): How.
            seed (int): Of the images and of the game.
            model (nn.Module, optional): One that computes the same as the float
                model, to make the student of. Defaults to None: that itself.

        Returns:
            tuple: The student, and the seconds it took with its images.
        """
        images, seconds = self.images_of(made, seed)
        pipeline = Pipeline(copy.deepcopy(self.model if model is None else model), made.recipe,
                            seed, self.test_size, images=images)
        return pipeline.run(), seconds + sum(pipeline.seconds.values())

    def measure(self, made: Experiment, seed: int, metrics: bool = True) -> Dict[str, float]:
        """What the student of an experiment keeps, and the seconds it took."""
        student, seconds = self.student(made, seed)
        return dict(self.evaluate(student, metrics), seconds=seconds)


class Results:
    """Measured values in a JSON file, so that a long run can be continued, and
    several can share what they measure. A value counts only for the recipe
    that it was measured of.

    Args:
        file (Path): Written after each measurement.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: Dict[str, Dict[str, Any]] = {}
        self.has_old = False
        self._read()

    def _read(self) -> None:
        if self.file.exists():
            self.values.update(json.loads(self.file.read_text()))

    def get(self, made: Optional[Experiment], *key: Any, old: bool = False) \
            -> Optional[Dict[str, float]]:
        """What is there for a key and its experiment, or from an earlier version; None if
        nothing is."""
        value = self.values.get('/'.join(map(str, key)))
        expected = OLD if old else (made and made.fingerprint, )
        if value is None or value.get('recipe') not in expected:
            return None
        return {k: v for k, v in value.items() if k != 'recipe'}

    def add(self, found: Mapping[str, float], made: Optional[Experiment], *key: Any) -> None:
        """Keep what was measured for a key, and show it."""
        name = '/'.join(map(str, key))
        self._read()
        rounded = {k: float(f'{v:.6g}') for k, v in found.items()
                   if k in METRICS or k == 'seconds'}
        self.values[name] = {**rounded, **(dict(recipe=made.fingerprint) if made else {})}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        save_json(dict(sorted(self.values.items())), self.file)
        shown = ', '.join(f'{METRICS[k][0]} {METRICS[k][1] * v:.2f}'
                          for k, v in found.items() if k in METRICS)
        print(f'{name}: {shown}, {found.get("seconds", 0):.0f} s', file=sys.stderr, flush=True)

    def float_model(self, subject: Subject) -> Dict[str, float]:
        """What the float model reaches, measured if it is not there."""
        if self.get(None, 'float') is None:
            self.add(subject.evaluate(subject.model), None, 'float')
        return self.get(None, 'float') or {}

    def fill(self, names: Iterable[str], settings: Iterable[str], scope: str,
             seeds: Iterable[int], experiment_of: Callable[[str, str, str], Experiment],
             measure: Callable[[Experiment, int], Mapping[str, float]], needed: str = 'sqnr') \
            -> None:
        """Measure what is not there yet: each name at each setting, seed by seed.

        Args:
            names (Iterable[str]): Rows or variants.
            settings (Iterable[str]): Such as ``w4a8``.
            scope (str): ``backbone`` or ``model``.
            seeds (Iterable[int]): Seeds of the runs.
            experiment_of (Callable): Takes name, setting and scope.
            measure (Callable): Takes an experiment and a seed.
            needed (str): The value without which it is not there. Defaults to
                ``sqnr``.
        """
        for seed, setting, name in itertools.product(seeds, settings, names):
            made, key = experiment_of(name, setting, scope), (name, setting, scope, seed)
            if needed not in (self.get(made, *key) or {}):
                self.add(measure(made, seed), made, *key)

    def over_seeds(self, seeds: Iterable[int], made: Experiment, *key: Any) \
            -> List[Dict[str, Any]]:
        """Values of all seeds that are there; if none is, those from earlier versions, marked by
        a key ``old``."""
        found = [value for value in (self.get(made, *key, seed) for seed in seeds) if value]
        if found:
            return found
        before = (self.get(made, *key, seed, old=True) for seed in seeds)
        found = [dict(value, old=True) for value in before if value]
        self.has_old = self.has_old or bool(found)
        return found

    def print_note(self) -> None:
        """Say what † means, if :meth:`over_seeds` gave such values."""
        if self.has_old:
            print('\n† Measured with settings of an earlier version, which '
                  '`docs/results/setup.md` names: compare only roughly.')


def print_note_once(tables: Iterable[Results]) -> None:
    """Say what † means, if any of several tables has such values."""
    for results in tables:
        if results.has_old:
            results.print_note()
            return


def metrics_of(float_model: Mapping[str, float]) -> List[str]:
    """Keys of what a table shows: the float model's metrics, and those of a student
    beside it."""
    beside = {'sqnr', *({'agreement'} if 'mIoU' in float_model else ()),
              *(f'agreement/{kind}' for kind in ('bbox', 'segm')
                if f'coco/{kind}_mAP' in float_model)}
    return [key for key in METRICS if key in float_model or key in beside]


def mark_of(rows: List[Dict[str, Any]]) -> str:
    """Follows what is from earlier versions."""
    return ' †' if any('old' in row for row in rows) else ''


def cell(rows: List[Dict[str, float]], key: str, seeds: int = 0) -> str:
    """Mean of a metric over seeds, in points, and its spread in brackets; how many
    seeds they are if it is not as many as there should be. What † says is printed by
    :meth:`Results.print_note`."""
    values = [METRICS[key][1] * row[key] for row in rows if key in row]
    if not values:
        return ''
    missing = f', {len(values)} of {seeds} seeds' if len(values) < seeds else ''
    mark = mark_of(rows)
    if len(values) == 1:
        return f'{values[0]:.1f}{missing}{mark}'
    return f'{statistics.mean(values):.2f} ({min(values):.1f} to {max(values):.1f}{missing}){mark}'


def add_options(parser: argparse.ArgumentParser, settings: List[str]) -> None:
    """Of what is measured: which model, bits and seeds, and where it is kept."""
    parser.add_argument('--model', choices=sorted(MODELS), default='demo')
    parser.add_argument('--settings', nargs='+', default=settings)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    parser.add_argument('--measured', type=Path, default=MEASURED, metavar='DIR',
                        help='where values are kept')
    parser.add_argument('--table', action='store_true', help='measure nothing, print')


def add_test_options(parser: argparse.ArgumentParser) -> None:
    """Of what is quantized, and what it is tested on."""
    parser.add_argument('--scope', choices=['backbone', 'model'], default='backbone')
    parser.add_argument('--scenes', type=int, default=0, metavar='N',
                        help='test a demo model on N scenes, not on the 120 of its config')


def measured_file(folder: Path, model: str, scenes: int) -> Path:
    """Where values of a model on a test set are kept."""
    return folder / (f'{model}_{scenes}_scenes.json' if scenes else f'{model}.json')


def quiet() -> None:
    """No log lines between the rows of a table."""
    logging.disable(logging.WARNING)
