# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The shipped recipes: presets and bases, by name."""
import pytest

from psaq_mm import Recipe, UserError
from psaq_mm.recipe.shipped import BASES, PRESETS

PRESET_NAMES = ('default', 'fast', 'paper')
BASE_NAMES = ('w3a3', 'w4a4', 'w4a8', 'w6a6', 'w8a8')


def differences(one, other):
    """Section and key of plain values that differ, to both."""
    one, other = one.to_dict(), other.to_dict()
    return {(section, key): (value, other[section][key]) for section, values in one.items()
            for key, value in values.items() if value != other[section][key]}


def test_names():
    assert tuple(sorted(PRESETS)) == PRESET_NAMES
    assert tuple(sorted(BASES)) == BASE_NAMES


def test_one_set_of_defaults():
    """Those of the settings' classes are the preset ``default`` at W8A8."""
    assert Recipe() == Recipe.shipped() == Recipe.shipped('w8a8') \
        == Recipe.shipped('w8a8', 'default') == Recipe.shipped(preset='default')


def test_default():
    recipe = Recipe.shipped()
    quantization = recipe.quantization
    assert quantization.placement == 'operands' and quantization.scope == 'model'
    assert quantization.patch_embed_bits == quantization.predictor_bits == 8
    assert quantization.channel_limit == 1.5
    for name, kinds, rule in (
            ('x.qkv', (), 'PercentileObserver'), ('x.attn.w_msa.proj', (), 'MinMaxObserver'),
            ('patch_embed.proj', ('patch_embed', ), 'MinMaxObserver'),
            ('roi_head.bbox_head.fc_reg', ('roi_head', 'predictor'), 'MinMaxObserver')):
        spec = quantization.spec_for(name, 'input', kinds)
        assert spec.observer['type'] == rule
        assert spec.margin == (0 if 'patch_embed' in kinds else 2)  # all pixels are known
    assert quantization.spec_for('x', 'input').observer['percentile'] == 0.999
    spec = quantization.spec_for('x', 'input', ('roi_head', ))
    assert spec.observer['percentile'] == 0.9995 and (spec.bits, spec.margin) == (8, 2)
    assert quantization.spec_for('x', 'weight').rounding == 'gptq'
    spec = quantization.spec_for('x', 'attention')
    assert spec.observer['type'] == 'MSEObserver' and spec.bounds == (0, 1)
    assert recipe.evolution.rounds == 0
    assert recipe.synthesis.num_images == recipe.synthesis.batch_size == 8
    assert recipe.calibration.image_size == 'test'


# Bases


@pytest.mark.parametrize('preset', PRESET_NAMES)
@pytest.mark.parametrize('base', BASE_NAMES)
def test_every_base_takes_every_preset(base, preset):
    """Bits are the base's; images and game are the preset's; names say what they say."""
    recipe = Recipe.shipped(base, preset)
    for role, bits in (('weight', int(base[1])), ('input', int(base[3]))):
        assert recipe.quantization.spec_for('x', role).bits == bits
    plain = Recipe.shipped('w8a8', preset)
    for section in ('synthesis', 'calibration', 'evolution'):
        assert getattr(recipe, section) == getattr(plain, section)
    assert recipe.quantization.placement == ('v1' if preset == 'paper' else 'operands')
    assert recipe == Recipe().changed(BASES[base]).changed(PRESETS[preset])


@pytest.mark.parametrize('base, percentile', [('w8a8', 0.999), ('w6a6', 0.999), ('w4a8', 0.999),
                                              ('w4a4', 0.999), ('w3a3', 0.98)])
def test_ranges_of_a_base(base, percentile):
    """Where integers are few, ranges clip more; weights learn as fast, counted in steps."""
    recipe = Recipe.shipped(base)
    spec = recipe.quantization.spec_for('x', 'input')
    assert spec.observer == dict(type='PercentileObserver', percentile=percentile)
    narrow = base in ('w4a4', 'w3a3')
    assert spec.margin == (0 if narrow else 2)
    assert recipe.quantization.spec_for('x', 'attention').margin == (0 if narrow else 4)
    assert recipe.evolution.weight_lr == 0.01


@pytest.mark.parametrize('base', BASES)
def test_tokens_of_a_base(base):
    """At 3 bits tokens have scales of their own, and inputs are rotated."""
    quantization = Recipe.shipped(base).quantization
    narrow = base == 'w3a3'
    for name in ('mlp.fc1', 'attn.proj'):
        spec = quantization.spec_for(name, 'input')
        assert spec.rotate == narrow
        assert spec.granularity == ('per_token' if narrow else 'per_tensor')
        assert (spec.observer['type'] == 'PercentileObserver') == (narrow or name == 'mlp.fc1')
    assert quantization.spec_for('x', 'attention').granularity == (
        'per_token' if narrow else 'per_tensor')


