# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which modules of a small Swin detector are chosen, and how."""
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import SwinTransformer
from torch import nn

from psaq_mm.adapters.mmdet_swin import MMDetSwinAdapter
from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, apply_plan, plan_quantization
from psaq_mm.quantization import QuantSpec
from psaq_mm.recipe.merging import merged
from psaq_mm.recipe.quantization import QuantizationSettings

BLOCKS = [f'stages.{stage}.blocks.{block}' for stage in (0, 1) for block in (0, 1)]
LAYERS = [f'{block}.{layer}' for block in BLOCKS for layer in
          ('attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.0.0', 'ffn.layers.1')]
LAYERS += ['patch_embed.projection', 'stages.0.downsample.reduction']
ATTENTION = [f'{block}.attn.w_msa' for block in BLOCKS]


class NormedLinear(nn.Linear):
    """As in mmdet: a Linear by class, and not by what it computes."""

    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Detector(nn.Module):
    """Names as in mmdet's two-stage detectors."""

    def __init__(self):
        super().__init__()
        self.backbone = swin()
        self.backbone_like = nn.Linear(3, 3)
        self.neck = nn.ModuleDict(dict(conv=nn.Conv2d(16, 8, 1)))
        self.roi_head = nn.ModuleDict(dict(fc_cls=nn.Linear(8, 4), fc_normed=NormedLinear(8, 4)))


def swin():
    model = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                            out_indices=(0, 1))
    model.eval()  # returns None
    return model


PLAIN = dict(weight=dict(rounding='nearest'), activation=dict(margin=0.), roles={}, overrides={})


def plan(model, **changes):
    """By naive ranges and rounding, but for the changes."""
    settings = QuantizationSettings.from_dict(merged(PLAIN, changes))
    return plan_quantization(model, settings, MMDetSwinAdapter())


def prefixed(names):
    return {f'backbone.{name}' for name in names}


def test_operands():
    chosen = plan(swin())
    assert set(chosen) == {*LAYERS, *ATTENTION}
    weight, activation = QuantSpec(8, True, 'per_channel'), QuantSpec(8, False, 'per_tensor')
    for name in LAYERS:
        assert chosen[name] == dict(weight=weight, input=activation)
    for name in ATTENTION:
        assert chosen[name] == dict(query=activation, key=activation, attention=activation,
                                    value=activation)


def test_order_is_that_of_the_model():
    model = swin()
    names = [name for name, _ in model.named_modules() if name in plan(model)]
    assert list(plan(model)) == names


def test_v1():
    roles = {name: set(specs) for name, specs in plan(swin(), placement='v1').items()}
    assert set(roles) == {*LAYERS, *ATTENTION, *BLOCKS, 'patch_embed'}
    for block in BLOCKS:
        assert roles[block] == {'attention_residual', 'ffn_residual'}
        assert roles[f'{block}.attn.w_msa'] == {'logits', 'bias_table'}
        for layer in ('attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.1'):
            assert roles[f'{block}.{layer}'] == {'weight', 'input', 'output'}
        assert roles[f'{block}.ffn.layers.0.0'] == {'weight', 'input'}
    assert roles['patch_embed'] == {'output'}
    assert roles['patch_embed.projection'] == {'weight', 'input'}
    assert roles['stages.0.downsample.reduction'] == {'weight', 'input', 'output'}


def test_one_role():
    assert set(plan(swin(), placement=['weight'])) == set(LAYERS)
    chosen = plan(swin(), placement=['attention'])
    assert {name: list(specs) for name, specs in chosen.items()} == {
        name: ['attention'] for name in ATTENTION}


# Scope

def test_scope():
    detector = Detector()
    inside = prefixed(LAYERS + ATTENTION)
    assert set(plan(detector, scope='backbone')) == inside
    # Neither 'backbone_like', of the same prefix, nor the normed layer, ever.
    assert set(plan(detector, scope='model')) == inside | {
        'backbone_like', 'neck.conv', 'roi_head.fc_cls'}


def test_output_points_lie_in_the_backbone():
    chosen = plan(Detector(), scope='model', placement='v1')
    for name in ('backbone_like', 'neck.conv', 'roi_head.fc_cls'):
        assert set(chosen[name]) == {'weight', 'input'}


