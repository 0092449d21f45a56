# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The float model of a config, and the device it runs on."""
import copy
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from psaq_mm.checkpoint import (
    WeightChoice,
    is_quantized,
    load_checkpoint_file,
    load_float_state,
    load_quantized_state,
    meta_of,
)
from psaq_mm.errors import UserError

from .config import load_config, reject_new_keys
from .dataset_meta import inference_config, read_dataset_meta


def resolve_device(name: str) -> torch.device:
    """Check that a device is there.

    Args:
        name (str): ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: If it is not.
    """
    if name == 'auto':
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device {name} is no device; expected auto, cpu, cuda or cuda:N') \
            from error
    if device.type == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'--device {name}: no usable GPU was found; use --device cpu')
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f'--device {name}: there are {torch.cuda.device_count()} GPUs; '
                            'count from cuda:0')
    elif device.type != 'cpu':
        raise UserError(f'--device {name} is not supported; expected auto, cpu, cuda or cuda:N')
    return device


def build_float_model(config: Config) -> nn.Module:
    """Build the model of a config on the CPU, without weights; it knows the config.

    SyncBN becomes BN: here it runs in one process. The ``Pretrained``
    weights that a config names are not read: the checkpoint replaces them.

    Raises:
        UserError: If the model section cannot be built.
    """
    init_default_scope(config.get('default_scope') or 'mmdet')
    try:
        model = MODELS.build(copy.deepcopy(config.model))
    except UserError:
        raise
    except Exception as error:  # a config may name anything
        raise UserError(f'the model of config {config.filename} cannot be built '
                        f'({type(error).__name__}): {" ".join(str(error).split())[:500]}') \
            from error
    model = revert_sync_batchnorm(model)
    model.built_from = config  # its test pipeline says what pixels the model sees
    model.eval()
    return model


def build_model(config: Config, path: str, trust: bool = False,
                choice: Optional[WeightChoice] = None) -> nn.Module:
    """Build the model of a config on the CPU, with the weights of a checkpoint.

    Returns:
        nn.Module: The model; quantized and switched on if the checkpoint is.

    Raises:
        UserError: If the checkpoint cannot be read or is of another model.
    """
    return _build(config, path, trust, choice or WeightChoice())[0]


def _build(config: Config, path: str, trust: bool,
           choice: WeightChoice) -> Tuple[nn.Module, Dict[str, Any]]:
    """The model with its weights, and the checkpoint's ``meta``."""
    checkpoint = load_checkpoint_file(path, trust=trust)
    model = build_float_model(config)
    if is_quantized(checkpoint):
        choice.refuse(path)
        load_quantized_state(model, checkpoint, path)
    else:
        load_float_state(model, checkpoint, path, choice)
    model.eval()
    return model, meta_of(checkpoint)


def init_model(config: Union[str, Path, Config], checkpoint: Union[str, Path],
               device: Union[str, torch.device] = 'cpu',
               cfg_options: Optional[Dict[str, Any]] = None, trust: bool = False,
               averaged: Optional[bool] = None, prefix: Optional[str] = None) -> nn.Module:
    """A model that is ready to predict, as mmdet's ``init_detector`` and mmseg's
    ``init_model`` give it: quantized if the checkpoint is.

    .. code-block:: python

        model = psaq_mm.init_model('my_model_w8a8.py', 'quantized.pth')
        mmdet.apis.inference_detector(model, 'image.jpg')  # or mmseg.apis.inference_model

    Args:
        config (str or Path or Config): The model's config; a ``Config`` is not changed.
        checkpoint (str or Path): A float or a quantized checkpoint.
        device (str or torch.device): Where it runs: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            Defaults to ``cpu``.
        cfg_options (dict, optional): Dotted keys of the config to values. Defaults to None.
        trust (bool): Whether the checkpoint may run code when it is read. Defaults to False.
        averaged (bool, optional): Averaged or raw weights, of a float checkpoint that has both.
            Defaults to None: averaged ones.
        prefix (str, optional): Which of the models in a float checkpoint, such as ``teacher``.
            Defaults to None: the only one.

    Returns:
        nn.Module: The model, in eval mode. Its ``cfg`` is a copy of the config, whose test
        pipeline takes images without annotations; its ``dataset_meta`` holds ``classes`` and
        ``palette``.

    Raises:
        UserError: If a file cannot be read, or they do not belong together, or there is no such
            device.
    """
    if isinstance(config, Config):
        config = copy.deepcopy(config)
        reject_new_keys(config, cfg_options or {})
        config.merge_from_dict(cfg_options or {})
    else:
        config = load_config(config, cfg_options)
    where = resolve_device(str(device))
    model: Any
    model, meta = _build(config, str(checkpoint), trust, WeightChoice(averaged, prefix))
    model.dataset_meta = read_dataset_meta(config, meta, model)
    model.cfg = inference_config(config)
    model.to(where)
    return model
