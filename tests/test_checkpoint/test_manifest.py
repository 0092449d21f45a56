# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import copy
import json

import pytest
import torch
from conftest import plain_student
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import MANIFEST_KEY, build_manifest, is_quantized, read_manifest
from psaq_mm.checkpoint.manifest import FORMAT_VERSION, plan_of_manifest
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan, plan_quantization
from psaq_mm.quantization import QuantSpec
from psaq_mm.recipe.quantization import QuantizationSettings


def swin():
    model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                            out_indices=(0, 1))
    model.eval()
    return model


def small():
    """A model with one quantized linear, and its manifest as a file has it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    apply_plan(model, {'0': dict(weight=QuantSpec(bits=4, granularity='per_channel'),
                                 input=QuantSpec(symmetric=False))})
    return model


def format_of(spec):
    return QuantSpec(bits=spec.bits, symmetric=spec.symmetric, granularity=spec.granularity)


@pytest.fixture
def checkpoint():
    return {'state_dict': {}, MANIFEST_KEY: build_manifest(small())}


def plan_of(checkpoint):
    return plan_of_manifest(read_manifest(checkpoint))


def test_content():
    assert build_manifest(small(), dict(seed=3, source='swin.pth')) == dict(
        format_version=FORMAT_VERSION,
        psaq_mm_version=psaq_mm.__version__,
        modules={'0': dict(op='QuantLinear', weight_shape=[3, 2], roles=dict(
            weight=dict(bits=4, symmetric=True, granularity='per_channel'),
            input=dict(bits=8, symmetric=False, granularity='per_tensor')))},
        seed=3, source='swin.pth')


@pytest.mark.parametrize('key', ['format_version', 'psaq_mm_version', 'modules'])
def test_own_entries_cannot_be_replaced(key):
    with pytest.raises(UserError, match=f'{key}.* cannot be recorded'):
        build_manifest(small(), {key: 1})


@pytest.mark.parametrize('settings', [
    dict(), dict(placement='v1', activation=dict(bits=4)),
    dict(weight=dict(bits=2, symmetric=False, observer=dict(type='MSEObserver', candidates=9))),
    dict(include='stages.1.*', overrides={'*.qkv': dict(weight=dict(bits=5))}),
])
def test_plan_survives(settings):
    """From a plan to a manifest, through JSON, and back to the same formats."""
    model = swin()
    chosen = QuantizationSettings.from_dict(settings)
    plan = plan_quantization(model, chosen, find_adapter(model))
    apply_plan(model, plan)
    manifest = json.loads(json.dumps(build_manifest(model)))
    for name, entry in manifest['modules'].items():
        assert entry['op'] == type(model.get_submodule(name)).__name__
    assert plan_of({MANIFEST_KEY: manifest}) == {
        name: {role: format_of(spec) for role, spec in specs.items()}
        for name, specs in plan.items()}


def test_how_a_range_was_found_is_ignored(checkpoint):
    """Format 1 told it, and the observer may be known nowhere else."""
    before = plan_of(checkpoint)
    checkpoint[MANIFEST_KEY].update(format_version=1, learnable_ranges=True)
    checkpoint[MANIFEST_KEY]['modules']['0']['roles']['input'].update(
        observer=dict(type='HalfObserver', share=0.5), margin=1., bounds=[0, 1])
    assert plan_of(checkpoint) == before


def test_number_of_modules():
    """By hand: 18 linear and convolution layers, 4 attentions; V1 adds the
    patch embedding and 4 blocks."""
    model = plain_student(swin())
    assert len(build_manifest(model)['modules']) == 22
    model = plain_student(swin(), placement='v1')
    assert len(build_manifest(model)['modules']) == 27


def test_is_quantized(checkpoint):
    assert is_quantized(checkpoint)
    assert is_quantized({MANIFEST_KEY: None})  # claims to be, and read_manifest refuses
    for other in ({}, {'state_dict': {}}, [MANIFEST_KEY], MANIFEST_KEY, None, torch.zeros(1)):
        assert not is_quantized(other)


def test_right_manifest(checkpoint):
    before = copy.deepcopy(checkpoint)
    assert list(plan_of(checkpoint)) == ['0']
    assert checkpoint == before
    checkpoint[MANIFEST_KEY]['written_by_a_later_version'] = 1  # of the same format
    checkpoint[MANIFEST_KEY]['modules']['0']['note'] = 'x'
    assert plan_of(checkpoint) == plan_of(before)


@pytest.mark.parametrize('manifest', [None, [], 'text', 3, torch.zeros(2), {}])
def test_no_manifest(manifest):
    with pytest.raises(UserError, match=r'is not a manifest \(no format_version\)'):
        read_manifest({MANIFEST_KEY: manifest})


@pytest.mark.parametrize('version', [None, '1', 1.0, True, 0, -1, [1]])
def test_damaged_version(checkpoint, version):
    checkpoint[MANIFEST_KEY]['format_version'] = version
    with pytest.raises(UserError, match='format_version.*damaged, quantize again'):
        read_manifest(checkpoint)


def test_newer_version(checkpoint):
    checkpoint[MANIFEST_KEY] = dict(format_version=FORMAT_VERSION + 1)  # whatever else it holds
    with pytest.raises(UserError, match='format version 4, this psaq_mm reads up to 3: update'):
        read_manifest(checkpoint)


@pytest.mark.parametrize('modules', [None, {}, [], ['0'], 'text', 5])
def test_no_modules(checkpoint, modules):
    checkpoint[MANIFEST_KEY]['modules'] = modules
    with pytest.raises(UserError, match='names no quantized modules'):
        read_manifest(checkpoint)


GARBAGE = [None, [], {}, 'text', 5, [1], {1: 2}]


@pytest.mark.parametrize('key', ['op', 'roles', 'weight_shape'])
@pytest.mark.parametrize('value', [*GARBAGE, 'missing'])
def test_damaged_entry(checkpoint, key, value):
    entry = checkpoint[MANIFEST_KEY]['modules']['0']
    if value == 'missing':
        del entry[key]
    else:
        entry[key] = value
    if (key, value) in [('op', 'text'), ('weight_shape', []), ('weight_shape', [1])]:
        plan_of(checkpoint)  # as good as any other; the model's modules tell
        return
    with pytest.raises(UserError, match='manifest.* 0'):
        plan_of(checkpoint)


@pytest.mark.parametrize('entry', GARBAGE)
def test_entry_that_is_none(checkpoint, entry):
    checkpoint[MANIFEST_KEY]['modules']['0'] = entry
    with pytest.raises(UserError, match='manifest.* 0'):
        plan_of(checkpoint)


def test_name_that_is_no_text(checkpoint):
    modules = checkpoint[MANIFEST_KEY]['modules']
    modules[0] = modules.pop('0')
    with pytest.raises(UserError, match='manifest.* 0'):
        plan_of(checkpoint)


@pytest.mark.parametrize('shape', [[3, -2], [3, 2.], [3, '2'], [True, 2]])
def test_damaged_shape(checkpoint, shape):
    checkpoint[MANIFEST_KEY]['modules']['0']['weight_shape'] = shape
    with pytest.raises(UserError, match='manifest.* 0'):
        plan_of(checkpoint)


RIGHT = dict(bits=8, symmetric=True, granularity='per_tensor')


@pytest.mark.parametrize('spec', [
    None, [], 'text', 5, {1: 2}, dict(bits=8, symmetric=True), dict(RIGHT, bits=9),
    dict(RIGHT, bits=1), dict(RIGHT, bits='8'), dict(RIGHT, bits=None), dict(RIGHT, symmetric=1),
    dict(RIGHT, granularity='per_row'), dict(RIGHT, granularity=['per_tensor']),
])
def test_damaged_spec(checkpoint, spec):
    checkpoint[MANIFEST_KEY]['modules']['0']['roles']['input'] = spec
    with pytest.raises(UserError, match='manifest of 0, input|manifest does not say how 0'):
        plan_of(checkpoint)
