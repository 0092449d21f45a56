# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Blocks learn to give what the float model's blocks give."""
import copy
import math

import pytest
import torch
from conftest import plain_student
from small_models import left_as_it_was, swin
from torch import nn

import psaq_mm
from psaq_mm import ReconstructionSettings, UserError
from psaq_mm.adapters import find_adapter
from psaq_mm.ops import named_quant_ops, named_quantizers
from psaq_mm.student import reconstruction
from psaq_mm.student.reconstruction import leaving_float, mixed, passage, reconstructor

BITS = dict(weight=dict(bits=3), activation=dict(bits=3))


@pytest.fixture
def images():
    return torch.randn(4, 3, 56, 56)


@pytest.fixture
def pair(images):
    """A float model and its calibrated student of 3 bits."""
    model = swin()
    return model, plain_student(model, images, **BITS)


def settings(**changes):
    return ReconstructionSettings(**dict(dict(steps=3, batch_size=2), **changes))


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def block_errors(model, student, images):
    """Of each block: squared error of its output, relative to the float one's."""
    adapter, found = find_adapter(model), []
    for name in adapter.blocks(model):
        expected, given = (
            passage(m.get_submodule(name), images, lambda x, m=m: adapter.forward_backbone(m, x),
                    4).outputs for m in (model, student))
        found.append(float((expected - given).square().mean() / expected.square().mean()))
    return found


# The parts


def test_blocks_are_those_of_the_swin_in_order():
    model = swin()
    names = find_adapter(model).blocks(model)
    assert names == [n for n, m in model.named_modules() if type(m).__name__ == 'SwinBlock']
    assert len(names) == sum(len(stage.blocks) for stage in model.stages)


def test_passage_is_what_went_through_and_ends_there():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    later = []
    model[2].register_forward_hook(lambda *args: later.append(1))
    x = torch.randn(5, 2)
    found = passage(model[1], x, model, batch_size=2)
    assert torch.equal(found.inputs, model[0](x)) and torch.equal(found.outputs,
                                                                  model[0](x).relu())
    assert not later and not model[1]._forward_hooks


@pytest.mark.parametrize('share', [0., 0.25, 1.])
def test_share_of_elements(share):
    generator = torch.Generator().manual_seed(0)
    found = mixed(torch.zeros(100_000), torch.ones(100_000), share, generator)
    # Four standard deviations of a binomial share.
    assert abs(float(found.mean()) - share) <= 4 * math.sqrt(share * (1 - share) / 100_000)


def test_elements_are_left_float_with_gradients_alone(pair, images):
    op = next(op for _, op in named_quant_ops(pair[1]) if 'input' in op.quantizers)
    quantizer, x = op.quantizers['input'], torch.randn(64, 64)
    expected = quantizer(x)
    with leaving_float([op], 0.5, torch.Generator().manual_seed(0)):
        with torch.no_grad():
            assert torch.equal(quantizer(x), expected)
        given = quantizer(x)
    own = (given == x) & (expected != x)
    assert ((given == x) | (given == expected)).all()
    assert 0.4 < own.sum() / (expected != x).sum() < 0.6
    assert torch.equal(quantizer(x), expected)


# A whole reconstruction


def test_every_block_comes_closer(pair, images):
    model, student = pair
    before = block_errors(model, student, images)
    assert psaq_mm.reconstruct(student, model, images, settings(steps=40, weight_lr=0.01)) \
        is student
    after = block_errors(model, student, images)
    assert all(b < a for a, b in zip(before, after))
    assert sum(after) < 0.8 * sum(before)


def test_first_step_of_adam_moves_by_the_learning_rate(pair, images):
    """A step of Adam from scratch is the learning rate times the sign of the gradient."""
    model, student = pair
    before = parameters(student)
    psaq_mm.reconstruct(student, model, images,
                        settings(steps=1, weight_lr=0.02, norm_lr=0.003, range_lr=0., drop=0.))
    blocks = tuple(f'{name}.' for name in find_adapter(model).blocks(model))
    steps = {f'{name}.{own}': 0.02 * float(op.weight_quantizer.scale.mean())
             for name, op in named_quant_ops(student) if op.weight_quantizer is not None
             for own in ('weight', 'bias')}
    moved = set()
    for name, value in student.named_parameters():
        change = (value.detach() - before[name]).abs().max()
        if not name.startswith(blocks) or 'bias_table' in name:
            assert change == 0, name
            continue
        expected = steps.get(name, 0.003)
        assert float(change) == pytest.approx(expected, rel=0.02), name
        moved.add(name)
    assert any('norm' in name for name in moved) and any('qkv' in name for name in moved)


def test_ranges_of_activations_learn(pair, images):
    """One step of Adam moves the logarithm of each scale by the learning rate, and what was
    learned is not replaced later."""
    model, student = pair
    before = {(name, role): q.scale.clone() for name, role, q in named_quantizers(student)}
    psaq_mm.reconstruct(student, model, images,
                        settings(steps=1, weight_lr=0., norm_lr=0., range_lr=0.02, drop=0.))
    blocks = tuple(f'{name}.' for name in find_adapter(model).blocks(model))
    for name, op in named_quant_ops(student):
        for role, quantizer in op.quantizers.items():
            assert quantizer.learned == (role != 'weight' and name.startswith(blocks)), name
    ratios = [float(q.scale / before[name, role])
              for name, role, q in named_quantizers(student) if q.learned]
    moved = [abs(math.log(ratio)) for ratio in ratios if ratio != 1]
    assert len(moved) > 10 and all(m == pytest.approx(0.02, rel=0.02) for m in moved)
    assert not any(op.weight_settled for _, op in named_quant_ops(student))


