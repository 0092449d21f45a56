# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What pixels a model sees: by its preprocessor, its test pipeline, or both."""
import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS as MMDET_TRANSFORMS
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.seen_pixels import turns_channels
from psaq_mm.engine import build_float_model
from psaq_mm.errors import UserError

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # RGB
RANGE = [[(end - mean) / std for mean, std in zip(MEAN, STD)] for end in (0, 255)]


@TRANSFORMS.register_module()
class ToUnit(BaseTransform):
    """Somebody's own step."""

    def transform(self, results):
        results['img'] = results['img'] / 255.
        return results


@MMDET_TRANSFORMS.register_module()
class NeedsWords(BaseTransform):

    def transform(self, results):
        results['img'] = results['img'] - 100. * len(results['text'])
        return results


def detector(preprocessor, *steps, before=-1):
    """The demo's detector on a small backbone, with steps before the one that packs."""
    config = Config.fromfile(str(DEMO / 'mask_rcnn_swin_demo.py'))
    config.model.backbone.update(embed_dims=12, depths=[1, 1], num_heads=[1, 1], strides=[4, 2],
                                 out_indices=(0, 1))
    config.model.neck.update(in_channels=[12, 24])
    config.model.data_preprocessor = dict(type='DetDataPreprocessor', **preprocessor)
    pipeline = config.test_dataloader.dataset.pipeline
    pipeline[before:before] = [copy.deepcopy(step) for step in steps]
    return build_float_model(config)


def seen(model):
    adapter = find_adapter(model)
    adapter.check_pixels(model)
    return [end.flatten().tolist() for end in adapter.valid_range(model)], adapter.is_rgb(model)


NORMALIZE = dict(type='Normalize', mean=MEAN, std=STD)
OF_BGR = dict(type='Normalize', mean=MEAN[::-1], std=STD[::-1], to_rgb=False)


@pytest.mark.parametrize('preprocessor, steps, rgb', [
    (dict(mean=MEAN, std=STD, bgr_to_rgb=True), [], True),
    ({}, [NORMALIZE], True),
    ({}, [dict(NORMALIZE, type='mmcv.Normalize')], True),
    ({}, [dict(type='RandomFlip', prob=1.), NORMALIZE], True),
    ({}, [dict(type='ToUnit'), dict(NORMALIZE, mean=[m / 255 for m in MEAN],
                                    std=[s / 255 for s in STD])], True),
    (dict(mean=[m / 255 for m in MEAN], std=[s / 255 for s in STD], bgr_to_rgb=True),
     [dict(type='ToUnit')], True),
    (dict(mean=[0.5] * 3, std=[2.] * 3),  # both
     [dict(NORMALIZE, mean=[m - 0.25 * s for m, s in zip(MEAN, STD)], std=[s / 2 for s in STD])],
     True)])
def test_normalized_alike(preprocessor, steps, rgb):
    ends, found = seen(detector(preprocessor, *steps))
    for one, other in zip(ends, RANGE):
        assert one == pytest.approx(other, abs=1e-4)
    assert found is rgb


def test_order_of_channels():
    ends, rgb = seen(detector({}, OF_BGR))
    assert ends[1] == pytest.approx(RANGE[1][::-1], abs=1e-4)
    assert not rgb
    assert not seen(detector(dict(bgr_to_rgb=True), NORMALIZE))[1]  # turned twice
    assert seen(detector(dict(bgr_to_rgb=True), OF_BGR))[1]


def test_images_are_made_alike():
    """The same model, with its normalization in either place."""
    settings = psaq_mm.SynthesisSettings(num_images=1, steps=2, image_size=32)
    images = []
    for preprocessor, steps in ((dict(mean=MEAN, std=STD, bgr_to_rgb=True), []),
                                ({}, [NORMALIZE])):
        torch.manual_seed(0)
        model = detector(preprocessor, *steps)
        images.append(psaq_mm.synthesize(model, settings))
    assert torch.allclose(*images, atol=1e-4)


def test_nothing_normalizes(monkeypatch):
    """Such models exist: YOLOX."""
    logged = []
    monkeypatch.setattr('psaq_mm.adapters.openmmlab_swin.print_log',
                        lambda text, **kwargs: logged.append(text))
    ends, _ = seen(detector({}))
    assert ends == [[0.] * 3, [255.] * 3]
    assert len(logged) == 1 and logged[0].startswith('nothing normalizes the images')


def test_what_is_not_known_is_refused():
    with pytest.raises(UserError, match=r'could not be run .*NeedsWords \(KeyError'):
        seen(detector({}, dict(type='NeedsWords')))
    with pytest.raises(UserError, match=r'could not be run .*Unheard \(KeyError'):
        psaq_mm.quantize(detector({}, dict(type='Unheard')))
    with pytest.raises(UserError, match='make 1, 1, 1 of black and 1, 1, 1 of white'):
        seen(detector({}, dict(NORMALIZE, mean=[-1e12] * 3, std=[1e12] * 3)))
    model = detector({})
    del model.built_from
    with pytest.raises(UserError, match='set its mean and std'):
        psaq_mm.quantize(model)
    # A preprocessor that normalizes is enough.
    assert seen(detector(dict(mean=MEAN, std=STD), dict(type='NeedsWords')))[0][0] \
        == pytest.approx(RANGE[0], abs=1e-4)


@pytest.mark.parametrize('name', ['_channel_conversion', 'channel_conversion'])
def test_both_families_tell_whether_channels_are_turned(name):
    assert turns_channels(SimpleNamespace(**{name: True}))
    assert not turns_channels(SimpleNamespace(**{name: False})) and not turns_channels(None)
