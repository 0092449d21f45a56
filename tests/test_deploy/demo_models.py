# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The trained demo models, quantized, for the tests of this folder.

With fewer of their blocks: to trace a block takes long.
"""
import copy
import functools
from typing import Any

import torch
from conftest import DEMO, plain_student
from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.deploy.parity import parity_images
from psaq_mm.engine import build_float_model, load_config

SIZES = dict(mask_rcnn_swin=(96, 128), upernet_swin=(96, 128), swin=(112, 112), deit=(112, 112))


DEPTHS = {'mask_rcnn_swin': {'model.backbone.depths': [2, 1, 1, 1]},
          'upernet_swin': {'model.backbone.depths': [2, 1, 1, 1]},
          'swin': {'model.depths': [2, 1, 1]}, 'deit': {'model.depth': 2}}


def demo_model(name: str, quantized: bool = True, **settings: Any) -> nn.Module:
    """Build a demo model, float or quantized on two images."""
    model = copy.deepcopy(_float_model(name))
    if quantized:
        images = parity_images(SIZES[name], *find_adapter(model).valid_range(model), batch=2)
        return plain_student(model, images, **settings)
    return model


@functools.cache
def _float_model(name: str) -> nn.Module:
    model = build_float_model(load_config(DEMO / f'{name}_demo.py', DEPTHS[name]))
    state = torch.load(DEMO / f'{name}_demo.pth', weights_only=True)['state_dict']
    assert not model.load_state_dict(state, strict=False).missing_keys
    return model
