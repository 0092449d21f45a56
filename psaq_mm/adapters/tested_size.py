# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The size of the images that a config tests on."""
import json
import os
from statistics import median
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from mmengine.config import Config

Size = Tuple[int, int]

COMMON_ASPECT = 4 / 3
"""Of photographs; test images that keep their aspect have sizes of their own [choice]."""


class SizeFound(NamedTuple):
    """What :func:`tested_size` found.

    Args:
        size (tuple[int, int], optional): Height and width; None if it was not found.
        source (str): Where it was found, or why it was not, in words.
    """
    size: Optional[Size]
    source: str

    def __str__(self) -> str:
        if self.size is None:
            return (f'the size of test images was not found ({self.source}); '
                    'set calibration.image_size=(H, W)')
        return f'{self.size[0]}x{self.size[1]}, from {self.source}'


def tested_size(config: Config) -> SizeFound:
    """Find height and width of what the model sees of a test image in landscape
    format, padding included: of a segmentor that slides over it, a window.

    What says so first counts: the window, what resizes, crops or pads in the
    pipeline of ``test_dataloader``, the median of the images in its COCO
    annotations, the ``size`` of the preprocessor.

    Args:
        config (Config): A whole config. Its data need not be there.

    Returns:
        SizeFound: The size, if there is one, and what says so.
    """
    window = slid_window(config)
    if window is not None:
        return SizeFound(window, 'model.test_cfg.crop_size')
    preprocessor = config.model.get('data_preprocessor') or {}
    preprocessor_test = preprocessor.get('test_cfg') or {}
    dataset, steps = test_dataset(config)
    if step_name(dataset) == 'ImageFolder' and dataset.get('model'):
        found = _timm_size(dataset)
    else:
        found = _after(steps, dataset)
    for key, given in (('test_cfg.size', preprocessor_test.get('size')),
                       ('size', preprocessor.get('size'))):
        if found.size is None and given:
            found = SizeFound(_pair(given), f'model.data_preprocessor.{key}')
    if found.size is None:
        return found
    size = found.size
    if preprocessor_test.get('size'):
        size = _at_least(size, _pair(preprocessor_test['size']))
    divisor = preprocessor.get('pad_size_divisor') \
        or preprocessor_test.get('size_divisor') or 1  # mmdet's, mmseg's
    return SizeFound(_multiple(size, divisor), found.source)


def slid_window(config: Config) -> Optional[Size]:
    """Height and width of the window of a segmentor that slides over its images; else None."""
    test_cfg = config.model.get('test_cfg') or {}
    if test_cfg.get('mode') == 'slide' and test_cfg.get('crop_size'):
        return _pair(test_cfg['crop_size'])
    return None


def test_dataset(config: Config) -> Tuple[Any, List[Dict[str, Any]]]:
    """The section of a config's test set without its wrappers, of several the first, and all
    steps that its images go through; both empty if there is none."""
    return _unwrapped((config.get('test_dataloader') or {}).get('dataset') or {})


def test_datasets(config: Config) -> List[Any]:
    """The sections of all test sets of a config, without their wrappers."""
    return _leaves((config.get('test_dataloader') or {}).get('dataset') or {})


def _leaves(dataset: Any) -> List[Any]:
    inner = [*filter(None, [dataset.get('dataset')]), *(dataset.get('datasets') or ())]
    return [leaf for one in inner for leaf in _leaves(one)] if inner else [dataset]


def _unwrapped(dataset: Any) -> Tuple[Any, List[Dict[str, Any]]]:
    inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
    own = _transforms(dataset.get('pipeline'))
    if inner is None:
        return dataset, own
    leaf, steps = _unwrapped(inner)
    return leaf, steps + own


def _transforms(pipeline: Any) -> List[Dict[str, Any]]:
    """All steps of a pipeline, those within wrappers too."""
    steps: List[Dict[str, Any]] = []
    for step in pipeline or []:
        if isinstance(step, dict):
            steps += [step, *_transforms(step.get('transforms'))]
        elif isinstance(step, list):
            steps += _transforms(step)
    return steps


def step_name(config: Any) -> str:
    """Name of what a config builds; its type may be a class or have a scope."""
    kind = config.get('type')
    return kind.__name__ if isinstance(kind, type) else str(kind).split('.')[-1]


def _after(steps: Sequence[Dict[str, Any]], dataset: Any) -> SizeFound:
    """The size after all steps of a pipeline."""
    found = SizeFound(None, '')
    changing = [step for step in steps if _step(step, (1, 1)) is not None]
    if not changing or _step(changing[0], None) is None:  # it depends on the image
        found = _annotated_size(dataset)
    for step in changing:
        size = _step(step, found.size)
        if size is not None:
            shown = ', '.join(f'{key}={step[key]}' for key in (
                'scale', 'scales', 'width', 'height', 'max_size', 'scale_factor', 'crop_size',
                'size', 'size_divisor') if step.get(key) is not None)
            shown = f'{step_name(step)}({shown})'
            found = SizeFound(size, f"test_dataloader's {shown}" if _step(step, None) is not None
                              else f'{found.source}, then {shown}')
    return found


