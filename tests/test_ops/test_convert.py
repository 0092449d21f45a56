# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Wrapping and unwrapping a small Swin Transformer."""
import copy

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

from psaq_mm.adapters.mmdet_swin import MMDetSwinAdapter
from psaq_mm.ops import (
    QuantLinear,
    QuantOp,
    apply_plan,
    named_quant_ops,
    plan_quantization,
    quantization_enabled,
    set_quantization,
    unwrap,
)
from psaq_mm.quantization import Quantizer
from psaq_mm.recipe.quantization import QuantizationSettings

PLACEMENTS = ['operands', 'v1', ['weight'], ['ffn_residual', 'attention', 'input']]


def swin(**changes):
    model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                            out_indices=(0, 1), **changes)
    for name, parameter in model.named_parameters():
        if 'bias' in name:  # 0 at first: of no effect
            nn.init.normal_(parameter, std=0.2)
    model.eval()  # returns None
    return model


def images(count=2, seed=0):
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(seed))


def forward(model, x):
    with torch.no_grad():
        return torch.cat([y.flatten() for y in model(x)])


def quantize(model, **settings):
    plan = plan_quantization(model, QuantizationSettings.from_dict(settings), MMDetSwinAdapter())
    apply_plan(model, plan)
    return plan


def calibrate(model, x):
    ops = [op for _, op in named_quant_ops(model)]
    observed = [q for op in ops for role, q in op.quantizers.items() if role != 'weight']
    for quantizer in observed:
        quantizer.start_observing()
    forward(model, x)
    for quantizer in observed:
        quantizer.finish_observing()
    for op in ops:
        op.set_weight_range()


def tree(model):
    """Names, and the modules themselves."""
    return list(model.named_modules(remove_duplicate=False))


def assert_same_tree(model, before):
    after = tree(model)
    assert [name for name, _ in after] == [name for name, _ in before]
    for (name, now), (_, then) in zip(after, before):
        assert now is then, name


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_off_equals_float(placement):
    model, x = swin(), images()
    expected = forward(model, x)
    plan = quantize(model, placement=placement)
    assert {name for name, _ in named_quant_ops(model)} == set(plan)
    assert torch.equal(forward(model, x), expected)
    calibrate(model, x)
    assert not torch.equal(forward(model, x), expected)
    set_quantization(model, False)
    assert torch.equal(forward(model, x), expected)


