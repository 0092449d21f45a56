# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What an exported file of a whole model says of its input and its results."""
import json
from typing import Any, Dict, List, Mapping, Optional, Sequence

from mmengine.config import Config
from mmengine.logging import print_log

from psaq_mm.adapters.tested_size import test_dataset
from psaq_mm.runtime.engines.engine import INFO_KEY

from .subgraph import Size, Subgraph

MODEL_TYPES = {'instance segmentation': 'MaskRCNN', 'detection': 'ssd',
               'segmentation': 'Segmentation', 'classification': 'Classification'}
"""Task to what OpenVINO's Model API calls a model of that kind."""


def resize_rule(config: Optional[Config]) -> Dict[str, Any]:
    """How the test images of a config are resized, for :func:`psaq_mm.runtime.images.prepare`.

    Args:
        config (Config, optional): A whole config; None if there is none.

    Returns:
        dict: ``mode``, and what it needs; ``unknown`` with the ``step`` that is not known.
    """
    if config is None:
        return dict(mode='unknown', step='it was exported without a config')
    dataset, steps = test_dataset(config)
    if str(dataset.get('type')).endswith('ImageFolder'):
        return _timm_rule(dataset)
    if not steps:
        return dict(mode='unknown', step='the config has no test pipeline')
    rule: Dict[str, Any] = dict(mode='none')
    for step in steps:
        name = str(getattr(step['type'], '__name__', step['type'])).split('.')[-1]
        if name == 'Resize':
            rule = _resize(step)
        elif not name.startswith(('Load', 'Pack')) and name not in (
                'DefaultFormatBundle', 'TestTimeAug', 'InferencerLoader'):
            return dict(mode='unknown', step=f'the test pipeline has the step {name}')
    return rule


def _resize(step: Mapping[str, Any]) -> Dict[str, Any]:
    for key, known in (('interpolation', 'bilinear'), ('backend', 'cv2')):
        if step.get(key, known) != known:
            return dict(mode='unknown', step=f'Resize of the test pipeline has {key}={step[key]}')
    scale: Any = step.get('scale')
    factor: Any = step.get('scale_factor')
    if scale is None and factor is not None:
        wide, high = factor if isinstance(factor, (list, tuple)) else (factor, factor)
        return dict(mode='factor', factor=[float(high), float(wide)])
    scale = (scale, scale) if isinstance(scale, int) else scale
    if step.get('keep_ratio', False):
        return dict(mode='fit', size=[max(scale), min(scale)])
    return dict(mode='stretch', size=[int(scale[1]), int(scale[0])])


def _timm_rule(dataset: Any) -> Dict[str, Any]:
    import timm
    from timm.data import resolve_data_config
    settings = timm.get_pretrained_cfg(dataset['model'])
    if settings is None:
        return dict(mode='unknown', step=f'timm has no settings for {dataset["model"]}')
    config = resolve_data_config(pretrained_cfg=settings.to_dict())
    config.update(dataset.get('transform') or {})
    height, width = config['input_size'][1:]
    if height != width or config.get('crop_mode', 'center') not in (None, 'center'):
        return dict(mode='unknown', step='timm does not cut a square out of the middle')
    short = int(min(height, width) / float(config.get('crop_pct') or 0.875))
    return dict(mode='crop', short=short, size=[height, width])


def file_info(subgraph: Subgraph, size: Optional[Size], classes: Sequence[str],
              config: Optional[Config]) -> Dict[str, Any]:
    """What a file says, as values for JSON.

    Args:
        subgraph (Subgraph): Of a whole model.
        size (tuple[int, int], optional): Height and width of the graph's images; None if they
            vary.
        classes (Sequence[str]): Names of the classes.
        config (Config, optional): The model's, with its test pipeline.
    """
    rule = resize_rule(config)
    if rule['mode'] == 'unknown':
        print_log(f'the file does not say how images are resized: {rule["step"]}',
                  logger='current')
    return dict(subgraph.info(), size=None if size is None else list(size), resize=rule,
                classes=[str(name) for name in classes], channels='BGR')


def metadata(info: Mapping[str, Any]) -> Dict[str, str]:
    """The same as flat text, under our key and under those of OpenVINO's Model API.

    Mean, standard deviation and channel order are in the graph: nobody else applies them.

    Returns:
        dict[str, str]: Keys of the Model API begin with ``model_info ``.
    """
    names: List[str] = [name.replace(' ', '_') for name in info['classes']]
    if info['task'] == 'instance segmentation':
        names = ['background', *names]  # the Model API counts from 1 there
    found = dict(model_type=MODEL_TYPES[info['task']], labels=' '.join(names),
                 resize_type='fit_to_window' if info['resize']['mode'] in ('fit', 'unknown')
                 else 'crop' if info['resize']['mode'] == 'crop' else 'standard',
                 pad_value=str(round(sum(info['padding']) / len(info['padding']))),
                 reverse_input_channels='False')
    if 'score_threshold' in info:
        found.update(confidence_threshold=str(info['score_threshold']),
                     iou_threshold=str(info['iou_threshold']), nms_execute='False')
    if info['task'] == 'classification':
        found.update(output_raw_scores='True')
    return {INFO_KEY: json.dumps(info), **{f'model_info {key}': value
                                           for key, value in found.items()}}