def test_learned_weights_are_not_rounded_again(pair, images):
    model, student = pair
    psaq_mm.reconstruct(student, model, images, settings())
    blocks = tuple(f'{name}.' for name in find_adapter(model).blocks(model))
    for name, op in named_quant_ops(student):
        if op.weight_quantizer is not None:
            assert op.weight_settled == name.startswith(blocks), name


def test_models_are_otherwise_as_they_were(pair, images):
    model, student = pair
    student.train()
    with left_as_it_was(model):
        psaq_mm.reconstruct(student, model, images, settings())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert not any(q._forward_hooks for _, op in named_quant_ops(student)
                   for q in op.quantizers.values())


@pytest.mark.parametrize('stop', [3, 7])
def test_goes_on_with_the_next_block_to_the_same_bits(pair, images, stop):
    """A block that was stopped on its way starts again."""
    model, whole = pair
    parts = copy.deepcopy(whole)
    calibrated = copy.deepcopy(whole)
    psaq_mm.reconstruct(whole, model, images, settings(), seed=5)
    with reconstructor(parts, model, images, settings(), seed=5) as first:
        for _ in range(stop):
            first.step()
        state = copy.deepcopy(first.state_dict())
    assert state['step_index'] == stop // 3 * 3
    with reconstructor(calibrated, model, images, settings(), seed=5) as second:
        second.load_state_dict(state)
        while not second.done:
            second.step()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, calibrated.state_dict()[name]), name


def test_memory_does_not_grow_with_the_images(pair, monkeypatch):
    model, student = pair
    monkeypatch.setattr(reconstruction, 'MAX_IMAGES', 3)
    with reconstructor(student, model, torch.randn(7, 3, 56, 56), settings()) as blocks:
        blocks.step()
        assert len(blocks._seen.inputs) == len(blocks._expected.outputs) == 3


def test_game_may_come_after_it(pair, images):
    model, student = pair
    psaq_mm.reconstruct(student, model, images, settings(norm_lr=0.05))
    psaq_mm.evolve(student, model, images, psaq_mm.EvolutionSettings(
        rounds=1, student_steps=1, batch_size=2),
        psaq_mm.SynthesisSettings(num_images=4, image_size=56))


# What is refused


def test_order_is_kept(pair, images):
    model, student = pair
    with pytest.raises(UserError, match='steps is 0'):
        psaq_mm.reconstruct(student, model, images, ReconstructionSettings())
    with pytest.raises(UserError, match='calibrate first'):
        psaq_mm.reconstruct(plain_student(model), model, images, settings())
    with pytest.raises(UserError, match='quantized'):
        psaq_mm.reconstruct(student, student, images, settings())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.stages[0].blocks[0].ffn.layers[1].weight += 1
    with pytest.raises(UserError, match=r'stages.0.blocks.0.ffn.layers.1.weight differs'):
        psaq_mm.reconstruct(student, other, images, settings())
    rounded = plain_student(model, images, **dict(BITS, weight=dict(bits=3, rounding='gptq')))
    psaq_mm.round_weights(rounded, images)
    with pytest.raises(UserError, match='reconstruct comes before psaq_mm.round_weights'):
        psaq_mm.reconstruct(rounded, model, images, settings())


@pytest.mark.parametrize('key, value', [
    ('steps', -1), ('steps', 1.5), ('batch_size', 0), ('weight_lr', 2), ('range_lr', -1),
    ('norm_lr', -1), ('drop', 1.1), ('drop', math.nan)])
def test_settings_out_of_range(key, value):
    with pytest.raises(UserError, match=key):
        ReconstructionSettings(**{key: value})


def test_settings_without_anything_to_learn():
    with pytest.raises(UserError, match='nothing would learn'):
        ReconstructionSettings(steps=1, weight_lr=0, norm_lr=0, range_lr=0)
    ReconstructionSettings(weight_lr=0, norm_lr=0, range_lr=0)


def test_loss_that_is_not_finite_changes_nothing(pair, images):
    model, student = pair
    with torch.no_grad():
        images = images.clone()
        images[:] = math.nan
    before = parameters(student)
    with pytest.raises(FloatingPointError, match='blocks.0'):
        psaq_mm.reconstruct(student, model, images, settings())
    assert all(torch.equal(v, before[k]) for k, v in student.named_parameters())


def test_progress_that_cannot_be_called_is_refused_before_any_step(pair, images):
    model, student = pair
    before = parameters(student)
    with pytest.raises(TypeError, match='progress'):
        psaq_mm.reconstruct(student, model, images, settings(), progress=3)
    assert all(torch.equal(v, before[k]) for k, v in student.named_parameters())
