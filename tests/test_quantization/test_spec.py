# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""QuantSpec: values, errors and its way through JSON."""
import dataclasses
import json
import sys

import pytest

from psaq_mm.errors import UserError
from psaq_mm.quantization import MinMaxObserver, MSEObserver, PercentileObserver, QuantSpec


def test_defaults():
    spec = QuantSpec()
    assert spec.to_dict() == dict(bits=8, symmetric=True, granularity='per_tensor',
                                  observer=dict(type='MinMaxObserver'), margin=0., bounds=None,
                                  rounding='nearest', rotate=False)


@pytest.mark.parametrize('bits, symmetric, expected', [
    (2, True, (-1, 1)), (3, True, (-3, 3)), (4, True, (-7, 7)), (8, True, (-127, 127)),
    (2, False, (0, 3)), (3, False, (0, 7)), (4, False, (0, 15)), (8, False, (0, 255))
])
def test_integer_range(bits, symmetric, expected):
    assert QuantSpec(bits, symmetric).integer_range == expected


@pytest.mark.parametrize('bits', [-8, 0, 1, 9, 32, True, False, 4.0, '8', None])
def test_bits_out_of_range(bits):
    with pytest.raises(UserError, match='bits must be an integer from 2 to 8, got') as error:
        QuantSpec(bits=bits)
    assert repr(bits) in str(error.value)


@pytest.mark.parametrize('symmetric', [1, 0, 'True', None])
def test_symmetric_is_no_bool(symmetric):
    with pytest.raises(UserError, match='symmetric must be True or False, got'):
        QuantSpec(symmetric=symmetric)


@pytest.mark.parametrize('granularity', ['per_row', '', None, 'PER_TENSOR'])
def test_unknown_granularity(granularity):
    with pytest.raises(UserError, match="granularity must be 'per_tensor', 'per_channel' or "
                                        "'per_token', got"):
        QuantSpec(granularity=granularity)


@pytest.mark.parametrize('rounding', ['GPTQ', 'floor', '', None, True])
def test_unknown_rounding(rounding):
    with pytest.raises(UserError, match="rounding must be 'nearest' or 'gptq', got"):
        QuantSpec(rounding=rounding)


@pytest.mark.parametrize('observer', [
    'MinMaxObserver', {}, dict(percentile=1.), None, 5, dict(type=MinMaxObserver), dict(type=5)
])
def test_observer_is_no_config(observer):
    with pytest.raises(UserError, match="observer must be a dict with a 'type'"):
        QuantSpec(observer=observer)


@pytest.mark.parametrize('kind', [
    'MinMax', 'Linear', 'mmdet.MinMaxObserver', '', 'types.SimpleNamespace', 'torch.nn.Linear'
])
def test_unknown_observer(kind):
    with pytest.raises(UserError, match='is not registered; known: .*MinMaxObserver'):
        QuantSpec(observer=dict(type=kind))


def test_observer_names_no_code_to_import():
    # A spec may come from a checkpoint of unknown origin.
    sys.modules.pop('this', None)
    with pytest.raises(UserError, match="observer type 'this.s' is not registered"):
        QuantSpec(observer=dict(type='this.s'))
    assert 'this' not in sys.modules


def test_observer_with_its_scope():
    spec = QuantSpec(observer=dict(type='psaq_mm.MSEObserver'))
    assert type(spec.build_observer()) is MSEObserver


@pytest.mark.parametrize('observer, message', [
    (dict(type='MinMaxObserver', percentile=0.9), 'observer MinMaxObserver: .*percentile'),
    (dict(type='PercentileObserver', percentil=0.9), 'observer PercentileObserver: .*percentil'),
    (dict(type='PercentileObserver', percentile='most'), 'observer PercentileObserver: '),
    (dict(type='PercentileObserver', percentile=2.), 'observer.percentile must be in'),
    (dict(type='MSEObserver', candidates=0), 'candidates must be an integer of at least 2'),
    (dict(type='MSEObserver', candidates=60.), 'candidates must be an integer of at least 2'),
    (dict(type='MSEObserver', samples=1e4), 'samples must be an integer of at least 2'),
])
def test_wrong_arguments_of_the_observer(observer, message):
    with pytest.raises(UserError, match=message):
        QuantSpec(observer=observer)


def test_build_observer():
    spec = QuantSpec(bits=4, observer=dict(type='PercentileObserver', percentile=0.9, samples=7))
    observer = spec.build_observer()
    assert type(observer) is PercentileObserver
    assert (observer.percentile, observer.samples, observer.spec) == (0.9, 7, spec)
    assert spec.build_observer() is not observer
    assert type(QuantSpec(observer=dict(type='MSEObserver')).build_observer()) is MSEObserver


@pytest.mark.parametrize('spec', [
    QuantSpec(),
    QuantSpec(bits=2, symmetric=False, granularity='per_channel'),
    QuantSpec(bits=5, observer=dict(type='MSEObserver', candidates=20, min_factor=0.3)),
])
def test_round_trip_through_json(spec):
    again = QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert again.to_dict() == spec.to_dict()
    assert dataclasses.replace(spec, bits=7) != spec


def test_from_dict():
    assert QuantSpec.from_dict({}) == QuantSpec()
    assert QuantSpec.from_dict(dict(bits=3, _scope_='mmdet')) == QuantSpec(bits=3)
    with pytest.raises(UserError, match=r"unknown key weight\.bitz\. Did you mean 'bits'\?"):
        QuantSpec.from_dict(dict(bitz=3), 'weight')
    with pytest.raises(UserError, match=r'weight\.bits must be an integer from 2 to 8, got 1'):
        QuantSpec.from_dict(dict(bits=1), 'weight')
    with pytest.raises(UserError, match='weight must be a dict, got 4'):
        QuantSpec.from_dict(4, 'weight')


def test_frozen_and_apart_from_its_arguments():
    rule = dict(type='MSEObserver', candidates=20, _scope_='psaq_mm')
    spec = QuantSpec(observer=rule)
    rule['candidates'] = 30
    assert spec.observer == dict(type='MSEObserver', candidates=20)
    spec.to_dict()['observer']['candidates'] = 40
    assert spec.observer['candidates'] == 20
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 4
