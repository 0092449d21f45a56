# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a config and a checkpoint say of the classes and the test images."""
import colorsys
import copy
import logging
from typing import Any, Dict, List, Mapping, Tuple

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import nn

from psaq_mm.adapters.tested_size import test_dataset


def inference_config(config: Config) -> Config:
    """A copy of a config whose test pipeline takes an image without annotations.

    The pipeline is ``test_pipeline`` too: mmseg's ``inference_model`` reads that.
    """
    config = copy.deepcopy(config)
    dataset, _ = test_dataset(config)
    if dataset.get('pipeline'):
        dataset.pipeline = [step for step in dataset.pipeline if not _loads_annotations(step)]
        config.test_pipeline = copy.deepcopy(dataset.pipeline)
    return config


def _loads_annotations(step: Any) -> bool:
    kind = step.get('type') if isinstance(step, Mapping) else type(step)
    return 'Annotation' in (kind.__name__ if isinstance(kind, type) else str(kind))


def read_dataset_meta(config: Config, meta: Mapping[str, Any], model: nn.Module) -> Dict[str, Any]:
    """Names and colours of a model's classes.

    Names are those of the checkpoint or, if it has none, of the config's test set. Colours
    are those of the config's ``metainfo``, the checkpoint or the class of the test set, in this
    order and where there are as many; else hues that are easy to tell apart.

    Args:
        config (Config): The config of the model.
        meta (Mapping): The checkpoint's ``meta``.
        model (nn.Module): The model; its heads know how many classes there are.

    Returns:
        dict: ``classes``, ``palette`` (an RGB triple in [0, 255] for each class), and what else
        the checkpoint holds.
    """
    found = meta.get('dataset_meta')
    if isinstance(found, Mapping):
        found = {str(key).lower(): value for key, value in found.items()}
    else:  # mmdet 2.x, mmseg 0.x
        found = dict(classes=meta.get('CLASSES'), palette=meta.get('PALETTE'))
    dataset, _ = test_dataset(config)
    own = BaseDataset._load_metainfo(dataset.get('metainfo'))
    general = getattr(_dataset_class(config, dataset.get('type')), 'METAINFO', {})

    counts: List[int] = [getattr(module, 'num_classes', 0) for module in model.modules()
                         if isinstance(getattr(module, 'num_classes', None), int)]
    classes = found.get('classes')
    if not classes:
        classes = own.get('classes') or general.get('classes') or ()
        if len(classes) not in counts:
            classes = [f'class {i}' for i in range(max(counts, default=0))]
        print_log('the checkpoint does not name its classes; they are taken as: '
                  f'{", ".join(map(str, classes[:5]))}{", ..." if len(classes) > 5 else ""}',
                  logger='current', level=logging.WARNING)
    if isinstance(classes, str):
        classes = [classes]
    palettes = [source.get('palette') for source in (own, found, general)]
    fitting = [[tuple(color) for color in palette] for palette in palettes  # as mmdet wants it
               if isinstance(palette, (list, tuple)) and len(palette) == len(classes)]
    palette = fitting[0] if fitting else _hues(len(classes))
    return dict(found, classes=tuple(classes), palette=palette)


def _dataset_class(config: Config, kind: Any) -> Any:
    if not isinstance(kind, str):
        return kind
    with DATASETS.switch_scope_and_registry(config.get('default_scope') or 'mmdet') as registry:
        return registry.get(kind)


def _hues(count: int) -> List[Tuple[int, ...]]:
    """Bright colours; each hue is a golden angle from the one before."""
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(0.618034 * i % 1, 0.75, 0.95))
            for i in range(count)]