@pytest.mark.parametrize('calibrated', [True, False])
@pytest.mark.parametrize('placement', PLACEMENTS)
def test_unwrap_restores_the_very_same_modules(placement, calibrated):
    model, x = swin(), images()
    before, state, expected = tree(model), model.state_dict(), forward(model, x)
    state = {key: value.clone() for key, value in state.items()}
    quantize(model, placement=placement)
    if calibrated:
        calibrate(model, x)
        forward(model, x)
    assert unwrap(model) is model
    assert_same_tree(model, before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(forward(model, x), expected)
    assert not any(isinstance(m, (QuantOp, Quantizer)) for m in model.modules())


def test_unwrap_of_a_float_model():
    model = swin()
    before = tree(model)
    assert unwrap(model) is model
    assert_same_tree(model, before)


def test_nested_ops_unwrap():
    # 'v1' replaces a block, and its layers within it; 'operands' its w_msa.
    model = swin()
    before = tree(model)
    quantize(model, placement=['ffn_residual', 'attention', 'input', 'output'])
    names = [name for name, _ in named_quant_ops(model)]
    prefix = 'stages.0.blocks.1'
    for name in (prefix, f'{prefix}.attn.w_msa', f'{prefix}.attn.w_msa.qkv', 'patch_embed',
                 'patch_embed.projection'):
        assert name in names
    assert model.get_submodule(prefix).float_module is dict(before)[prefix]
    # A float module keeps its own children while their ops stand in for them.
    for name in (f'{prefix}.attn.w_msa', 'patch_embed'):
        origin = model.get_submodule(name).float_module
        assert not any(isinstance(m, (QuantOp, Quantizer)) for m in origin.modules())
    unwrap(model)
    assert_same_tree(model, before)


def test_quantize_again_after_unwrap():
    model, x = swin(), images()
    results = []
    for _ in range(2):
        quantize(model, activation=dict(bits=6))
        calibrate(model, x)
        results.append(forward(model, x))
        unwrap(model)
    assert torch.equal(*results)


def test_weights_are_shared():
    model, x = swin(), images()
    state = dict(model.named_parameters())
    quantize(model)
    for name, parameter in model.named_parameters():
        assert parameter is state[name]
    calibrate(model, x)
    with torch.no_grad():
        for parameter in state.values():
            parameter.mul_(1.1)
    unwrap(model)
    twin = swin()
    twin.load_state_dict(state, strict=False)
    assert torch.equal(forward(model, x), forward(twin, x))


def test_weights_trained_while_wrapped_stay():
    model, x = swin(), images()
    quantize(model, activation=dict(bits=4))
    calibrate(model, x)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sum(y.square().mean() for y in model(x)).backward()
    optimizer.step()
    unwrap(model)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert 'stages.1.blocks.0.attn.w_msa.qkv.weight' in changed
    assert 'patch_embed.projection.weight' in changed


@pytest.mark.parametrize('assign', [True, False])
def test_weights_loaded_while_wrapped_stay(assign):
    model, other, x = swin(), swin(), images()
    expected = forward(other, x)
    quantize(model, placement='v1')
    model.load_state_dict(other.state_dict(), strict=False, assign=assign)
    assert torch.equal(forward(model, x), expected)
    unwrap(model)
    assert torch.equal(forward(model, x), expected)


def test_mode_stays():
    model = swin()
    model.train()
    quantize(model, placement='v1')
    model.eval()
    unwrap(model)
    assert not any(m.training for m in model.modules())
    quantize(model, placement='v1')
    model.train()
    unwrap(model)
    assert all(m.training for m in model.modules())


def test_type_of_the_model_is_kept():
    model, x = swin().double(), images().double()
    expected = forward(model, x)
    quantize(model, placement='v1')
    assert torch.equal(forward(model, x), expected)
    calibrate(model, x)
    assert forward(model, x).dtype == torch.float64


def test_copy_of_a_quantized_model():
    model, x = swin(), images()
    before = tree(model)
    quantize(model, placement=['ffn_residual', 'attention', 'input', 'weight'])
    calibrate(model, x)
    expected = forward(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(forward(model, x), expected)
    own = {p.data_ptr() for p in model.parameters()}
    unwrap(twin)
    assert not own & {p.data_ptr() for p in twin.parameters()}
    assert all((p == 0).all() for p in twin.parameters())
    assert [name for name, _ in tree(twin)] == [name for name, _ in before]
    unwrap(model)
    assert_same_tree(model, before)


def test_plan_that_fails_leaves_the_model_as_it_was():
    model, x = swin(), images()
    before, expected = tree(model), forward(model, x)
    plan = plan_quantization(model, QuantizationSettings(), MMDetSwinAdapter())
    plan['norm0'] = dict(plan['patch_embed.projection'])  # no op stands for it
    with pytest.raises(AssertionError, match='norm0: no op for LayerNorm'):
        apply_plan(model, plan)
    assert_same_tree(model, before)
    assert torch.equal(forward(model, x), expected)


def test_module_under_two_names_is_replaced_under_both():
    # Detectors share layers between feature levels.
    model, x = swin(), images()
    layers = [block.ffn.layers for block in model.stages[0].blocks]
    layers[1][1] = layers[0][1]
    before, expected = tree(model), forward(model, x)
    quantize(model)
    assert isinstance(layers[0][1], QuantLinear)
    assert layers[1][1] is layers[0][1]
    assert torch.equal(forward(model, x), expected)
    unwrap(model)
    assert_same_tree(model, before)


def test_hooks_of_the_float_module_are_kept():
    model, x = swin(), images()
    seen = []
    model.stages[0].blocks[0].attn.w_msa.qkv.register_forward_hook(
        lambda module, args, output: seen.append(type(module)))
    quantize(model)
    forward(model, x)
    unwrap(model)
    forward(model, x)
    assert seen == [QuantLinear, nn.Linear]


# Switches

def test_set_quantization():
    model = swin()
    quantize(model)
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    # projection, 4 blocks of qkv, proj, two ffn layers, and reduction; 4 w_msa with 4 operands
    assert len(quantizers) == (1 + 4 * 4 + 1) * 2 + 4 * 4
    for enabled in (True, False):
        set_quantization(model, enabled)
        assert all(q.enabled is enabled for q in quantizers)


def test_quantization_enabled_within_a_block():
    model, x = swin(), images()
    expected = forward(model, x)
    quantize(model, activation=dict(bits=4))
    calibrate(model, x)
    quantized = forward(model, x)
    with quantization_enabled(model, False):
        assert torch.equal(forward(model, x), expected)
        with quantization_enabled(model, True):
            assert torch.equal(forward(model, x), quantized)
        assert torch.equal(forward(model, x), expected)
    assert torch.equal(forward(model, x), quantized)
    one = next(m for m in model.modules() if isinstance(m, Quantizer))
    one.enabled = False
    with pytest.raises(KeyError), quantization_enabled(model, True):
        assert one.enabled
        raise KeyError
    assert not one.enabled
    assert sum(not m.enabled for m in model.modules() if isinstance(m, Quantizer)) == 1