def _step(step: Dict[str, Any], size: Optional[Size]) -> Optional[Size]:
    """The size after one step, None if it has no say in it or depends on the image.

    Args:
        step (dict): Config of a transform of mmcv, mmdet or mmseg.
        size (tuple[int, int], optional): Height and width before it, if known.
    """
    name = step_name(step)
    if name in ('Resize', 'FixScaleResize') and step.get('scale'):
        return _resized(step['scale'], step.get('keep_ratio', False))
    if name == 'RandomChoiceResize':  # the middle one, by its pixels [choice]
        sizes = sorted((_resized(scale, step.get('keep_ratio', False))
                        for scale in step['scales']), key=lambda hw: hw[0] * hw[1])
        return sizes[len(sizes) // 2]
    if name == 'FixShapeResize':
        return int(step['height']), int(step['width'])
    if name == 'ResizeShortestEdge':
        scale = step['scale']
        short = scale if isinstance(scale, int) else min(scale)
        return _photograph(short, step.get('max_size') or round(short * COMMON_ASPECT))
    if name == 'CenterCrop':
        width, height = _pair(step['crop_size'])
        return (height, width) if size is None or step.get('auto_pad') \
            else (min(height, size[0]), min(width, size[1]))
    if name == 'Pad' and step.get('size'):
        width, height = _pair(step['size'])
        return _at_least(size or (0, 0), (height, width))
    if size is None:
        return None
    if name in ('Resize', 'FixScaleResize') and step.get('scale_factor'):
        factor = step['scale_factor']
        wide, high = factor if isinstance(factor, (list, tuple)) else (factor, factor)
        return int(size[0] * high + 0.5), int(size[1] * wide + 0.5)
    if name == 'ResizeToMultiple':
        return _multiple(size, step.get('size_divisor', 32))
    if name == 'Pad':
        if step.get('pad_to_square'):
            size = (max(size), max(size))
        return _multiple(size, step.get('size_divisor') or 1)
    return None


def _resized(scale: Any, keep_ratio: bool) -> Size:
    """Height and width after mmcv's ``Resize``, of a photograph if it keeps the aspect."""
    if isinstance(scale, int):
        return scale, scale
    if not keep_ratio:
        width, height = scale
        return height, width
    # A square scale is of square images, or of such as are padded to it [choice].
    return (scale[0], scale[0]) if scale[0] == scale[1] else _photograph(min(scale), max(scale))


def _photograph(short: int, long: int) -> Size:
    """Height and width of a photograph scaled to fit: either side may be the one that limits."""
    return min(short, round(long / COMMON_ASPECT)), min(long, round(short * COMMON_ASPECT))


def _annotated_size(dataset: Any) -> SizeFound:
    """Median height and width of the images in the COCO annotations of a dataset."""
    name = dataset.get('ann_file')
    if not isinstance(name, str) or not name.endswith('.json'):
        return SizeFound(None, 'the test pipeline does not resize to a size')
    path = os.path.join(dataset.get('data_root') or '', name)
    try:
        with open(path, encoding='utf-8') as file:
            images = json.load(file)['images']
        sides = [(image['height'], image['width']) for image in images]
        height, width = (int(median(side)) for side in zip(*sides))
    except OSError:
        return SizeFound(None, f'the test pipeline does not resize, and {path} is not there')
    except (ValueError, KeyError, TypeError):
        return SizeFound(None, f'the test pipeline does not resize, and {path} holds no heights '
                         'and widths of images')
    return SizeFound((height, width), f'the median of the images in {path}')


def _timm_size(dataset: Any) -> SizeFound:
    """What timm resizes to for the model of a :class:`psaq_mm.classification.ImageFolder`."""
    import timm
    given = (dataset.get('transform') or {}).get('input_size')
    if given:
        return SizeFound(_pair(given[1:]), "test_dataloader's transform.input_size")
    try:
        settings = timm.get_pretrained_cfg(dataset['model'])
    except RuntimeError:  # a wrong tag, which the dataset will report
        settings = None
    if settings is None:
        return SizeFound(None, f'timm has no preprocessing settings for {dataset["model"]!r}')
    return SizeFound(_pair(settings.input_size[1:]), f"timm's settings for {dataset['model']}")


def _pair(size: Any) -> Size:
    """A side, or two, as two."""
    first, second = (size, size) if isinstance(size, int) else size
    return first, second


def _at_least(size: Size, lowest: Size) -> Size:
    return max(size[0], lowest[0]), max(size[1], lowest[1])


def _multiple(size: Size, divisor: int) -> Size:
    """The size padded to multiples of a number."""
    return -(-size[0] // divisor) * divisor, -(-size[1] // divisor) * divisor
