# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The public steps on whole models: what they give, and what they refuse.

Each refuses to run out of order and names what comes first; none does nothing without
saying so.
"""
import copy
import math

import pytest
import timm
import torch
from mmseg.models.backbones import SwinTransformer as MMSegSwin
from small_models import (
    assert_state,
    detector,
    left_as_it_was,
    partly_trained,
    raw_outputs,
    state_of,
    swin,
    widen,
)

import psaq_mm
from psaq_mm import EvolutionSettings, QuantizationSettings, UserError
from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import STATE_KEY, load_checkpoint_file
from psaq_mm.ops import named_quant_ops

NONE = dict(channel_limit=None)
GPTQ = dict(NONE, weight=dict(bits=4, rounding='gptq'))


def settings(**values):
    return QuantizationSettings.from_dict(values)


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56)


@pytest.fixture
def student(images):
    """A calibrated student, whose weights are to be rounded by GPTQ."""
    return psaq_mm.calibrate(psaq_mm.prepare(swin(), settings(**GPTQ)), images)


def weights(model):
    return {name: op.weight.detach().clone() for name, op in named_quant_ops(model)
            if op.weight_quantizer is not None}


# Calibration


def test_calibrate_restores_the_modes(images):
    student = psaq_mm.prepare(partly_trained(), settings(**NONE))
    student.train()
    student.stages[0].eval()
    modes = {m: m.training for m in student.modules()}
    psaq_mm.calibrate(student, images)
    assert {m: m.training for m in student.modules()} == modes
    with pytest.raises(KeyboardInterrupt):
        psaq_mm.calibrate(student, images, progress=interrupt)
    assert {m: m.training for m in student.modules()} == modes


def interrupt(done):
    raise KeyboardInterrupt


# Wide channels


def quantized_error(model, images, equalized, **values):
    """Relative squared error of the feature maps."""
    chosen = settings(**dict(values, channel_limit=1.5 if equalized else None))
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        expected = teacher(images)
    if equalized:
        psaq_mm.equalize(teacher, images, chosen)
    student = psaq_mm.calibrate(psaq_mm.prepare(teacher, chosen), images)
    with torch.no_grad():
        return sum(float((a - b).square().sum() / a.square().sum())
                   for a, b in zip(expected, student(images)))


def test_wide_channels_do_no_harm():
    """However the scale is shared between norms and weights: the same function quantizes
    as well."""
    images = torch.rand(4, 3, 64, 72, generator=torch.Generator().manual_seed(3)) * 2 - 1
    plain_ranges = dict(roles=dict(_delete_=True), overrides=dict(_delete_=True),
                        activation=dict(margin=0.), weight=dict(rounding='nearest'))
    model = swin()
    assert len(find_adapter(model).norm_readers(model)) == 2 * 4 + 1
    wide = widen(copy.deepcopy(model))
    chosen = psaq_mm.Recipe().changed(dict(quantization=plain_ranges)).to_dict()['quantization']
    plain, harmed = (quantized_error(m, images, False, **chosen) for m in (model, wide))
    assert harmed > 5 * plain
    assert quantized_error(wide, images, True, **chosen) < 1.5 * plain


@pytest.mark.parametrize('build', [
    lambda: MMSegSwin(pretrain_img_size=64, embed_dims=16, depths=(1, 2), num_heads=(1, 2),
                      strides=(4, 2), out_indices=(0, 1)),
    lambda: timm.create_model('swin_tiny_patch4_window7_224', img_size=64, embed_dim=16,
                              depths=(1, 2), num_heads=(1, 2), window_size=4),
    lambda: timm.create_model('deit_tiny_patch16_224', img_size=64, embed_dim=16, depth=2,
                              num_heads=2)], ids=['mmseg', 'swin', 'deit'])
def test_equalize_leaves_what_other_hosts_compute(build):
    model, images = build(), torch.randn(2, 3, 64, 64)
    model.eval()
    adapter = find_adapter(model)
    widen(model)
    with torch.no_grad():
        expected = adapter.forward_backbone(model, images)
    before = state_of(model)
    psaq_mm.equalize(model, images)
    assert not all(torch.equal(a, b) for a, b in zip(before.values(), state_of(model).values()))
    with torch.no_grad():
        for found, value in zip(adapter.forward_backbone(model, images), expected):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_equalize_leaves_what_it_computes():
    model = widen(detector())
    modes, images = [m.training for m in model.modules()], torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected = model.backbone(images)
    assert psaq_mm.equalize(model, images, batch_size=2) is model
    with torch.no_grad():
        for found, value in zip(model.backbone(images), expected):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    for norm in find_adapter(model).norm_readers(model):
        weight = model.get_submodule(norm).weight
        assert weight[3] < 4 * weight.median(), norm
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize('values', [
    dict(placement=['weight', 'query']), dict(exclude=['*.qkv', '*ffn*', '*.reduction'])])
def test_equalize_leaves_norms_whose_readers_have_float_inputs(values, images):
    model = widen(swin())
    before = state_of(model)
    psaq_mm.equalize(model, images, settings(**values))
    assert_state(model, before)


def test_what_equalize_refuses(student, images):
    teacher = swin()
    before = state_of(teacher)
    for change, message in (
            (dict(images=images[:0]), r'psaq_mm.equalize needs float32 images of shape \(N, C, '),
            (dict(model=student), 'psaq_mm.equalize needs the float model'),
            (dict(batch_size=0), 'batch_size must be'),
            (dict(settings=settings(**NONE)), 'channel_limit is None, so there is nothing to do; '
                                              'give it a limit such as 1.5'),
            (dict(images=images * float('nan')),
             '^equalization failed: .*norm.*: values are not finite')):
        with pytest.raises(UserError, match=message):
            psaq_mm.equalize(**{**dict(model=teacher, images=images), **change})
        assert_state(teacher, before)
    for limit in (0.5, True, math.nan):
        with pytest.raises(UserError, match='channel_limit must be None or a number from 1 on'):
            settings(channel_limit=limit)
    broken = swin()
    with torch.no_grad():
        broken.stages[1].blocks[0].norm2.weight[3] = float('nan')
    with pytest.raises(UserError, match=r'NaN or infinity in stages.1.blocks.0.norm2.weight'):
        psaq_mm.equalize(broken, images)


# Rounding


@pytest.mark.parametrize('size', [None, (96, 64)])
def test_round_weights(size, tmp_path):
    """Of a whole detector: what was learned stays, the rest goes to its integers, and they
    are what a checkpoint keeps."""
    teacher, images = detector(), torch.randn(3, 3, 64, 64)
    student = psaq_mm.prepare(teacher, settings(**dict(GPTQ, scope='model')))
    psaq_mm.calibrate(student, images)
    if size is not None:
        psaq_mm.recalibrate(student, images, size)
    counts = []
    learned = student.backbone.stages[0].blocks[0].ffn.layers[1]
    with torch.no_grad():
        learned.weight.mul_(0.9)
    learned.weight_settled = True
    modes, before = [m.training for m in student.modules()], weights(student)
    assert psaq_mm.round_weights(student, images, 2, counts.append) is student
    assert counts == ([2, 1] if size is None else [1, 1])
    for name, op in named_quant_ops(student):
        if op.weight_quantizer is None:
            continue
        changed = not torch.equal(op.weight, before[name])
        if name == 'backbone.stages.0.blocks.0.ffn.layers.1':
            assert not changed
        else:
            assert changed and torch.equal(op.weight_quantizer(op.weight), op.weight), name
    assert [m.training for m in student.modules()] == modes
    expected = raw_outputs(student, images)
    psaq_mm.save(student, tmp_path / 'quantized.pth')
    other = detector()
    psaq_mm.load(other, str(tmp_path / 'quantized.pth'))
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(other, images), expected))


def test_what_round_weights_refuses(student, images):
    before = weights(student)
    for change, message in (
            (dict(images=images[:0]), r'psaq_mm.round_weights needs float32 images of shape \(N'),
            (dict(images=None), r'needs float32 images of shape .*, got NoneType'),
            (dict(student=psaq_mm.prepare(swin(), settings(**GPTQ))),
             'round_weights needs a calibrated student, .* has no range: call psaq_mm.calibrate'),
            (dict(student=swin()), 'needs a student, .*: call psaq_mm.prepare first'),
            (dict(batch_size=0), 'batch_size must be')):
        with pytest.raises(UserError, match=message):
            psaq_mm.round_weights(**{**dict(student=student, images=images), **change})
    assert all(torch.equal(weight, before[name]) for name, weight in weights(student).items())


def test_nothing_to_round(student, images):
    """Said, and refused: by weights that ask for nothing, and a second time."""
    nearest = psaq_mm.calibrate(psaq_mm.prepare(swin(), settings(
        **dict(NONE, weight=dict(rounding='nearest')))), images)
    psaq_mm.round_weights(student, images)
    for model in (nearest, student):
        before = weights(model)
        with pytest.raises(UserError, match='no weight is left to round by GPTQ'):
            psaq_mm.round_weights(model, images)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())


def test_rounding_of_a_layer_with_two_names(images):
    """That it was learned counts by either name."""
    teacher = swin()
    teacher.stages[0].blocks[1] = teacher.stages[0].blocks[0]
    student = psaq_mm.calibrate(psaq_mm.prepare(teacher, settings(**GPTQ)), images)
    learned = student.stages[0].blocks[1].attn.w_msa.qkv
    with torch.no_grad():
        learned.weight.mul_(0.9)
    learned.weight_settled = True
    before = weights(student)
    psaq_mm.round_weights(student, images)
    assert [name for name, weight in weights(student).items()
            if torch.equal(weight, before[name])] == ['stages.0.blocks.0.attn.w_msa.qkv']


def test_rounding_of_what_is_not_finite(images):
    student = psaq_mm.calibrate(psaq_mm.prepare(swin(), settings(**GPTQ)), images)
    with pytest.raises(UserError, match=r'^rounding failed: .* \(weight\): inputs of the layer '
                                        'are not finite'):
        psaq_mm.round_weights(student, images * float('nan'))


def test_rounding_helps_the_outputs():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    teacher = swin()

    def error(rounding):
        model = psaq_mm.prepare(teacher, settings(**dict(
            NONE, weight=dict(bits=3, rounding=rounding))))
        psaq_mm.calibrate(model, images)
        if rounding == 'gptq':
            psaq_mm.round_weights(model, images)
        with torch.no_grad():
            return sum(float((a - b).square().sum())
                       for a, b in zip(teacher(images), model(images)))

    assert error('gptq') < 0.8 * error('nearest')


# The order


def test_steps_name_what_comes_first(images):
    """Of a float model, and of a student without ranges."""
    model = swin()
    prepared = psaq_mm.prepare(model, settings(**NONE))
    game = EvolutionSettings(rounds=1, student_steps=1, batch_size=2)
    steps = dict(
        calibrate=lambda student: psaq_mm.calibrate(student, images),
        recalibrate=lambda student: psaq_mm.recalibrate(student, images, (64, 64)),
        evolve=lambda student: psaq_mm.evolve(student, model, images, game),
        round_weights=lambda student: psaq_mm.round_weights(student, images))
    for name, step in steps.items():
        with left_as_it_was(model), pytest.raises(
                UserError, match=f'psaq_mm.{name} needs a .*: call psaq_mm.prepare first'):
            step(model)
        if name != 'calibrate':
            with left_as_it_was(prepared), pytest.raises(
                    UserError, match=f'psaq_mm.{name} needs a calibrated student, and .* has no '
                                     'range: call psaq_mm.calibrate first'):
                step(prepared)


def test_what_evolve_refuses(student, images):
    teacher = psaq_mm.unwrap(copy.deepcopy(student))
    shorter = copy.deepcopy(teacher)
    del shorter.stages[1].blocks[1]
    game = EvolutionSettings(rounds=1, student_steps=1, batch_size=2)
    for change, message in (
            (dict(settings=EvolutionSettings()), 'evolution.rounds is 0, so there is nothing to '),
            (dict(teacher=student), r'evolve \(as teacher\) needs the float model'),
            (dict(teacher=swin()), r'is not the float model of the student: .* differs; '
                                   'psaq_mm.equalize comes before psaq_mm.prepare'),
            (dict(teacher=shorter), r'of the student: stages.1.blocks.1.* is missing'),
            (dict(images=images[:0]), 'psaq_mm.evolve needs float32 images')):
        with left_as_it_was(student), pytest.raises(UserError, match=message):
            psaq_mm.evolve(**{**dict(student=student, teacher=teacher, images=images,
                                     settings=game), **change})
    assert psaq_mm.evolve(student, teacher, images, game) is student


def test_teacher_of_before_it_was_equalized(images):
    """Its weights differ from the student's by more than what was learned."""
    before = widen(swin())
    teacher = psaq_mm.equalize(copy.deepcopy(before), images)
    student = psaq_mm.calibrate(psaq_mm.prepare(teacher), images)
    game = EvolutionSettings(rounds=1, student_steps=1, batch_size=2)
    with pytest.raises(UserError, match=r'norm.*\.weight differs; psaq_mm.equalize comes before'):
        psaq_mm.evolve(student, before, images, game)
    psaq_mm.evolve(student, teacher, images, game)


