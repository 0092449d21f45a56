# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The size of the images that a config tests on."""
from typing import Any, List, Optional, Tuple

from mmengine.config import Config

COMMON_ASPECT = 4 / 3
"""Of photographs; test images that keep their aspect have sizes of their own [choice]."""


def _transforms(pipeline: Any) -> List[Any]:
    """All steps of a pipeline, those within wrappers too."""
    steps: List[Any] = []
    for step in pipeline or []:
        if isinstance(step, dict):
            steps += [step, *_transforms(step.get('transforms'))]
        elif isinstance(step, list):
            steps += _transforms(step)
    return steps


def _name(kind: Any) -> str:
    """Name of a transform, whose type may be a class or have a scope."""
    return kind.__name__ if isinstance(kind, type) else str(kind).split('.')[-1]


def test_size(config: Config) -> Optional[Tuple[int, int]]:
    """Height and width of what the model sees of a test image in landscape format,
    padding included: of a segmentor that slides over it, a window.

    Args:
        config (Config): Its ``test_dataloader`` says how images are resized.

    Returns:
        tuple[int, int], optional: None if the config does not resize.
    """
    dataset = (config.get('test_dataloader') or {}).get('dataset') or {}
    while dataset.get('dataset') is not None:  # wrappers
        dataset = dataset['dataset']
    test_cfg = config.model.get('test_cfg') or {}
    if test_cfg.get('mode') == 'slide' and test_cfg.get('crop_size'):
        height, width = test_cfg['crop_size']
        return height, width
    scale = None
    for step in _transforms(dataset.get('pipeline')):
        if _name(step.get('type')) == 'Resize' and step.get('scale'):
            scale, keep_ratio = step['scale'], step.get('keep_ratio', False)
    if scale is None:
        return None
    long, short = (scale, scale) if isinstance(scale, int) else (max(scale), min(scale))
    if not keep_ratio and not isinstance(scale, int):
        width, height = scale
    else:
        # Either side may be the one that limits. A square scale is of square images, or of
        # such as are padded to it [choice].
        height = short if short == long else min(short, round(long / COMMON_ASPECT))
        width = min(long, round(short * COMMON_ASPECT))
    preprocessor = config.model.get('data_preprocessor') or {}
    divisor = preprocessor.get('pad_size_divisor') \
        or (preprocessor.get('test_cfg') or {}).get('size_divisor') or 1  # mmdet's, mmseg's
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor
