# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Predictions on image files: as pictures, and as plain values."""
import uuid
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import cv2
import numpy as np
import torch
from matplotlib.font_manager import findfont
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import VISUALIZERS, init_default_scope
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from psaq_mm.adapters.tested_size import test_dataset
from psaq_mm.errors import UserError
from psaq_mm.runtime.images import find_files, read_image

from .dataset_meta import inference_config

CLEAR_SIDE = 640
"""Pictures of smaller images are enlarged by a whole factor, to about this many pixels: the
hosts write labels of a fixed size."""
MOST_SHOWN = 16
"""Images on the page of a report: more would make it too large to send."""
TOP = 5
"""Classes that are shown of a classifier."""


def find_images(paths: Sequence[str]) -> List[Path]:
    """The image files among files and folders, each of which is opened once.

    Returns:
        list[Path]: In the order of ``paths``; those of a folder, and of its subfolders, sorted.

    Raises:
        UserError: If a path does not exist, a folder holds no image, or an image cannot be read.
    """
    found = find_files(paths)
    for path in found:
        require_readable(path)
    return found


def find_shown_images(paths: Sequence[str], config: Config) -> List[Path]:
    """The images of ``--show``, and whether the config can prepare them.

    Raises:
        UserError: If one cannot be read, the config does not say how images are prepared, or
            there are more than a page can show.
    """
    if not paths:
        return []
    images = find_images(paths)
    if len(images) > MOST_SHOWN:
        raise UserError(f'--show: {len(images)} images are too many for a page, which takes '
                        f'{MOST_SHOWN}; tools/infer.py draws any number, with --float too')
    input_pipeline(config)
    return images


def require_readable(path: Path) -> None:
    """Raise a :class:`UserError` unless a file is a whole image."""
    try:
        with Image.open(path) as image:
            image.load()  # all of it: a file that was cut short opens
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f'image {path} cannot be read: {error}') from error


def input_pipeline(config: Config) -> Callable[[Path], Dict[str, Any]]:
    """What makes a model's input of an image file, by the test set's section of a config.

    Returns:
        Callable: From a path to what ``model.test_step`` takes: a batch of one.

    Raises:
        UserError: If the config does not say how images are prepared.
    """
    dataset, _ = test_dataset(inference_config(config))
    if dataset.get('type') == 'psaq_mm.ImageFolder':
        from psaq_mm.classification.image_folder import build_transform
        transform = build_transform(dataset['model'], dataset.get('transform'))
        return lambda path: dict(inputs=[transform(Image.fromarray(read_rgb(path)))])
    if not dataset.get('pipeline'):
        raise UserError(f'config {config.filename} has no test_dataloader.dataset.pipeline that '
                        'says how images are prepared')
    init_default_scope(config.get('default_scope') or 'mmdet')
    try:
        pipeline = Compose(dataset['pipeline'])
    except (ImportError, KeyError, TypeError, ValueError) as error:
        raise UserError('test_dataloader.dataset.pipeline cannot be built '
                        f'({type(error).__name__}): {error}') from error

    def prepare(path: Path) -> Dict[str, Any]:
        try:
            sample: Any = pipeline(dict(img_path=str(path), img_id=0))
        except Exception as error:  # transforms are anybody's
            raise UserError(f'image {path} cannot be prepared by the test pipeline '
                            f'({type(error).__name__}): {error}') from error
        return {key: [value] for key, value in sample.items()}

    return prepare


def read_rgb(path: Path) -> np.ndarray:
    """Pixels of an image file, upright: uint8 RGB of shape (H, W, 3)."""
    return cv2.cvtColor(read_image(path), cv2.COLOR_BGR2RGB)


def predict(model: nn.Module, inputs: Mapping[str, Any], score_thr: float = 0.3) -> Any:
    """What a model of :func:`~psaq_mm.engine.init_model` predicts for one image.

    Args:
        inputs (Mapping): From :func:`input_pipeline`.
        score_thr (float): Instances that score less are left out. Defaults to 0.3.

    Returns:
        Any: A data sample of the host, on the CPU; of a classifier, a dict with ``logits``.
    """
    with torch.no_grad():
        sample = model.test_step(dict(inputs))[0]  # type: ignore[operator]
    if isinstance(sample, dict):
        return dict(logits=sample['logits'].cpu())
    sample = sample.cpu()
    if 'pred_instances' in sample:
        sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= score_thr]
    return sample


def plain_prediction(sample: Any, classes: Sequence[str]) -> Dict[str, Any]:
    """A prediction in plain values.

    Args:
        sample (Any): From :func:`predict`.
        classes (Sequence[str]): Names of the classes.

    Returns:
        dict: Of a detector ``instances``, each with its ``bbox`` (x1, y1, x2, y2 in pixels),
        ``score``, ``label`` and ``class``; of a segmentor ``pixels``, the share of each class
        that occurs; of a classifier ``top``, its five likeliest classes.
    """
    if isinstance(sample, dict):
        scores, labels = sample['logits'].softmax(0).sort(descending=True)
        return dict(top=[{'class': str(classes[label]), 'label': int(label),
                          'score': round(float(score), 4)}
                         for score, label in zip(scores[:TOP], labels[:TOP])])
    result: Dict[str, Any] = {}
    if 'pred_instances' in sample:
        found = sample.pred_instances
        result['instances'] = [
            {'class': str(classes[label]), 'label': int(label), 'score': round(float(score), 4),
             'bbox': [round(float(value), 2) for value in box]}
            for box, score, label in zip(found.get('bboxes', found.scores.new_zeros(
                len(found.scores), 0)), found.scores, found.labels)]
    if 'pred_sem_seg' in sample:
        ids, counts = np.unique(np.asarray(sample.pred_sem_seg.data), return_counts=True)
        result['pixels'] = {str(classes[label]) if label < len(classes) else f'label {label}':
                            round(float(count / counts.sum()), 4)
                            for label, count in zip(ids, counts)}
    return result


