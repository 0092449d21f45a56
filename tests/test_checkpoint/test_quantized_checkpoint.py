# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import contextlib
import copy
import math
import os

import numpy as np
import pytest
import torch
from conftest import plain_student
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

import psaq_mm
from psaq_mm.checkpoint import (
    MANIFEST_KEY,
    STATE_KEY,
    guarded,
    load_checkpoint_file,
    load_quantized_state,
    quantized_checkpoint,
    size_of_quantized,
)
from psaq_mm.checkpoint.quantized_checkpoint import plain, prepare_for_loading
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, quantization_enabled
from psaq_mm.quantization import Quantizer, pack_integers, unpack_integers
from psaq_mm.quantization.observers import MinMaxObserver
from psaq_mm.registry import OBSERVERS


def swin(seed=0, embed_dims=16, depths=(2, 2)):
    """A small model; each parameter has values of its own."""
    torch.manual_seed(seed)
    model = SwinTransformer(embed_dims=embed_dims, depths=depths, num_heads=(1, 2),
                            strides=(4, 2), out_indices=(0, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval()
    return model


def bits(weight, activation):
    return dict(weight=dict(bits=weight), activation=dict(bits=activation))


IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(5))


def quantized(**settings):
    return plain_student(swin(), IMAGES, **settings)


@torch.no_grad()
def outputs(model):
    return model(IMAGES)


def assert_same_outputs(one, other):
    assert len(one) == len(other) == 2
    for left, right in zip(one, other):
        assert torch.equal(left, right)


# Save and load


SETTINGS = {
    'W8A8': dict(),
    'W6A6': bits(6, 6),
    'W4A8': bits(4, 8),
    'W4A4': bits(4, 4),
    'W2A8': bits(2, 8),
    'W3A3': bits(3, 3),
    'W5A7': bits(5, 7),
    'patch embedding of 2 bits': dict(patch_embed_bits=2),
    'weights per tensor': dict(weight=dict(granularity='per_tensor')),
    'activations per channel': dict(activation=dict(granularity='per_channel', bits=4)),
    'asymmetric W8': dict(weight=dict(symmetric=False)),
    'asymmetric W4': dict(weight=dict(symmetric=False, bits=4)),
    'asymmetric W2 per tensor': dict(weight=dict(symmetric=False, bits=2,
                                                 granularity='per_tensor')),
    'symmetric activations': dict(activation=dict(symmetric=True)),
    'v1': dict(placement='v1'),
    'v1 W4A4': dict(placement='v1', **bits(4, 4)),
    'weights alone': dict(placement=['weight']),
    'activations alone': dict(placement=['input', 'query', 'ffn_residual']),
    'part': dict(include='stages.1.*', exclude='*.qkv'),
    'mixed': dict(overrides={'stages.0.*': dict(weight=dict(bits=2)),
                             '*.ffn.*': dict(weight=dict(bits=5, symmetric=False))}),
    'scales of tokens': dict(roles={role: dict(granularity='per_token')
                                    for role in ('input', 'attention')}, **bits(3, 3)),
    'rotated inputs': dict(roles=dict(input=dict(rotate=True)), **bits(4, 4)),
    'percentile': dict(activation=dict(observer=dict(type='PercentileObserver', percentile=0.99))),
}


@pytest.mark.parametrize('settings', SETTINGS.values(), ids=list(SETTINGS))
def test_same_bits_after_loading(settings, tmp_path):
    model = quantized(**settings)
    for module in model.modules():
        if isinstance(module, Quantizer):  # as training leaves them
            with torch.no_grad():
                module.scale.mul_(0.9 + 0.2 * torch.rand_like(module.scale))
                if not module.spec.symmetric:
                    module.zero_point.add_(torch.rand_like(module.zero_point))
                    module.zero_point.clamp_(*module.spec.integer_range)
    expected = outputs(model)
    with quantization_enabled(model, False):
        assert not torch.equal(outputs(model)[1], expected[1])
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    fresh = swin(seed=1)
    float_outputs = outputs(fresh)
    assert psaq_mm.load(fresh, tmp_path / 'quantized.pth') is fresh
    assert_same_outputs(outputs(fresh), expected)
    assert not torch.equal(float_outputs[1], expected[1])

    ops, loaded = dict(named_quant_ops(model)), dict(named_quant_ops(fresh))
    assert list(ops) == list(loaded)
    for name, op in ops.items():
        assert type(op) is type(loaded[name])
        assert list(op.quantizers) == list(loaded[name].quantizers)
        for role, quantizer in op.quantizers.items():
            other = loaded[name].quantizers[role]
            for key in ('bits', 'symmetric', 'granularity'):
                assert getattr(quantizer.spec, key) == getattr(other.spec, key)
            assert torch.equal(quantizer.scale, other.scale) and other.enabled
            assert torch.equal(quantizer.zero_point, other.zero_point)
    # Saved again, the file holds the same.
    psaq_mm.save(fresh, tmp_path / 'again.pth')
    first, second = (load_checkpoint_file(tmp_path / name)
                     for name in ('quantized.pth', 'again.pth'))
    assert first[MANIFEST_KEY] == second[MANIFEST_KEY]
    assert first[STATE_KEY].keys() == second[STATE_KEY].keys()
    for name, value in first[STATE_KEY].items():
        assert value.dtype == second[STATE_KEY][name].dtype
        assert torch.equal(value, second[STATE_KEY][name]), name


def test_saving_leaves_the_model_alone(tmp_path):
    model = quantized()
    before = snapshot(model)
    checkpoint = quantized_checkpoint(model)
    assert_unchanged(model, before)
    for parameter in model.parameters():
        assert parameter.requires_grad
    assert not any(value.requires_grad for value in checkpoint[STATE_KEY].values())


def test_float_model_comes_back(tmp_path):
    """Unwrapped, a loaded model is float again, with the values of the integers."""
    model = quantized(**bits(4, 8))
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    fresh = swin(seed=1)
    types = {name: type(module) for name, module in fresh.named_modules()}
    psaq_mm.load(fresh, tmp_path / 'quantized.pth')
    psaq_mm.unwrap(fresh)
    assert {name: type(module) for name, module in fresh.named_modules()} == types
    state = fresh.state_dict()
    for name, op in named_quant_ops(model):
        if op.weight_quantizer is not None:
            assert torch.equal(state[f'{name}.weight'], op.quantized_weight())


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_models_of_other_precision(dtype, tmp_path):
    psaq_mm.save(quantized(), tmp_path / 'quantized.pth')
    model = swin(seed=1).to(dtype)
    psaq_mm.load(model, tmp_path / 'quantized.pth')
    assert model.patch_embed.projection.weight.dtype == dtype


# The file


def leaves(value):
    if isinstance(value, dict):
        for key, item in value.items():
            assert type(key) in (str, int)
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize('settings', [dict(), bits(2, 4)])
def test_file_holds_plain_values(settings, tmp_path):
    meta = dict(
        epoch=np.int64(3), lr=np.float64(0.5), name=np.str_('swin'), best=np.float32(0.25),
        dataset_meta=dict(classes=('disc', 'star'), palette=[(220, 20, 60)], made_by=object()),
        step=torch.ones(1), flags=[True, None], **{'1': 1})
    path = tmp_path / 'quantized.pth'
    psaq_mm.save(quantized(**settings), path, meta=meta,
                 about=dict(seed=3, source=dict(file='swin.pth')))
    checkpoint = load_checkpoint_file(path)
    assert set(checkpoint) == {'meta', 'state_dict', STATE_KEY, MANIFEST_KEY}
    del checkpoint['state_dict']  # test_stock_loader_guard.py
    assert all(type(value) is torch.Tensor for value in checkpoint.pop(STATE_KEY).values())
    for value in leaves(checkpoint):
        assert type(value) in (str, int, float, bool, type(None)), value
    assert checkpoint['meta'] == dict(
        epoch=3, lr=0.5, name='swin', best=0.25,
        dataset_meta=dict(classes=['disc', 'star'], palette=[[220, 20, 60]], made_by=None),
        step=None, flags=[True, None], **{'1': 1})
    assert checkpoint[MANIFEST_KEY]['seed'] == 3
    assert checkpoint[MANIFEST_KEY]['source'] == dict(file='swin.pth')


def test_plain():
    value = {'a': (1, 2.5), 3: [None, True, b'x'], (1, 2): 'dropped', 'n': np.float64(2)}
    copied = plain(value)
    assert copied == {'a': [1, 2.5], 3: [None, True, None], 'n': 2.}
    assert type(copied['n']) is float


@pytest.mark.parametrize('weight_bits, dtype, bytes_of_768', [
    (8, torch.int8, 768), (7, torch.uint8, 672), (6, torch.uint8, 576), (5, torch.uint8, 480),
    (4, torch.uint8, 384), (3, torch.uint8, 288), (2, torch.uint8, 192),
])
@pytest.mark.parametrize('symmetric', [True, False])
def test_integers(weight_bits, dtype, bytes_of_768, symmetric):
    model = quantized(weight=dict(bits=weight_bits, symmetric=symmetric), patch_embed_bits=None)
    state = quantized_checkpoint(model)[STATE_KEY]
    integers = state['stages.0.blocks.0.attn.w_msa.qkv.weight_integers']  # (48, 16)
    assert integers.dtype == dtype
    assert integers.numel() * integers.element_size() == bytes_of_768
    assert state['patch_embed.projection.weight_integers'].numel() == bytes_of_768  # 16x3x4x4
    assert integers.shape == ((48, 16) if weight_bits == 8 else (bytes_of_768, ))
    values = unpack_integers(integers, weight_bits, (48, 16))
    top = 2**(weight_bits - 1)
    assert int(values.max()) == top - 1
    assert int(values.min()) == (1 - top if symmetric else -top)


def test_no_float_copy_in_the_file(tmp_path):
    path = tmp_path / 'quantized.pth'
    model = quantized(**bits(4, 8))
    psaq_mm.save(model, path)
    data = path.read_bytes()
    state = load_checkpoint_file(path)[STATE_KEY]
    weights = {f'{name}.weight': op for name, op in named_quant_ops(model)
               if op.weight_quantizer is not None}
    assert len(weights) == 18
    for name, op in weights.items():
        assert name not in state
        for copied in (op.weight, op.quantized_weight()):
            assert copied.detach().numpy().tobytes() not in data, name
    assert model.norm0.weight.detach().numpy().tobytes() in data  # what is not quantized
    # Floats in the file: everything else of the model, and the ranges.
    floats = sum(v.numel() for v in state.values() if v.is_floating_point())
    others = sum(v.numel() for k, v in swin().state_dict().items()
                 if k not in weights and v.is_floating_point())
    assert floats == others + 912 + 2 * 34  # weight scales; ranges of activations


@pytest.mark.parametrize('settings, weights, ranges', [
    (dict(), 33536, 912 + 2 * 34),
    (bits(6, 6), 768 + 32768 * 6 // 8, 912 + 2 * 34),
    (bits(4, 8), 768 + 32768 // 2, 912 + 2 * 34),
    (bits(2, 8), 768 + 32768 // 4, 912 + 2 * 34),
    (dict(bits(4, 4), patch_embed_bits=None), 33536 // 2, 912 + 2 * 34),
    (dict(weight=dict(granularity='per_tensor')), 33536, 18 + 2 * 34),
    (dict(weight=dict(symmetric=False)), 33536, 2 * 912 + 2 * 34),
    (dict(activation=dict(symmetric=True)), 33536, 912 + 34),
    (dict(placement=['weight']), 33536, 912),
    (dict(placement='v1'), 33536, 912 + 2 * 48),
])
def test_size_by_hand(settings, weights, ranges):
    """33536 = 768 of the patch embedding, 2 x 3072 and 2 x 12288 of the blocks
    and 2048 between the stages; with 912 output channels."""
    assert size_of_quantized(quantized(**settings)) == dict(
        float_bytes=4 * 33536, stored_bytes=weights + 4 * ranges)


def test_size_of_a_part():
    """One linear of (48, 16) at 4 bits, and nothing else."""
    model = quantized(include='stages.0.blocks.0.attn.w_msa.qkv', **bits(4, 8))
    assert size_of_quantized(model) == dict(float_bytes=4 * 768, stored_bytes=384 + 4 * 48 + 8)


def test_size_of_a_model_of_real_widths(tmp_path):
    """Swin-T: at most 0.26 and 0.14 of the float weights, in the file too.

    27431424 = 4608 + 12 x (2 x 96^2 + 2 x 192^2 + 6 x 384^2 + 2 x 768^2)
    + 8 x (96^2 + 192^2 + 384^2).
    """
    model = SwinTransformer()
    model.eval()
    others = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    for weight_bits, limit in ((8, 0.26), (4, 0.14)):
        student = plain_student(model, weight=dict(bits=weight_bits))
        for _, op in named_quant_ops(student):
            op.set_weight_range()
        for module in student.modules():
            if isinstance(module, Quantizer) and not module.calibrated:
                module.set_range(torch.tensor([-1.]), torch.tensor([1.]))
        size = size_of_quantized(student)
        assert size['float_bytes'] == 4 * 27431424
        assert size['stored_bytes'] <= limit * size['float_bytes']
        psaq_mm.save(student, tmp_path / 'quantized.pth')
        expected = others - size['float_bytes'] + size['stored_bytes']
        assert expected < os.path.getsize(tmp_path / 'quantized.pth') < 1.01 * expected + 300_000


# What cannot be saved


def test_float_model_cannot_be_saved():
    with pytest.raises(UserError, match='no quantized modules: call psaq_mm.quantize first'):
        quantized_checkpoint(swin())


def test_model_without_ranges_cannot_be_saved():
    with pytest.raises(UserError, match=r'patch_embed.projection \(weight\) has no range: '
                                        'call psaq_mm.calibrate first'):
        quantized_checkpoint(plain_student(swin()))


# Loading into another model


def test_checkpoint_is_left_alone(checkpoint):
    """A hook may hand over the one that its runner goes on with."""
    kept = copy.deepcopy(checkpoint)
    state = prepare_for_loading(swin(1), checkpoint, 'quantized.pth')
    assert state.keys() == plain_student(swin()).state_dict().keys()
    assert checkpoint[MANIFEST_KEY] == kept[MANIFEST_KEY]
    assert checkpoint[STATE_KEY].keys() == kept[STATE_KEY].keys()
    for name, value in kept[STATE_KEY].items():
        assert torch.equal(checkpoint[STATE_KEY][name], value)


def snapshot(model):
    return dict(
        modules={name: (type(module), id(module)) for name, module in model.named_modules()},
        tensors={name: (id(value), value.detach().clone())
                 for name, value in (*model.named_parameters(), *model.named_buffers())},
        keys=list(model.state_dict()),
        switches=[m.enabled for m in model.modules() if isinstance(m, Quantizer)],
        training=[m.training for m in model.modules()])


def assert_unchanged(model, before):
    after = snapshot(model)
    for key in ('modules', 'keys', 'switches', 'training'):
        assert after[key] == before[key]
    assert after['tensors'].keys() == before['tensors'].keys()
    for name, (address, value) in before['tensors'].items():
        assert after['tensors'][name][0] == address
        assert torch.equal(after['tensors'][name][1], value), name


def assert_refused(model, checkpoint, match):
    before = snapshot(model)
    with pytest.raises(UserError, match=match) as caught:
        prepare_for_loading(model, checkpoint, 'quantized.pth')
    assert 'quantized.pth' in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
    assert_unchanged(model, before)


def with_head(model):
    model.head = nn.Linear(3, 3)
    return model


def with_identity(model):
    model.stages[0].blocks[1].ffn.layers[1] = nn.Identity()
    return model


@pytest.fixture(scope='module')
def checkpoint():
    return quantized_checkpoint(quantized())


@pytest.mark.parametrize('make, match', [
    (lambda: swin(depths=(2, 3)), 'missing: stages.1.blocks.2'),
    (lambda: swin(depths=(1, 1)), r'Different: stages.0.blocks.1.attn.w_msa \(absent\), '
                                  r'stages.0.blocks.1.attn.w_msa.qkv \(absent\), .* and 7 more'),
    (lambda: swin(embed_dims=32), r'patch_embed.projection.weight \(has shape \[32, 3, 4, 4\], '
                                  r'the checkpoint \[16, 3, 4, 4\]\)'),
    (lambda: with_head(swin()), 'missing: head.weight, head.bias'),
    (lambda: with_identity(swin()), r'stages.0.blocks.1.ffn.layers.1 \(is Identity, the '
                                    r'checkpoint has QuantLinear\)'),
    (lambda: nn.Linear(2, 2), r'patch_embed.projection \(absent\)'),
], ids=['deeper', 'less deep', 'wider', 'extra module', 'other class', 'other model'])
@pytest.mark.parametrize('training', [False, True])
def test_other_model(make, match, training, checkpoint):
    model = make()
    if training:
        model.train()
    assert_refused(model, checkpoint, match)


def test_model_that_lacks_a_part():
    model = with_head(quantized())
    assert_refused(swin(), quantized_checkpoint(model), 'unexpected: head.weight, head.bias')


def test_other_heads():
    """Same weights, but the ranges of another number of tables."""
    model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(2, 4), strides=(4, 2),
                            out_indices=(0, 1))
    assert_refused(model, quantized_checkpoint(quantized()), 'relative_position_bias_table')


# Loading again


def test_load_twice(tmp_path):
    model = quantized()
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    fresh = swin(seed=1)
    for _ in range(2):
        psaq_mm.load(fresh, tmp_path / 'quantized.pth')
        assert_same_outputs(outputs(fresh), outputs(model))
    psaq_mm.unwrap(fresh)
    assert not dict(named_quant_ops(fresh))


@pytest.mark.parametrize('calibrated', [False, True])
@pytest.mark.parametrize('settings', [dict(), dict(activation=dict(granularity='per_channel'))])
def test_load_into_a_quantized_model(calibrated, settings, tmp_path):
    model = quantized(**settings)
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = plain_student(swin(seed=1), **settings)
    if calibrated:
        psaq_mm.calibrate(other, 3 * IMAGES)
        outputs(other)  # fills the caches of weights
    psaq_mm.load(other, tmp_path / 'quantized.pth')
    assert_same_outputs(outputs(other), outputs(model))


@pytest.mark.parametrize('settings, match', [
    (bits(4, 8), r'patch_embed|stages.0.blocks.0.attn.w_msa.qkv \(weight: 4 bits'),
    (bits(8, 4), r'w_msa \(query: 4 bits'),
    (dict(weight=dict(symmetric=False)), r'weight: 8 bits, asymmetric, per_channel, the '
                                         'checkpoint 8 bits, symmetric, per_channel'),
    (dict(weight=dict(granularity='per_tensor')), 'weight: 8 bits, symmetric, per_tensor'),
    (dict(activation=dict(granularity='per_channel')), 'input: 8 bits, asymmetric, per_channel'),
    (dict(placement=['weight']), 'w_msa|input'),
    (dict(placement='v1'), 'logits: .*, the checkpoint float'),
    (dict(include='stages.1.*'), r'patch_embed.projection \(quantized on one side only\)'),
])
@pytest.mark.parametrize('calibrated', [False, True])
def test_model_that_is_quantized_otherwise(settings, match, calibrated, checkpoint):
    model = quantized(**settings) if calibrated else plain_student(swin(), **settings)
    assert_refused(model, checkpoint, match)


def test_other_observer_does_not_matter(checkpoint):
    """It only matters to a calibration."""
    model = plain_student(swin(1), activation=dict(observer=dict(type='MSEObserver')))
    state = prepare_for_loading(model, checkpoint, 'quantized.pth')
    model.load_state_dict(state)
    assert_same_outputs(outputs(model), outputs(quantized()))


# Damaged files


QKV = 'stages.0.blocks.0.attn.w_msa.qkv'
MSA = 'stages.0.blocks.0.attn.w_msa'


def weights(key, change):
    """Change an entry of the state dict; delete it by returning None."""

    def damage(checkpoint):
        state = checkpoint[STATE_KEY]
        value = change(state.pop(key))
        if value is not None:
            state[key] = value

    return damage


def without(key):
    return weights(key, lambda value: None)


def modules(change):
    return lambda checkpoint: change(checkpoint[MANIFEST_KEY]['modules'])


def top(**values):
    return lambda checkpoint: checkpoint.update(values)


def manifest(**values):
    return lambda checkpoint: checkpoint[MANIFEST_KEY].update(values)


SPEC = dict(bits=8, symmetric=False, granularity='per_tensor')
WEIGHT_SCALE = f'{QKV}.quantizers.weight.scale'
INPUT_SCALE, INPUT_ZERO = f'{QKV}.quantizers.input.scale', f'{QKV}.quantizers.input.zero_point'
DAMAGE = {
    'no integers': (without(f'{QKV}.weight_integers'), f'{QKV}.weight_integers'),
    'too few integers': (weights(f'{QKV}.weight_integers', lambda v: v[:-1]),
                         f'{QKV}.weight_integers.*768 values of 8 bits take 768 bytes, got 752'),
    'packed twice': (weights(f'{QKV}.weight_integers', lambda v: v.view(torch.uint8)),
                     f'{QKV}.weight_integers.*torch.int8, got torch.uint8'),
    'float integers': (weights(f'{QKV}.weight_integers', lambda v: v.float()),
                       f'{QKV}.weight_integers.*torch.int8, got torch.float32'),
    'list of integers': (weights(f'{QKV}.weight_integers', lambda v: v.tolist()), 'state_dict'),
    'no weight scale': (without(WEIGHT_SCALE), WEIGHT_SCALE),
    'no input scale': (without(INPUT_SCALE), INPUT_SCALE),
    'no input zero point': (without(INPUT_ZERO), INPUT_ZERO),
    'one weight scale': (weights(WEIGHT_SCALE, lambda v: v[0]), WEIGHT_SCALE),
    'two weight scales': (weights(WEIGHT_SCALE, lambda v: v[:2]), WEIGHT_SCALE),
    'square of weight scales': (weights(WEIGHT_SCALE, lambda v: v.view(6, 8)), WEIGHT_SCALE),
    'no weight scales': (weights(WEIGHT_SCALE, lambda v: v[:0]), WEIGHT_SCALE),
    'three input scales': (weights(INPUT_SCALE, lambda v: v.expand(3)), INPUT_SCALE),
    'uncalibrated input': (weights(INPUT_SCALE, lambda v: torch.empty(0)), INPUT_SCALE),
    'two zero points': (weights(INPUT_ZERO, lambda v: v.expand(2)), INPUT_ZERO),
    'zero point of a symmetric weight': (
        lambda c: c[STATE_KEY].update({f'{QKV}.quantizers.weight.zero_point': torch.zeros(48)}),
        'unexpected: .*weight.zero_point'),
    'scale of nan': (weights(WEIGHT_SCALE, lambda v: v * math.nan), WEIGHT_SCALE),
    'scale of infinity': (weights(INPUT_SCALE, lambda v: v * math.inf), INPUT_SCALE),
    'scale of zero': (weights(INPUT_SCALE, lambda v: v * 0), INPUT_SCALE),
    'scale of integers': (weights(WEIGHT_SCALE, lambda v: v.int()), WEIGHT_SCALE),
    'zero point of nan': (weights(INPUT_ZERO, lambda v: v * math.nan), INPUT_ZERO),
    'negative scale': (weights(INPUT_SCALE, lambda v: -v), f'{INPUT_SCALE} is not above 0'),
    'one negative weight scale': (weights(WEIGHT_SCALE, lambda v: v * (1 - 2 * torch.eye(48)[3])),
                                  f'{WEIGHT_SCALE} is not above 0'),
    'zero point above its integers': (weights(INPUT_ZERO, lambda v: v * 0 + 255.5),
                                      f'{INPUT_ZERO} is not one of the integers from 0 to 255'),
    'zero point below its integers': (weights(INPUT_ZERO, lambda v: v * 0 - 0.5), INPUT_ZERO),
    'no bias': (without(f'{QKV}.bias'), f'missing: {QKV}.bias'),
    'short bias': (weights(f'{QKV}.bias', lambda v: v[1:]), f'{QKV}.bias'),
    'bias of nan': (weights(f'{QKV}.bias', lambda v: v * math.nan), f'{QKV}.bias'),
    'norm of infinity': (weights('norm0.weight', lambda v: v + math.inf), 'norm0.weight'),
    'bias of integers': (weights(f'{QKV}.bias', lambda v: v.int()), f'{QKV}.bias'),
    'more keys': (lambda c: c[STATE_KEY].update({'head.weight': torch.zeros(1)}),
                  'unexpected: head.weight'),
    'weights by number': (lambda c: c[STATE_KEY].update({3: torch.zeros(1)}), 'state_dict'),
    'state_dict missing': (lambda c: c.pop(STATE_KEY), STATE_KEY),
    'state_dict of None': (top(quantized_state_dict=None), 'state_dict'),
    'state_dict of a list': (top(quantized_state_dict=[torch.zeros(1)]), 'state_dict'),
    'state_dict of text': (top(quantized_state_dict={'a': 'b'}), 'state_dict'),
    'empty state_dict': (top(quantized_state_dict={}), 'weight_integers|scale'),
    'manifest of None': (top(psaq_mm=None), 'not a manifest'),
    'manifest of a list': (top(psaq_mm=[1]), 'not a manifest'),
    'newer': (manifest(format_version=4), 'update psaq_mm'),
    'modules of a list': (manifest(modules=[QKV]), 'names no quantized modules'),
    'unknown op': (modules(lambda m: m[QKV].update(op='QuantGELU')),
                   rf'{QKV} \(is \w+, the checkpoint has QuantGELU\)'),
    'op of another class': (modules(lambda m: m[QKV].update(op='QuantConv2d')),
                            'the checkpoint has QuantConv2d'),
    'no op': (modules(lambda m: m[QKV].pop('op')), QKV),
    'no roles': (modules(lambda m: m[QKV].pop('roles')), QKV),
    'roles of a list': (modules(lambda m: m[QKV].update(roles=['weight'])), QKV),
    'role of None': (modules(lambda m: m[QKV]['roles'].update(input=None)), QKV),
    'role of garbage': (modules(lambda m: m[QKV]['roles'].update(input={'x': 1})),
                        f'{QKV}, input'),
    'other bits': (modules(lambda m: m[QKV]['roles']['weight'].update(bits=4)),
                   f'{QKV}.weight_integers'),
    'unknown role': (modules(lambda m: m[QKV]['roles'].update(karma=SPEC)),
                     rf'{QKV} \(.*karma'),
    'role of another op': (modules(lambda m: m[QKV]['roles'].update(query=SPEC)),
                           rf'{QKV} \(.*query'),
    'weight of an attention': (modules(lambda m: (
        m[MSA]['roles'].update(weight=SPEC), m[MSA].update(weight_shape=[1]))),
        rf'{MSA} \(.*weight'),
    'one role less': (modules(lambda m: m[QKV]['roles'].pop('input')), f'unexpected: {QKV}'),
    'one module less': (modules(lambda m: m.pop(QKV)), QKV),
    'no weight_shape': (modules(lambda m: m[QKV].pop('weight_shape')), QKV),
    'another weight_shape': (modules(lambda m: m[QKV].update(weight_shape=[16, 48])),
                             rf'{QKV}.weight \(has shape \[48, 16\]'),
    'one size less': (modules(lambda m: m[QKV].update(weight_shape=[48])), QKV),
    'module of None': (modules(lambda m: m.update({QKV: None})), QKV),
    'unnamed module': (modules(lambda m: m.update({'': m[QKV]})), 'checkpoint has QuantLinear'),
}


@pytest.fixture(scope='module')
def models():
    """They serve many tests, since none of these may change them."""
    return {'float': swin(1), 'same ops': plain_student(swin(1)),
            'calibrated': quantized()}


@pytest.mark.parametrize('present', ['float', 'same ops', 'calibrated'])
@pytest.mark.parametrize('damage, match', DAMAGE.values(), ids=list(DAMAGE))
def test_damaged(damage, match, present, checkpoint, models):
    damaged = copy.deepcopy(checkpoint)
    damage(damaged)
    # In quantized models other differences may be the first ones.
    assert_refused(models[present], damaged, match if present == 'float' else '')


@pytest.mark.parametrize('damage', [
    without(f'{QKV}.rotation.mean'), weights(f'{QKV}.rotation.mean', lambda v: v[:-1]),
    weights(f'{QKV}.rotation.mean', lambda v: torch.empty(0)),
    weights(f'{QKV}.rotation.mean', lambda v: v * math.nan)])
@pytest.mark.parametrize('present', ['float', 'same ops', 'calibrated'])
def test_damaged_rotation(present, damage):
    damaged = quantized_checkpoint(quantized(**SETTINGS['rotated inputs']))
    damage(damaged)
    model = swin(1)
    if present != 'float':
        model = plain_student(model, IMAGES if present == 'calibrated' else None,
                              **SETTINGS['rotated inputs'])
    assert_refused(model, damaged, f'{QKV}.rotation.mean')


def test_rotation_that_the_model_does_not_have():
    checkpoint = quantized_checkpoint(quantized(**SETTINGS['rotated inputs']))
    assert_refused(quantized(**bits(4, 4)), checkpoint, 'rotat')


@pytest.mark.parametrize('weight_bits, damage, match', [
    (4, lambda v: v[:-1], '768 values of 4 bits take 384 bytes, got 383'),
    (4, lambda v: torch.cat([v, v]), '768 values of 4 bits take 384 bytes, got 768'),
    (4, lambda v: v.to(torch.int8), '4-bit values are stored as torch.uint8, got torch.int8'),
    (2, lambda v: v[:-1], '768 values of 2 bits take 192 bytes, got 191'),
    (3, lambda v: v[1:], '768 values of 3 bits take 288 bytes, got 287'),
    (6, lambda v: v.to(torch.int8), '6-bit values are stored as torch.uint8, got torch.int8'),
])
def test_damaged_packing(weight_bits, damage, match):
    damaged = quantized_checkpoint(quantized(**bits(weight_bits, 8)))
    weights(f'{QKV}.weight_integers', damage)(damaged)
    assert_refused(swin(), damaged, f'{QKV}.weight_integers: {match}')


@pytest.mark.parametrize('key, value', [('scale', -1.), ('scale', 0.), ('scale', math.inf),
                                        ('zero_point', 256.), ('zero_point', -1e6)])
def test_ranges_that_would_not_load_are_not_saved(key, value):
    model = quantized()
    getattr(model.get_submodule(f'{QKV}.quantizers.input'), key).fill_(value)
    with pytest.raises(UserError, match=f'cannot be saved: {QKV}.quantizers.input.{key} is not'):
        quantized_checkpoint(model)


def test_format_1():
    """With the weights under state_dict, and observers, of which one is unknown here."""
    model = quantized(**bits(4, 4))
    checkpoint = quantized_checkpoint(model, meta=dict(epoch=3))
    manifest = checkpoint[MANIFEST_KEY]
    manifest.update(format_version=1, learnable_ranges=True)
    for entry in manifest['modules'].values():
        for spec in entry['roles'].values():
            spec.update(observer=dict(type='HalfObserver'), margin=1., bounds=None)
    old = dict(meta=checkpoint['meta'], state_dict=checkpoint[STATE_KEY], psaq_mm=manifest)
    fresh = swin(seed=1)
    load_quantized_state(fresh, old, 'old.pth')
    assert_same_outputs(outputs(fresh), outputs(model))


@pytest.mark.parametrize('weight_bits', [3, 6])
def test_format_2(weight_bits):
    """With 4 bits for each integer of 3, and a byte for each of 5 to 7."""
    model = quantized(**bits(weight_bits, 8))
    checkpoint = quantized_checkpoint(model)
    state, manifest = checkpoint[STATE_KEY], checkpoint[MANIFEST_KEY]
    for name, entry in manifest['modules'].items():
        key, shape = f'{name}.weight_integers', entry.get('weight_shape')
        if shape is not None and entry['roles']['weight']['bits'] == weight_bits:
            state[key] = pack_integers(unpack_integers(state[key], weight_bits, shape),
                                       4 if weight_bits == 3 else 8)
    fresh = swin(seed=1)
    with pytest.raises(UserError, match='damaged: .*weight_integers'):
        load_quantized_state(fresh, checkpoint, 'old.pth')
    manifest['format_version'] = 2
    load_quantized_state(fresh, checkpoint, 'old.pth')
    assert_same_outputs(outputs(fresh), outputs(model))


def test_observer_that_is_not_known_where_it_is_loaded(tmp_path):
    with observer_of_the_user():
        model = quantized(activation=dict(observer=dict(type='HalfObserver')))
        psaq_mm.save(model, tmp_path / 'quantized.pth')
    with pytest.raises(UserError, match="'HalfObserver' is not registered"):
        quantized(activation=dict(observer=dict(type='HalfObserver')))
    assert_same_outputs(outputs(psaq_mm.load(swin(seed=1), tmp_path / 'quantized.pth')),
                        outputs(model))


@contextlib.contextmanager
def observer_of_the_user():
    @OBSERVERS.register_module()
    class HalfObserver(MinMaxObserver):

        def range(self):
            lower, upper = super().range()
            return lower / 2, upper / 2

    yield
    OBSERVERS.module_dict.pop('HalfObserver')


def test_float_weights_under_a_manifest():
    """What a runner saves while it trains."""
    model = quantized(**bits(4, 8))
    training = guarded(model.state_dict(), quantized_checkpoint(model)[MANIFEST_KEY])
    fresh = swin(seed=1)
    load_quantized_state(fresh, training, 'epoch_1.pth')
    assert_same_outputs(outputs(fresh), outputs(model))
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    del training[STATE_KEY][f'{QKV}.weight']
    assert_refused(swin(), training, f'{QKV}.weight_integers is missing')


def test_weights_that_are_replaced_play_no_part(checkpoint):
    """Not even such as could not be quantized."""
    model = swin()
    model.stages[0].blocks[0].ffn.layers[1].weight.data[3, 3] = math.nan
    load_quantized_state(model, checkpoint, 'quantized.pth')
    assert_same_outputs(outputs(model), outputs(quantized()))


def test_layer_under_two_names_is_stored_once():
    """Detectors may share a layer between feature levels."""

    def shared():
        model = swin()
        layers = [block.ffn.layers for block in model.stages[0].blocks]
        layers[1][1] = layers[0][1]
        return model

    x = torch.randn(1, 3, 56, 56)
    student = plain_student(shared(), x)
    checkpoint = quantized_checkpoint(student)
    stored = [k for k in checkpoint[STATE_KEY] if '.ffn.layers.1.' in k and 'stages.0' in k]
    assert stored and not any('blocks.1' in k for k in stored)
    other = shared()
    other.load_state_dict(prepare_for_loading(other, checkpoint, 'x.pth'))
    with torch.no_grad():
        for a, b in zip(student(x), other(x)):
            assert torch.equal(a, b)