@pytest.mark.parametrize('base, detector, segmentor', [
    ('w8a8', 'MSEObserver', 'MSEObserver'), ('w4a4', 'MSEObserver', 'MAEObserver'),
    ('w3a3', 'MSEObserver', 'MSEObserver')])
def test_softmax_outputs_of_a_base(base, detector, segmentor):
    quantization = Recipe.shipped(base).quantization
    for kinds, rule in (((), detector), (('segmentor', ), segmentor)):
        assert quantization.spec_for('x', 'attention', kinds).observer == dict(
            type=rule, min_factor=0.02, candidates=100)


@pytest.mark.parametrize('base', ['w4a4', 'w3a3', 'w4a8', 'w8a8'])
def test_inputs_of_roi_heads_keep_bits_and_room(base):
    """Whatever the rest has; weights do not, and a user can say otherwise."""
    recipe = Recipe.shipped(base)
    spec = recipe.quantization.spec_for('roi_head.x', 'input', ('roi_head', ))
    assert (spec.bits, spec.margin) == (8, 2)
    assert recipe.quantization.spec_for('roi_head.x', 'weight',
                                        ('roi_head', )).bits == int(base[1])
    assert recipe.quantization.spec_for('neck.x', 'input').bits == int(base[3])
    mine = dict(overrides={'@roi_head': dict(input=dict(bits=5, margin=0.))})
    spec = recipe.changed(dict(quantization=mine)).quantization.spec_for(
        'roi_head.x', 'input', ('roi_head', ))
    assert (spec.bits, spec.margin) == (5, 0) and spec.observer['percentile'] == 0.9995


# Presets


def test_fast_is_the_default_in_fewer_steps():
    (key, (steps, of_default)), = differences(Recipe.shipped(preset='fast'), Recipe()).items()
    assert key == ('synthesis', 'steps') and 2 * steps == of_default


@pytest.mark.parametrize('base', BASE_NAMES)
def test_paper(base):
    recipe = Recipe.shipped(base, 'paper')
    quantization, synthesis, evolution = recipe.quantization, recipe.synthesis, recipe.evolution
    assert quantization.placement == 'v1' and quantization.channel_limit is None
    assert quantization.patch_embed_bits is quantization.predictor_bits is None
    assert quantization.spec_for('x', 'weight').rounding == 'nearest'
    assert not quantization.overrides and not quantization.roles  # naive ranges
    for role in ('weight', 'input', 'output', 'attention'):
        for kinds in ((), ('patch_embed', ), ('roi_head', ), ('predictor', )):
            spec = quantization.spec_for('x.attn.proj', role, kinds)
            assert spec.observer == dict(type='MinMaxObserver') and spec.margin == 0
            assert not spec.rotate and spec.bits == int(base[1 if role == 'weight' else 3])
    assert synthesis.num_images == synthesis.batch_size == 32
    assert (synthesis.steps, synthesis.shifts, synthesis.lr) == (500, (15, 30), 0.25)
    terms = synthesis.build_priors()
    assert set(terms) == {'patch_similarity', 'total_variation'}  # no BatchNorm prior
    assert terms['patch_similarity'].form == 'v1'
    assert (terms['patch_similarity'].weight, terms['total_variation'].weight) == (1., 0.05)
    assert evolution.rounds > 0 and evolution.sample_steps and evolution.competes
    assert evolution.zoom == evolution.contrast == 1  # V2 tells of no views


# Mistakes


@pytest.mark.parametrize('name, hint', [
    ('fats', "Did you mean 'fast'?"), ('Paper', "Did you mean 'paper'?"),
    ('defaults', "Did you mean 'default'?"), ('zzz', ''), ('', ''), (3, ''), (['fast'], ''),
    (None, '')])
def test_unknown_preset(name, hint):
    with pytest.raises(UserError) as error:
        Recipe.shipped('w4a4', name)
    assert str(error.value).startswith(
        f'preset must be one of default, fast, paper, got {name!r}.')
    assert str(error.value).endswith(hint)


@pytest.mark.parametrize('name, hint', [
    ('w8a9', "Did you mean 'w8a8'?"), ('W8A8', ''), ('zzz', ''), (8, ''), ({}, '')])
def test_unknown_base(name, hint):
    with pytest.raises(UserError) as error:
        Recipe.shipped(name)
    assert str(error.value).startswith(
        f'recipe must be one of w3a3, w4a4, w4a8, w6a6, w8a8, got {name!r}.')
    assert hint in str(error.value)