def build_visualizer(config: Config, meta: Mapping[str, Any]) -> Any:
    """The config's own visualizer, or the host's; it stores nothing by itself."""
    scope = config.get('default_scope') or 'mmdet'
    init_default_scope(scope)
    given = config.get('visualizer') or dict(
        type=dict(mmdet='DetLocalVisualizer', mmseg='SegLocalVisualizer').get(scope, 'Visualizer'))
    # mmengine hands out a visualizer again if one of its name was built before.
    visualizer = VISUALIZERS.build({**given, 'name': uuid.uuid4().hex, 'vis_backends': None})
    if 'alpha' not in given and hasattr(visualizer, 'alpha'):
        visualizer.alpha = 0.6  # of 0.8 objects under masks can hardly be seen
    visualizer.dataset_meta = dict(classes=meta['classes'], palette=meta['palette'])
    return visualizer


class Predictor:
    """A model, and what draws its predictions.

    Args:
        model (nn.Module): Ready to predict.
        meta (Mapping): Its ``classes`` and their ``palette``.
        config (Config): Says how predictions are drawn.
    """

    def __init__(self, model: nn.Module, meta: Mapping[str, Any], config: Config) -> None:
        self.model, self.classes = model, meta['classes']
        self.visualizer = build_visualizer(config, meta)


def compare_predictions(models: Mapping[str, Predictor], inputs: Mapping[str, Any],
                        image: np.ndarray, score_thr: float = 0.3
                        ) -> Tuple[Image.Image, Dict[str, Dict[str, Any]]]:
    """What several models predict for one image.

    Args:
        models (Mapping[str, Predictor]): By the title over their pictures.
        inputs (Mapping): From :func:`input_pipeline`.
        image (np.ndarray): RGB of shape (H, W, 3), to draw on.
        score_thr (float): Instances that score less are left out. Defaults to 0.3.

    Returns:
        tuple: The pictures side by side, and predictions as of :func:`plain_prediction`, by
        title.
    """
    panels, found = [], {}
    for title, one in models.items():
        sample = predict(one.model, inputs, score_thr)
        found[title] = plain_prediction(sample, one.classes)
        panels.append((title, draw(image, sample, one.visualizer)))
    return side_by_side(panels), found


def summary(prediction: Mapping[str, Any]) -> str:
    """A plain prediction in a few words."""
    if 'top' in prediction:
        best = prediction['top'][0]
        return f'{best["class"]} ({100 * best["score"]:.0f} %)'
    if 'instances' in prediction:
        count = len(prediction['instances'])
        return f'{count} object{"" if count == 1 else "s"}'
    return f'{len(prediction["pixels"])} classes' if 'pixels' in prediction else 'nothing'


def draw(image: np.ndarray, sample: Any, visualizer: Any) -> np.ndarray:
    """A prediction of :func:`predict` on its RGB image of shape (H, W, 3), as the host draws it.

    Returns:
        np.ndarray: RGB; small images are enlarged. Below those of a classifier stand its classes.
    """
    factor = max(1, round(CLEAR_SIDE / max(image.shape[:2])))
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    if isinstance(sample, dict):
        lines = [f'{entry["class"]}  {100 * entry["score"]:.1f} %'
                 for entry in plain_prediction(
                     sample, visualizer.dataset_meta['classes'])['top']]
        return np.concatenate([image, _text(lines, image.shape[1])])
    sample = sample.clone()
    options: Dict[str, Any] = {}
    if 'pred_instances' in sample:
        options['pred_score_thr'] = -1.  # the rest is left out already
        order = sample.pred_instances.scores.argsort()  # the surest on top
        found = sample.pred_instances = sample.pred_instances[order]
        if 'bboxes' in found:
            found.bboxes = found.bboxes * factor
        if 'masks' in found:
            found.masks = _enlarge(found.masks, factor)
    for key in ('pred_sem_seg', 'pred_panoptic_seg'):
        if key in sample:
            data = getattr(sample, key)
            name = 'sem_seg' if 'sem_seg' in data else 'data'
            setattr(sample, key, type(data)(**{name: _enlarge(getattr(data, name), factor)}))
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002 - mmdet varies the colours of masks by it
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of boxes at the border
        visualizer.add_datasample('prediction', image, sample, draw_gt=False, **options)
    np.random.set_state(state)  # noqa: NPY002
    drawn: np.ndarray = visualizer.get_image()
    return drawn


def _enlarge(planes: Any, factor: int) -> Any:
    return torch.as_tensor(planes).repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def side_by_side(panels: Sequence[Tuple[str, np.ndarray]], gap: int = 8) -> Image.Image:
    """Pictures of one size in a row, a title over each, and ``gap`` pixels between two."""
    columns: List[np.ndarray] = []
    for title, picture in panels:
        column = np.concatenate([_text([title], picture.shape[1]), picture])
        columns += [column, np.full((len(column), gap, 3), 255, np.uint8)]
    return Image.fromarray(np.concatenate(columns[:-1], axis=1))


def _text(lines: Sequence[str], width: int) -> np.ndarray:
    """Lines in black on white, of shape (H, width, 3)."""
    size = max(12, min(20, width // 24))
    height = round(1.5 * size)
    image = Image.new('RGB', (width, height * len(lines) + size // 4), 'white')
    font = ImageFont.truetype(findfont('DejaVu Sans'), size)
    for i, line in enumerate(lines):
        ImageDraw.Draw(image).text((size // 2, i * height + size // 4), line, 'black', font)
    return np.asarray(image)
