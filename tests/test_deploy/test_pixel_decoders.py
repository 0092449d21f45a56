# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""MaskFormer and Mask2Former: backbone and pixel decoder are exported, the rest is named."""
import copy

import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from psaq_mm.adapters import find_adapter
from psaq_mm.deploy import Graphs, export_graphs
from psaq_mm.engine import build_float_model

SIZE = (64, 96)
CONFIGS = {
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': 'panoptic_head',
    'mmdet::maskformer/maskformer_swin-l-p4-w12_64xb1-ms-300e_coco.py': 'panoptic_head',
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': 'decode_head'}


@pytest.fixture(scope='module', params=list(CONFIGS))
def model(request):
    config = get_config(request.param) if request.param.startswith('mmdet') else None
    if config is None:
        from psaq_mm.engine import load_config
        config = load_config(request.param)
    head = config.model[CONFIGS[request.param]]
    head.update(in_channels=[12, 24, 48, 96], num_queries=4)
    head.transformer_decoder.num_layers = 1
    if 'Mask2Former' in head.type:
        head.pixel_decoder.encoder.num_layers = 1
    config.model.backbone = dict(type='SwinTransformer', embed_dims=12, depths=(1, 1, 1, 1),
                                 num_heads=(1, 2, 2, 2))
    torch.manual_seed(0)
    built = build_float_model(config)
    built.head_name = CONFIGS[request.param]
    return built


def raw(model, images, adapter=None):
    """What the transformer decoder makes of images, before anything is chosen."""
    init_default_scope('mmseg' if hasattr(model, 'encode_decode') else 'mmdet')
    with torch.no_grad():
        found = (adapter or find_adapter(model)).forward_model(model, images)
    tensors = []
    while found is not None and not isinstance(found, torch.Tensor):
        found = list(found)
        tensors += [one for one in found if isinstance(one, torch.Tensor)]
        found = next((one for one in found if isinstance(one, (list, tuple))), None)
    return tensors if found is None else [*tensors, found]


def test_of_one_size(model, tmp_path):
    manifest = export_graphs(model, tmp_path, 'onnx', [SIZE])
    assert manifest['modules'] == 'backbone + pixel_decoder'
    assert manifest['in_torch'] == [f'{model.head_name} without its pixel_decoder']
    rows = manifest['graphs'][0]['parity']['outputs']
    assert rows[0]['output'] == 'mask_features'
    assert all(row['sqnr_db'] is None or row['sqnr_db'] > 90 for row in rows)
    images = torch.randn(2, 3, *SIZE)
    expected = raw(model, images)
    other = copy.deepcopy(model)
    Graphs(tmp_path, 'onnxruntime').install(other)
    found = raw(other, images, find_adapter(model))
    assert len(found) == len(expected) > 0
    for one, two in zip(found, expected):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_of_all_sizes(model, tmp_path):
    """A pixel decoder has its positions as constants: it is left out."""
    manifest = export_graphs(model, tmp_path, 'onnx', check_size=SIZE)
    assert manifest['modules'] == 'backbone'
    assert manifest['in_torch'] == [model.head_name]
    other = copy.deepcopy(model)
    Graphs(tmp_path, 'onnxruntime').install(other)
    images = torch.randn(1, 3, 96, 64)
    for one, two in zip(raw(other, images, find_adapter(model)), raw(model, images)):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
