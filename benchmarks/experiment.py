# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the accuracy benchmarks share: a trained model, its images from all
sources, students of all kinds, and what is measured on real test images."""
import argparse
import contextlib
import copy
import dataclasses
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
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from torch import Tensor, nn

import psaq_mm
from psaq_mm import api
from psaq_mm.adapters import Adapter, find_adapter
from psaq_mm.checkpoint import load_float_weights, save_json
from psaq_mm.engine import build_float_model, load_config, read_sections
from psaq_mm.adapters.tested_size import tested_size

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'demo'
BCCD = Path(os.environ.get('PSAQ_BCCD', ROOT.parent / 'shared' / 'real' / 'bccd'))
"""Where a detector of blood cells and its photographs are; not in the repository."""
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
           'mIoU': ('mIoU', 1), 'agreement': ('mIoU with float', 1),
           'accuracy/top1': ('top-1', 1), 'sqnr': ('SQNR', 1)}
"""Key to its name in tables and its factor to points (or decibel)."""

MIN_MAX = dict(observer=dict(type='MinMaxObserver'))
"""Of a role in ``quantization``: the naive range."""

NEAREST = dict(weight=dict(rounding='nearest'))
"""Of ``quantization``: weights without GPTQ."""

NO_GAME = dict(rounds=0)
"""Of ``evolution``."""

ROI_WIDTH = ('bits', 'margin')
"""What the preset says of inputs of RoI heads beside their range rule."""

NO_PATCH_SIMILARITY = dict(priors=dict(patch_similarity=None))
"""Of ``synthesis``: total variation alone. Its images have the label ``tv``."""

V1_FORM = dict(priors=dict(patch_similarity=dict(
    type='PatchSimilarityPrior', weight=1.0, form='v1', points=10)))
"""Of ``synthesis``: V1's form of the prior. Its images have the label ``v1``."""

ALL_STEPS = 100
"""In each phase, of the images that are compared. Presets take half of them, or less."""

STEPS = {preset: dict(steps=psaq_mm.shipped('w8a8', preset)['synthesis']['steps'])
         for preset in ('fast', 'default', 'evolve')}
"""Of ``synthesis``, for each preset."""

STEPS_LABELS = dict(fast='prior_quarter_steps', default='prior_half_steps',
                    evolve='prior_half_steps')
"""Of images in so many steps; of those in all steps ``prior``."""

MEASURED = ROOT / 'benchmarks' / 'measured'
"""Where values are kept, a file for each model."""

TRAINING = DEMO / 'data' / 'families'
"""A few scenes of the training split, beside all of them."""


class Recipe(NamedTuple):
    """How a student is made, in plain values, so that what is measured can be
    kept with what it was measured of.

    Args:
        images (str): ``noise8``, ``real32`` (or other numbers), or a label of
            synthetic images.
        quantization (dict): The whole section.
        evolution (dict): The same; no rounds, no game.
        synthesis (dict): The same.
    """
    images: str
    quantization: Dict[str, Any]
    evolution: Dict[str, Any]
    synthesis: Dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """str: Changes with everything that the student depends on."""
        rules = {k: v for k, v in self.evolution.items() if k != 'save_interval'}
        quantization = {k: v for k, v in self.quantization.items()
                        if k != 'channel_limit' or v is not None}
        if quantization['scope'] == 'backbone' or roi_inputs_are_as_rest(quantization):
            quantization['overrides'] = without_roi_width(quantization['overrides'])
        if not self.rounds_by_gptq:
            weight = {k: v for k, v in quantization['weight'].items() if k != 'rounding'}
            quantization = dict(quantization, weight=weight)
        return fingerprint_of([self.images, quantization,
                               rules if rules['rounds'] else {}, self.synthesis])

    @property
    def rounds_by_gptq(self) -> bool:
        """bool: Whether weights are rounded so, as far as settings tell: some learn nothing."""
        rules = self.evolution
        learn = rules['rounds'] and rules['learn'] != 'ranges'
        all_learn = learn and (self.quantization['scope'] == 'backbone' or rules['taps']['rois'])
        return self.quantization['weight']['rounding'] == 'gptq' and not all_learn