def test_what_was_learned_and_rounded_is_in_the_state_dict(images):
    """Another student that loads it knows what its weights and ranges are."""
    teacher = swin()
    chosen = settings(**GPTQ)
    student = psaq_mm.calibrate(psaq_mm.prepare(teacher, chosen), images)
    ops = dict(named_quant_ops(student))
    first, *_ = (name for name, op in ops.items() if op.awaits_gptq)
    ops[first].weight_settled = True  # as after the game
    ops[first].quantizers['input'].learned = True
    other = psaq_mm.prepare(teacher, chosen)
    assert other.load_state_dict(student.state_dict()).unexpected_keys == []
    loaded = dict(named_quant_ops(other))
    assert [n for n, op in loaded.items() if op.weight_settled] == [first]
    assert [n for n, op in loaded.items() for q in op.quantizers.values() if q.learned] == [first]
    before = loaded[first].weight.clone()
    psaq_mm.round_weights(other, images)
    assert torch.equal(before, loaded[first].weight)
    third = psaq_mm.prepare(teacher, chosen)
    third.load_state_dict(other.state_dict())
    assert not any(op.awaits_gptq for _, op in named_quant_ops(third))
    # What is not noted there is not so.
    third.load_state_dict(psaq_mm.calibrate(psaq_mm.prepare(teacher, chosen), images).state_dict())
    assert not any(op.weight_settled for _, op in named_quant_ops(third))


def test_state_dict_of_other_bits(images):
    teacher = swin()
    student = psaq_mm.calibrate(psaq_mm.prepare(teacher, settings(**NONE)), images)
    other = psaq_mm.prepare(teacher, settings(**NONE, weight=dict(bits=4)))
    with pytest.raises(UserError, match=r'\(weight\): the state dict is quantized to 8 bits '
                                        r'\(symmetric\), the model to 4 bits \(symmetric\)'):
        other.load_state_dict(student.state_dict())


def test_notes_are_not_in_the_file(images, tmp_path):
    teacher = swin()
    student = psaq_mm.calibrate(psaq_mm.prepare(teacher, settings(**GPTQ)), images)
    psaq_mm.round_weights(student, images)
    psaq_mm.save(student, tmp_path / 'quantized.pth')
    assert not any('psaq_mm' in key for key in
                   load_checkpoint_file(str(tmp_path / 'quantized.pth'))[STATE_KEY])
    waiting = psaq_mm.calibrate(psaq_mm.prepare(teacher, settings(**GPTQ)), images)
    psaq_mm.save(psaq_mm.load(waiting, tmp_path / 'quantized.pth'), tmp_path / 'again.pth')