def test_subclass_of_linear_is_not_replaced():
    model = swin()
    layers = model.stages[0].blocks[0].ffn.layers
    layers[1] = NormedLinear(64, 16)
    normed, x = layers[1], torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = model(x)
    chosen = plan(model)
    assert set(chosen) == {*LAYERS, *ATTENTION} - {'stages.0.blocks.0.ffn.layers.1'}
    apply_plan(model, chosen)
    assert layers[1] is normed
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected))
    with pytest.raises(UserError, match='matches no module that can be quantized'):
        plan(Detector(), scope='model', include='*.fc_normed')


# Include and exclude

@pytest.mark.parametrize('include, expected', [
    ('patch_embed.projection', {'patch_embed.projection'}),
    ('*.qkv', {f'{block}.attn.w_msa.qkv' for block in BLOCKS}),
    ('stages.0.blocks.?.ffn*', {f'stages.0.blocks.{b}.ffn.layers.{layer}'
                                for b in (0, 1) for layer in ('0.0', '1')}),
    (['*.blocks.[1].attn.w_msa', '*.reduction'],
     {'stages.0.blocks.1.attn.w_msa', 'stages.1.blocks.1.attn.w_msa',
      'stages.0.downsample.reduction'}),
])
def test_include(include, expected):
    assert set(plan(swin(), include=include)) == expected


def test_exclude():
    everything = {*LAYERS, *ATTENTION}
    assert set(plan(swin(), exclude='patch_embed.*')) == everything - {'patch_embed.projection'}
    assert set(plan(swin(), exclude=['stages.0.*', '*.qkv'])) == {
        name for name in everything
        if not name.startswith('stages.0.') and not name.endswith('.qkv')}


def test_exclude_wins_over_include():
    assert set(plan(swin(), include='*.w_msa.*', exclude='stages.0.*')) == {
        f'stages.1.blocks.{b}.attn.w_msa.{layer}' for b in (0, 1) for layer in ('qkv', 'proj')}


def test_exclude_of_a_parent_leaves_its_children():
    block = BLOCKS[0]
    chosen = plan(swin(), exclude=f'{block}.attn.w_msa')
    assert f'{block}.attn.w_msa' not in chosen
    assert f'{block}.attn.w_msa.qkv' in chosen


@pytest.mark.parametrize('pattern', ['backbone.*', 'stage.*', 'STAGES.*', 'norm0', ''])
def test_include_that_matches_nothing(pattern):
    # Also where another pattern matches, and where a module matches that has no op.
    with pytest.raises(UserError) as error:
        plan(swin(), include=['*.qkv', pattern])
    message = str(error.value)
    assert message.startswith(f'quantization.include: {pattern!r} matches no module')
    for example in ('patch_embed', 'stages.1.blocks.1.ffn.layers.1'):
        assert example in message


def test_include_outside_of_the_scope():
    with pytest.raises(UserError, match="'neck.*' matches no module .* scope 'backbone'"):
        plan(Detector(), include='neck.*', scope='backbone')
    assert set(plan(Detector(), include='neck.*', scope='model')) == {'neck.conv'}


@pytest.mark.parametrize('settings', [
    dict(exclude='*'), dict(include='*.qkv', exclude='stages.*'),
])
def test_nothing_left(settings):
    with pytest.raises(UserError, match='nothing is left to quantize'):
        plan(swin(), **settings)


# Twice

def test_quantized_already():
    model = swin()
    apply_plan(model, plan(model, include='*.blocks.1.ffn.layers.1'))
    before = list(model.modules())
    with pytest.raises(UserError, match=r'quantized already \(module stages\.0\.blocks\.1\.ffn'):
        plan(model)
    assert all(a is b for a, b in zip(model.modules(), before))


def test_plan_changes_nothing():
    model = swin()
    before = list(model.modules())
    plan(model, placement='v1')
    assert all(a is b for a, b in zip(model.modules(), before))
    assert not any(isinstance(m, QuantOp) for m in model.modules())


# Specs