def roi_inputs_are_as_rest(quantization: Mapping[str, Any]) -> bool:
    """Whether inputs of RoI heads have the width and room of other inputs."""
    rest = quantization['activation']
    own = quantization['overrides'].get('@roi_head', {}).get('input', {})
    return all(own[key] == rest.get(key) for key in ROI_WIDTH if key in own)


def without_roi_width(overrides: Mapping[str, Any]) -> Dict[str, Any]:
    """``overrides`` that say nothing of the width and room of inputs of RoI heads."""
    result = copy.deepcopy(dict(overrides))
    for key in ROI_WIDTH:
        result.get('@roi_head', {}).get('input', {}).pop(key, None)
    return result


def roi_inputs_as_rest(recipe: Recipe) -> Recipe:
    """Without the width and room that the preset gives inputs of RoI heads."""
    overrides = without_roi_width(recipe.quantization['overrides'])
    return recipe._replace(quantization=dict(recipe.quantization, overrides=overrides))


def plain(recipe: Recipe) -> Recipe:
    """As rows are that compare images: without that, float weights as they are, and without
    GPTQ."""
    quantization = merged(recipe.quantization, NEAREST, dict(channel_limit=None))
    return roi_inputs_as_rest(recipe._replace(quantization=quantization))


def fingerprint_of(values: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


class Subject:
    """A float model with trained weights, and what is real about it.

    Args:
        name (str): In :data:`MODELS`.
        work_dir (Path): Where images are kept between runs.
        preset (str): Preset of settings, but for the steps of the prior. Defaults to
            ``evolve``, which says all.
        scenes (int): Test scenes of a demo model; the first 120 are those of its
            config. Defaults to 0: that config's test set.
    """

    def __init__(self, name: str, work_dir: Path, preset: str = 'evolve',
                 scenes: int = 0) -> None:
        file, self.checkpoint = MODELS[name]
        if not file.exists():
            sys.exit(f'{file} is not here: nothing to measure or to compare with')
        if scenes and DEMO not in file.parents:
            sys.exit(f'--scenes: {name} has no scenes that could be rendered; leave it out')
        self.name, self.work_dir, self.scenes = name, work_dir / name, scenes
        self.work_dir.mkdir(parents=True, exist_ok=True)
        config = self.work_dir / f'{name}_{preset}.py'
        config.write_text(f"_base_ = ['{file}', 'psaq_mm::_base_/w8a8.py']\n"
                          f"preset = '{preset}'\nsynthesis = dict(steps={ALL_STEPS})\n")
        self.config = load_config(config)
        self.sections = read_sections(self.config)
        self.size = self.sections.synthesis.size
        if name in ('swin', 'deit'):
            self.size = (112, 112)
        self.test_size = tested_size(self.config).size

    @functools.cached_property
    def model(self) -> nn.Module:
        """nn.Module: The float model."""
        if not self.checkpoint.exists():
            sys.exit(f'{self.checkpoint} is not here' + (
                f': python demo/train.py demo/{MODELS[self.name][0].name} --half trains it'
                if DEMO in MODELS[self.name][0].parents else ': nothing to measure'))
        if self.name != 'bccd':
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

    def evaluate(self, student: nn.Module, metrics: bool = True) -> Dict[str, float]:
        """SQNR, and the metrics of the config's own evaluator on its test set; of
        segmentors the agreement with the float model too."""
        found = {} if student is self.model else dict(sqnr=self.sqnr(student))
        if not metrics:
            return found
        if found and hasattr(student, 'decode_head'):
            found['agreement'] = self.agreement(student)
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
        preprocess: Any = self.model.data_preprocessor  # the model registers its host's datasets
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
            return preprocess(batch, False)['inputs']

    def noise(self, count: int, seed: int) -> Tensor:
        """Gaussian noise within the valid pixels."""
        lower, upper = self.adapter.valid_range(self.model)
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, lower.shape[1], *self.size, generator=generator)
        return torch.minimum(torch.maximum(images, lower), upper)

    def synthetic(self, label: str, seed: int, synthesis: Mapping[str, Any]) -> Tensor:
        """Images by the prior, kept in a file.

        Args:
            label (str): Name of these settings.
            seed (int): Seed of the run.
            synthesis (Mapping): The whole section.
        """
        file = self.work_dir / f'{label}_{fingerprint_of(synthesis)}_{seed}.pt'
        if not file.exists():
            start = time.perf_counter()
            images = psaq_mm.synthesize(self.model, seed=seed, **synthesis)
            torch.save(dict(images=images, seconds=time.perf_counter() - start), file)
        saved = torch.load(file)
        self.seconds = saved['seconds']
        return saved['images']

    def recipe(self, images: str, quantization: Mapping[str, Any] = {},
               evolution: Mapping[str, Any] = {}, synthesis: Mapping[str, Any] = {}) -> Recipe:
        """The preset's sections, with changes.

        Args:
            images (str): As of :class:`Recipe`.
            quantization (Mapping): Changes of the section. Defaults to none.
            evolution (Mapping): The same; :data:`NO_GAME` for none.
            synthesis (Mapping): The same.
        """
        sections = self.config.to_dict()
        prior = merged(dataclasses.asdict(self.sections.synthesis),
                       dict(image_size=self.size), synthesis)
        return Recipe(images, merged(sections['quantization'], quantization),
                      merged(sections['evolution'], evolution), prior)

    def shipped(self, preset: str, setting: str, scope: str) -> Recipe:
        """A preset as it is, with the steps that it takes.

        Args:
            preset (str): In :data:`STEPS`.
            setting (str): Such as ``w4a8``.
            scope (str): ``backbone`` or ``model``.
        """
        return self.recipe(
            STEPS_LABELS[preset], merged(bits_of(setting, self.name), dict(scope=scope)),
            merged(rules_of(setting), {} if preset == 'evolve' else NO_GAME), STEPS[preset])

    def images_of(self, recipe: Recipe, seed: int) -> Tensor:
        """What a student is calibrated on; ``seconds`` is the time it took."""
        self.seconds = 0.
        number = re.fullmatch(r'(noise|real)(\d+)', recipe.images)
        if number is None:
            return self.synthetic(recipe.images, seed, recipe.synthesis)
        source = self.noise if number[1] == 'noise' else self.real_images
        return source(int(number[2]), seed)

    def student(self, recipe: Recipe, seed: int,
                model: Optional[nn.Module] = None) -> Tuple[nn.Module, float]:
        """A quantized copy of the model: calibrated, evolved, and with its last
        ranges and rounding at test size, as tools/quantize.py does it.

        Args:
            recipe (Recipe): How.
            seed (int): Of the images and of the game.
            model (nn.Module, optional): One that computes the same as the float
                model, to make the student of. Defaults to None: that itself.

        Returns:
            tuple: The student, and the seconds it took with its images.
        """
        images = self.images_of(recipe, seed)
        start = time.perf_counter()
        teacher = copy.deepcopy(self.model if model is None else model)
        psaq_mm.equalize(teacher, images, **recipe.quantization)
        student = copy.deepcopy(teacher)
        psaq_mm.quantize(student, **recipe.quantization)
        psaq_mm.calibrate(student, images)
        rules = recipe.evolution
        if rules['rounds']:
            psaq_mm.evolve(student, teacher, images, seed=seed, synthesis=recipe.synthesis,
                           **rules)
        size = None if recipe.images.startswith('real') else self.test_size
        if size is not None:
            learnt = bool(rules['rounds']) and rules['learn'] != 'weights'
            other_size = tuple(images.shape[-2:]) != tuple(size)
            if other_size or (rules['rounds'] and not learnt):
                api.refit(student, images, size, learnt)
        psaq_mm.round_weights(student, images, size, teacher)
        return student, self.seconds + time.perf_counter() - start


