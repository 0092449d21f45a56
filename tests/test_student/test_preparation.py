# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The student: a copy of the float model with quantized ops."""
import math

import pytest
import torch
from small_models import detector, left_as_it_was, partly_trained, swin

import psaq_mm
from psaq_mm import QuantizationSettings, UserError
from psaq_mm.adapters import find_adapter
from psaq_mm.engine import build_float_model, load_config, read_recipe
from psaq_mm.ops import QuantOp, named_quant_ops, plan_quantization
from psaq_mm.student import scope_of


def settings(**values):
    return QuantizationSettings.from_dict(dict(dict(channel_limit=None), **values))


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56)


def test_student(images):
    """It computes what the model does until it is calibrated; unwrap gives that back."""
    model = swin()
    expected = [out.detach() for out in model(images)]
    with left_as_it_was(model):
        student = psaq_mm.prepare(model, settings(
            weight=dict(bits=4, rounding='nearest')))
        assert student is not model and len(dict(named_quant_ops(student))) == 22
        assert not list(named_quant_ops(model))
        assert all(torch.equal(a, b) for a, b in zip(student(images), expected))
        assert psaq_mm.calibrate(student, images) is student
        assert not torch.equal(student(images)[1], expected[1])
        assert all(torch.equal(a, b) for a, b in zip(model(images), expected))
        assert psaq_mm.unwrap(student) is student
        assert {n: type(m) for n, m in student.named_modules()} == {
            n: type(m) for n, m in model.named_modules()}
        assert all(torch.equal(a, b) for a, b in zip(student(images), expected))


def test_student_is_in_evaluation_mode():
    """Whatever the model is in, and is left in; what is frozen is so in both."""
    model = partly_trained()
    with left_as_it_was(model):
        student = psaq_mm.prepare(model, settings())
    assert not any(m.training for m in student.modules())
    assert {n: p.requires_grad for n, p in student.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('values, match', [
    (dict(weight=dict(bits=9)), 'quantization.weight.bits must be an integer from 2 to 8'),
    (dict(bits=4), 'unknown key quantization.bits'),
    (dict(include='layers.*'), "'layers.*' matches no module"),
    (dict(exclude='*'), 'nothing is left to quantize'),
    (dict(placement='v2'), 'placement must be one of'),
])
def test_refused(values, match):
    model = swin()
    with left_as_it_was(model), pytest.raises(UserError, match=match):
        psaq_mm.prepare(model, settings(**values))


def test_twice():
    student = psaq_mm.prepare(swin(), settings())
    with left_as_it_was(student), pytest.raises(UserError, match='needs the float model, and '
                                                                 'this one is quantized'):
        psaq_mm.prepare(student, settings())
    psaq_mm.prepare(psaq_mm.unwrap(student), settings(weight=dict(bits=4)))


def test_wide_channels_come_first(images):
    """Their limit is no setting of the student alone: prepare names what is missing."""
    model = swin()
    with left_as_it_was(model), pytest.raises(
            UserError, match='call psaq_mm.equalize first, .*channel_limit=1.5, or set it to '
                             'None'):
        psaq_mm.prepare(model)
    psaq_mm.equalize(model, images)
    with left_as_it_was(model):
        psaq_mm.prepare(model)
        for other, match in ((2., 'call psaq_mm.equalize first'),
                             (None, 'the model was equalized for channel_limit=1.5')):
            with pytest.raises(UserError, match=match):
                psaq_mm.prepare(model, settings(channel_limit=other))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = swin()
    bad = model.stages[1].blocks[0].ffn.layers[1]
    bad.weight.data[2, 3] = value
    with pytest.raises(UserError, match=r'NaN or infinity in stages.1.blocks.0.ffn.layers.1.wei'):
        psaq_mm.prepare(model, settings())
    assert not list(named_quant_ops(model))
    psaq_mm.prepare(model, settings(exclude='stages.1.blocks.0.ffn.*'))  # not looked at
    psaq_mm.prepare(model, settings(placement=['input']))


def test_failure_on_the_way(monkeypatch):
    """Whatever happens between two modules, the model is as it was."""
    from_float = QuantOp.from_float.__func__
    made = []

    def fail(cls, *args):
        made.append(cls)
        if len(made) == 5:
            raise MemoryError
        return from_float(cls, *args)

    monkeypatch.setattr(QuantOp, 'from_float', classmethod(fail))
    model = swin()
    with left_as_it_was(model), pytest.raises(MemoryError):
        psaq_mm.prepare(model, settings())
    assert len(made) == 5


@pytest.mark.parametrize('values, expected', [
    (dict(scope='backbone'), 'backbone'), (dict(), 'model'),
    (dict(scope='model', include='backbone.*'), 'backbone'),
    (dict(scope='model', include='neck.*'), 'model'),
])
def test_scope(values, expected):
    student = psaq_mm.prepare(detector(), settings(**values))
    assert scope_of(student, find_adapter(student)) == expected


@pytest.mark.parametrize('name, observer', [
    ('upernet_swin_demo', 'MAEObserver'), ('mask_rcnn_swin_demo', 'MSEObserver')])
def test_one_base_for_all_families(name, observer, tmp_path):
    """Softmax outputs of segmentors need another range rule than those of detectors at
    4 bits; the same ``w4a4`` gives each its own."""
    from conftest import DEMO, ROOT
    config = tmp_path / 'x.py'
    config.write_text(f"_base_ = ['{DEMO}/{name}.py', '{ROOT}/configs/_base_/w4a4.py']\n")
    loaded = load_config(config)
    recipe, model = read_recipe(loaded), build_float_model(loaded)
    assert recipe == psaq_mm.Recipe.shipped('w4a4')
    plan = plan_quantization(model, recipe.quantization, find_adapter(model))
    found = [specs['attention'] for specs in plan.values() if 'attention' in specs]
    assert len(found) == 10  # blocks of the demo models
    assert {spec.observer['type'] for spec in found} == {observer}
    assert {spec.bits for spec in found} == {4}
