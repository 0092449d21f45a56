# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The size of the images that are made for a model, and what of it is padding."""
import pytest
import timm
import torch
from mmdet.models.backbones.swin import SwinTransformer as DetSwin
from mmengine.logging import MMLogger
from mmseg.models.backbones.swin import SwinTransformer as SegSwin

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.errors import UserError

SMALL = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
TIMM_SMALL = dict(embed_dim=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.fixture
def warnings_of():
    """Calls ``warn_of_padding``; returns the lines that it logs."""
    logger = MMLogger.get_instance('test_image_size')

    def call(model, size):
        lines = []
        logger.handle, before = lambda record: lines.append(record.getMessage()), logger.handle
        try:
            find_adapter(model).warn_of_padding(model, size)
        finally:
            logger.handle = before
        return lines

    return call


@pytest.mark.parametrize('swin', [DetSwin, SegSwin])
@pytest.mark.parametrize('given, expected', [
    ({}, (224, 224)), (dict(window_size=12), (384, 384)),
    (dict(patch_size=2, strides=(2, 2, 2, 2)), (112, 112)),
    (dict(strides=(4, 2, 3, 2), window_size=5), (240, 240)),
    (dict(use_abs_pos_embed=True, pretrain_img_size=96), (96, 96))])
def test_openmmlab(swin, given, expected):
    model = swin(**SMALL, **given)
    adapter = find_adapter(model)
    assert adapter.image_size(model) == expected
    adapter.check_image_size(model, expected)
    model(torch.zeros(1, 3, *expected))  # raises if the size does not fit


@pytest.mark.parametrize('name, given, expected', [
    ('swin_tiny_patch4_window7_224', TIMM_SMALL, (224, 224)),
    ('swin_base_patch4_window12_384', TIMM_SMALL, (384, 384)),
    ('swin_tiny_patch4_window7_224', dict(TIMM_SMALL, img_size=(56, 112)), (56, 112)),
    ('deit_tiny_patch16_224', dict(depth=1, embed_dim=6), (224, 224)),
    ('deit_tiny_patch16_224', dict(depth=1, embed_dim=6, img_size=64), (64, 64))])
def test_timm(name, given, expected):
    model = timm.create_model(name, **given)
    assert find_adapter(model).image_size(model) == expected
    model(torch.zeros(1, 3, *expected))


@pytest.mark.parametrize('swin', [DetSwin, SegSwin])
def test_smallest_size_without_padding(swin):
    """No attention block records padding at the size, and one does at half of it."""
    model = swin(**dict(SMALL, depths=(2, 2, 2, 2)), window_size=3)
    adapter = find_adapter(model)
    assert adapter.image_size(model) == (96, 96)
    for side, padded in ((96, False), (48, True), (192, False)):
        with adapter.record_attention(model) as recorder, torch.no_grad():
            model(torch.zeros(1, 3, side, side))
        assert any(record.valid is not None for record in recorder.pop_all()) == padded


def test_warning(warnings_of):
    """Window 12 at 224: 14 tokens of 24, and 7 of 12."""
    model = DetSwin(**SMALL, window_size=12)
    assert warnings_of(model, (224, 224)) == [
        'at image_size 224x224 only 34 % of the tokens in the windows of stage 3 are real, the '
        'rest is padding; 384x384 leaves none']
    assert warnings_of(model, (384, 768)) == []
    assert '384x768 leaves none' in warnings_of(model, (500, 800))[0]
    assert warnings_of(DetSwin(**SMALL), (224, 224)) == []
    # timm's windows shrink to small feature maps.
    assert warnings_of(timm.create_model('swin_tiny_patch4_window7_224', **TIMM_SMALL,
                                         img_size=56), (56, 56)) == []
    dynamic = timm.create_model('swin_tiny_patch4_window7_224', **TIMM_SMALL,
                                dynamic_img_size=True)
    assert '448x448 leaves none' in warnings_of(dynamic, (400, 400))[0]


def test_no_warning_without_another_choice(warnings_of):
    assert warnings_of(DetSwin(**SMALL, use_abs_pos_embed=True, pretrain_img_size=96),
                       (96, 96)) == []
    vit = timm.create_model('deit_tiny_patch16_224', depth=1, embed_dim=6)
    assert warnings_of(vit, (224, 224)) == []


def test_share_of_real_tokens_is_that_of_the_records():
    model = DetSwin(**SMALL, window_size=5)
    adapter = find_adapter(model)
    from psaq_mm.adapters.window_grid import real_tokens
    for size in ((160, 160), (100, 200), (61, 333)):
        with adapter.record_attention(model) as recorder, torch.no_grad():
            model(torch.zeros(1, 3, *size))
        expected = [1. if record.valid is None else float(record.valid.float().mean())
                    for record in recorder.pop_all()]
        assert list(real_tokens(adapter.attention_windows(model), size)) \
            == pytest.approx(expected)


@pytest.mark.parametrize('swin', [DetSwin, SegSwin])
def test_position_embedding_of_another_size(swin):
    """Refused before any step; its forward would fail."""
    model = swin(**SMALL, use_abs_pos_embed=True, pretrain_img_size=96)
    with pytest.raises(UserError, match='must make 576 patches, such as 96, .* 64 makes 256'):
        psaq_mm.synthesize(model, psaq_mm.SynthesisSettings(num_images=1, image_size=64, steps=1))
    find_adapter(model).check_image_size(model, (95, 93))  # padded to whole patches
    model(torch.zeros(1, 3, 95, 93))
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 3, 64, 64))
    oblong = swin(**SMALL, use_abs_pos_embed=True, pretrain_img_size=(96, 64))
    find_adapter(oblong).check_image_size(oblong, (96, 64))
    with pytest.raises(UserError, match='must make 384 patches, since'):
        find_adapter(oblong).check_image_size(oblong, find_adapter(oblong).image_size(oblong))