def test_patch_embedding_stays_at_8_bits():
    chosen = plan(swin(), weight=dict(bits=4), activation=dict(bits=4))
    for name, specs in chosen.items():
        for spec in specs.values():
            assert spec.bits == (8 if name == 'patch_embed.projection' else 4)
    chosen = plan(Detector(), weight=dict(bits=4), activation=dict(bits=4), scope='model',
                  predictor_bits=None)
    eight = {name for name, specs in chosen.items() for spec in specs.values() if spec.bits == 8}
    assert eight == {'backbone.patch_embed.projection'}
    for bits in (4, 6):
        chosen = plan(swin(), weight=dict(bits=4), activation=dict(bits=4),
                      patch_embed_bits=None if bits == 4 else bits)
        assert {s.bits for s in chosen['patch_embed.projection'].values()} == {bits}


def test_predictors_stay_at_8_bits():
    for bits in (8, 6, None):
        given = dict(weight=dict(bits=4), activation=dict(bits=4), predictor_bits=bits)
        chosen = plan(Detector(), scope='model', **given)
        assert {s.bits for s in chosen['roi_head.fc_cls'].values()} == {bits or 4}
        assert {s.bits for s in chosen['neck.conv'].values()} == {4}
        assert 'roi_head.fc_cls' not in plan(Detector(), scope='backbone', **given)


def test_overrides_by_kind():
    chosen = plan(swin(), overrides={'@patch_embed': dict(weight=dict(bits=5)), '@roi_head': {}})
    bits = {name: roles['weight'].bits for name, roles in chosen.items() if 'weight' in roles}
    assert bits.pop('patch_embed.projection') == 5 and set(bits.values()) == {8}


def test_overrides_by_name():
    chosen = plan(swin(), overrides={'stages.1.*': dict(weight=dict(bits=4)),
                                     '*.w_msa': dict(attention=dict(bits=6, symmetric=True))})
    for name in LAYERS:
        bits = 4 if name.startswith('stages.1.') else 8
        assert chosen[name]['weight'] == QuantSpec(bits, True, 'per_channel')
        assert chosen[name]['input'] == QuantSpec(8, False)
    for name in ATTENTION:
        assert chosen[name]['attention'] == QuantSpec(6, True)
        assert chosen[name]['value'] == QuantSpec(8, False)


@pytest.mark.parametrize('settings', [
    dict(exclude=['stages.0.*', 'patch_embd.*']), dict(overrides={'patch_embd.*': {}}),
    dict(include=['*.qkv', 'patch_embd.*'])])
def test_wildcard_that_matches_nothing(settings):
    with pytest.raises(UserError, match=f"quantization.{next(iter(settings))}: 'patch_embd"):
        plan(swin(), **settings)


def test_wildcards_of_the_defaults_need_no_match():
    """Nobody wrote them."""
    model = swin()
    for changes in (dict(placement=['attention']), dict(placement=['logits', 'bias_table'])):
        settings = QuantizationSettings.from_dict(changes)
        assert any('*' in pattern for pattern in settings.overrides)
        assert set(plan_quantization(model, settings, MMDetSwinAdapter())) == set(ATTENTION)
    with pytest.raises(UserError, match="quantization.overrides: 'mine.[*]' matches no module"):
        plan_quantization(model, QuantizationSettings.from_dict(dict(
            placement=['attention'], overrides={**settings.overrides, 'mine.*': {}})),
            MMDetSwinAdapter())


def test_include_that_matches_only_what_the_placement_leaves_float():
    # 'operands' has no role for the patch embedding itself, only for its projection.
    with pytest.raises(UserError, match="include: 'patch_embed' matches no module"):
        plan(swin(), include=['*.qkv', 'patch_embed'])
    with pytest.raises(UserError, match='include: .* matches no module'):
        plan(swin(), include='*.qkv', placement=['attention'])


def test_inputs_of_convolutions_have_one_scale():
    """A convolution adds pixels up: their scales would have to be equal."""
    chosen = plan(Detector(), roles={role: dict(granularity='per_token')
                                     for role in ('input', 'attention')}, scope='model')
    per_token = {(name, role) for name, specs in chosen.items()
                 for role, spec in specs.items() if spec.granularity == 'per_token'}
    linear = prefixed(LAYERS) - {'backbone.patch_embed.projection'} | {
        'roi_head.fc_cls', 'backbone_like'}
    assert per_token == {(name, 'input') for name in linear} | {
        (name, 'attention') for name in prefixed(ATTENTION)}
    assert chosen['neck.conv']['input'].granularity == 'per_tensor'
