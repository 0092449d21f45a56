# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Students to files and back."""
import errno
import os

import pytest
import torch
from small_models import detector, left_as_it_was, partly_trained, raw_outputs, state_of, swin

import psaq_mm
from psaq_mm import QuantizationSettings, UserError
from psaq_mm.checkpoint import MANIFEST_KEY, load_checkpoint_file
from psaq_mm.quantization import Quantizer

NEAREST = dict(channel_limit=None, weight=dict(rounding='nearest'))


def settings(**values):
    return QuantizationSettings.from_dict(dict(NEAREST, **values))


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56)


@pytest.fixture
def model(images):
    return psaq_mm.calibrate(psaq_mm.prepare(swin(), settings()), images)


@pytest.mark.parametrize('values', [
    dict(), dict(scope='model'), dict(scope='model', weight=dict(bits=4, rounding='nearest'),
                                      activation=dict(bits=4)),
    dict(scope='model', placement='v1'),
], ids=['backbone', 'model', 'W4A4', 'v1'])
def test_detector(values, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    model = psaq_mm.prepare(detector(), settings(**values))
    psaq_mm.calibrate(model, images)
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    expected = raw_outputs(model, images)
    torch.manual_seed(1)
    other = detector()
    assert not torch.equal(raw_outputs(other, images)[0], expected[0])
    psaq_mm.load(other, str(tmp_path / 'quantized.pth'))
    found = raw_outputs(other, images)
    assert len(found) == len(expected) == 4 + 5 + 2 * 5 + 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_what_is_recorded(model, tmp_path):
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path, meta=dict(dataset_meta=dict(classes=('a', 'b'))),
                 about=dict(seed=3, source='swin.pth'))
    checkpoint = load_checkpoint_file(str(path))
    assert checkpoint['meta'] == dict(dataset_meta=dict(classes=['a', 'b']))
    assert checkpoint[MANIFEST_KEY]['seed'] == 3
    assert checkpoint[MANIFEST_KEY]['source'] == 'swin.pth'
    with pytest.raises(UserError, match='modules cannot be recorded'):
        psaq_mm.save(model, path, about=dict(modules=3))


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize('function', ['fsync', 'replace'])
def test_failing_save_leaves_the_old_file(function, model, tmp_path, monkeypatch):
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path)
    old = path.read_bytes()
    with torch.no_grad():
        model.norm0.bias.add_(1.)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full_disk)
        with pytest.raises(UserError, match='quantized.pth could not be written: No space left'):
            psaq_mm.save(model, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ['quantized.pth']
    psaq_mm.save(model, path)
    assert path.read_bytes() != old


def test_what_cannot_be_saved_leaves_the_old_file(model, images, tmp_path):
    path = tmp_path / 'quantized.pth'
    path.write_bytes(b'old')
    waiting = psaq_mm.calibrate(psaq_mm.prepare(
        swin(), settings(weight=dict(rounding='gptq'))), images)
    for bad, match in ((swin(), 'no quantized modules'),
                       (psaq_mm.prepare(swin(), settings()), 'has no range'),
                       (waiting, 'weights of 18 modules, such as patch_embed.projection, are to '
                                 'be rounded by GPTQ and are not: call psaq_mm.round_weights')):
        with left_as_it_was(bad), pytest.raises(UserError, match=match):
            psaq_mm.save(bad, path)
    with pytest.raises(UserError, match='nowhere'):
        psaq_mm.save(model, tmp_path / 'nowhere' / 'quantized.pth')
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['quantized.pth']
    psaq_mm.save(psaq_mm.round_weights(waiting, images), path)


def test_no_quantized_checkpoint(tmp_path):
    model = swin()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'float.pth')
    (tmp_path / 'text.pth').write_text('text')
    with left_as_it_was(model):
        for name, match in (('float.pth', 'is not a quantized checkpoint of psaq_mm'),
                            ('text.pth', 'is not a checkpoint'),
                            ('missing.pth', 'there is no such file')):
            with pytest.raises(UserError, match=match) as caught:
                psaq_mm.load(model, tmp_path / name)
            assert name in str(caught.value)


@pytest.mark.parametrize('changes', [dict(embed_dims=32), dict(depths=(2, 3)),
                                     dict(num_heads=(2, 4))])
def test_checkpoint_of_another_model(changes, model, tmp_path):
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = swin(**changes)
    with left_as_it_was(other), pytest.raises(UserError, match='quantized.pth is not a'):
        psaq_mm.load(other, tmp_path / 'quantized.pth')


@pytest.mark.parametrize('part', [0.1, 0.5, 0.99])
def test_truncated_file(part, model, tmp_path):
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(model, path)
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    other = swin()
    with left_as_it_was(other), pytest.raises(UserError, match='quantized.pth is damaged'):
        psaq_mm.load(other, path)


def test_loaded_model(model, tmp_path, images):
    """It keeps its modes, needs no calibration and can be trained."""
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = partly_trained()
    modes = {name: m.training for name, m in other.named_modules()}
    frozen = [name for name, p in other.named_parameters() if not p.requires_grad]
    psaq_mm.load(other, tmp_path / 'quantized.pth')
    assert {name: m.training for name, m in other.named_modules() if name in modes} == modes
    assert [name for name, p in other.named_parameters() if not p.requires_grad] == frozen
    assert all(m.active for m in other.modules() if isinstance(m, Quantizer))
    other.eval()
    sum(out.sum() for out in other(images)).backward()
    assert other.stages[0].blocks[0].attn.w_msa.qkv.weight.grad.abs().sum() > 0


def test_state_dict_alone(model, images):
    """A student of the same settings that loads a state dict is quantized, as EMA and plain
    ``torch.save`` want it."""
    torch.manual_seed(1)
    other = psaq_mm.prepare(swin(), settings())
    with torch.no_grad():
        expected, before = model(images), other(images)
        other.load_state_dict(model.state_dict())
        found = other(images)
    assert not torch.equal(before[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert list(state_of(other)) == list(state_of(model))