def merged(*sections: Mapping[str, Any]) -> Dict[str, Any]:
    """Sections of a config, later ones over earlier ones, key by key."""
    result: Dict[str, Any] = {}
    for section in sections:
        for key, value in section.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both and 'type' not in value \
                else copy.deepcopy(value)
    return result


def base_of(setting: str, model: str = '') -> Dict[str, Any]:
    """The base of a setting such as ``w4a8``, for a model of :data:`MODELS`; widths that
    have none take the closest one that has."""
    folder = ROOT / 'configs' / '_base_'
    base = folder / f'{setting}.py'
    if not base.exists():
        bits = int(setting[3])
        base = folder / ('w3a3.py' if bits <= 3 else 'w4a4.py' if bits == 4 else 'w4a8.py')
    own = folder / f'{base.stem}_segmentor.py'
    if model == 'upernet' and own.exists():
        base = own
    return dict(Config.fromfile(str(base)).to_dict())


def bits_of(setting: str, model: str = '') -> Dict[str, Any]:
    """What a setting says of ``quantization``."""
    weight, activation = int(setting[1]), int(setting[3])
    return merged(base_of(setting, model)['quantization'],
                  dict(weight=dict(bits=weight), activation=dict(bits=activation)))


def rules_of(setting: str) -> Dict[str, Any]:
    """What a setting says of ``evolution``."""
    return dict(base_of(setting).get('evolution', {}))


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
        self._read()

    def _read(self) -> None:
        if self.file.exists():
            self.values.update(json.loads(self.file.read_text()))

    def get(self, recipe: Optional[Recipe], *key: Any) -> Optional[Dict[str, float]]:
        """What is there for a key and its recipe, None if nothing is."""
        value = self.values.get('/'.join(map(str, key)))
        if value is None or (recipe and value.get('recipe') != recipe.fingerprint):
            return None
        return {k: v for k, v in value.items() if k != 'recipe'}

    def add(self, found: Mapping[str, float], recipe: Optional[Recipe], *key: Any) -> None:
        """Keep what was measured for a key, and show it."""
        name = '/'.join(map(str, key))
        self._read()
        rounded = {k: float(f'{v:.6g}') for k, v in found.items()
                   if k in METRICS or k == 'seconds'}
        self.values[name] = {**rounded, **(dict(recipe=recipe.fingerprint) if recipe else {})}
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
             seeds: Iterable[int], recipe: Callable[[str, str, str], Recipe],
             measure: Callable[[str, Recipe, int], Mapping[str, float]], needed: str = 'sqnr') \
            -> None:
        """Measure what is not there yet: each name at each setting, seed by seed.

        Args:
            names (Iterable[str]): Rows or variants.
            settings (Iterable[str]): Such as ``w4a8``.
            scope (str): ``backbone`` or ``model``.
            seeds (Iterable[int]): Seeds of the runs.
            recipe (Callable): Takes name, setting and scope.
            measure (Callable): Takes name, recipe and seed.
            needed (str): The value without which it is not there. Defaults to
                ``sqnr``.
        """
        for seed, setting, name in itertools.product(seeds, settings, names):
            made, key = recipe(name, setting, scope), (name, setting, scope, seed)
            if needed not in (self.get(made, *key) or {}):
                self.add(measure(name, made, seed), made, *key)

    def over_seeds(self, seeds: Iterable[int], recipe: Recipe, *key: Any) \
            -> List[Dict[str, float]]:
        """Values of all seeds that are there."""
        found = [self.get(recipe, *key, seed) for seed in seeds]
        return [value for value in found if value]


def metrics_of(float_model: Mapping[str, float]) -> List[str]:
    """Keys of what a table shows: the float model's metrics, and those of a student
    beside it."""
    beside = ('sqnr', 'agreement') if 'mIoU' in float_model else ('sqnr', )
    return [key for key in METRICS if key in float_model or key in beside]


def cell(rows: List[Dict[str, float]], key: str, seeds: int = 0) -> str:
    """Mean of a metric over seeds, in points, and its spread in brackets; how many
    seeds they are if it is not as many as there should be."""
    values = [METRICS[key][1] * row[key] for row in rows if key in row]
    if not values:
        return ''
    missing = f', {len(values)} of {seeds} seeds' if len(values) < seeds else ''
    if len(values) == 1:
        return f'{values[0]:.1f}{missing}'
    return f'{statistics.mean(values):.2f} ({min(values):.1f} to {max(values):.1f}{missing})'


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
