# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""All settings as one value: changed, written down and read back."""
import copy
import json
from dataclasses import FrozenInstanceError

import pytest

from psaq_mm import (
    CalibrationSettings,
    EvolutionSettings,
    QuantizationSettings,
    Recipe,
    SynthesisSettings,
    UserError,
)
from psaq_mm.quantization import QuantSpec
from psaq_mm.recipe.merging import merged, plain_copy
from psaq_mm.recipe.shipped import BASES, PRESETS

SHIPPED = [(base, preset) for base in sorted(BASES) for preset in sorted(PRESETS)]
MINE = dict(
    quantization=dict(scope='model', include=['backbone.*', 'neck.*'], exclude='*.norm',
                      placement=['weight', 'input'], weight=dict(bits=5),
                      activation=dict(bounds=(-1, 3.5)), channel_limit=None,
                      roles=dict(_delete_=True, input=dict(symmetric=True)),
                      overrides={'*.fc': dict(weight=dict(bits=3, granularity='per_tensor'))}),
    synthesis=dict(image_size=(56, 112), shifts=[3, 4, 5], betas=(0.1, 0.2),
                   priors=dict(patch_similarity=None,
                               mine=dict(type='TotalVariationPrior', weight=0.3))),
    calibration=dict(image_size=64, batch_size=3),
    evolution=dict(rounds=2, adversarial_fraction=None, taps=dict(rois=0.5)))


def plain(value):
    """Whether it is what a file of JSON can hold, and nothing but."""
    if type(value) is dict:
        return all(type(key) is str and plain(v) for key, v in value.items())
    if type(value) is list:
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str)


RECIPES = [Recipe.shipped(*names) for names in SHIPPED] + [Recipe().changed(MINE)]
IDS = ['-'.join(names) for names in SHIPPED] + ['mine']


# To plain values and back


@pytest.mark.parametrize('recipe', RECIPES, ids=IDS)
def test_round_trip(recipe):
    values = recipe.to_dict()
    assert plain(values)
    assert list(values) == ['quantization', 'synthesis', 'calibration', 'reconstruction',
                            'evolution']
    for again in (Recipe.from_dict(values), Recipe.from_dict(json.loads(json.dumps(values)))):
        assert again == recipe
        # The order too: of overrides the last one wins.
        assert json.dumps(again.to_dict()) == json.dumps(values)
    assert recipe.changed({}) == recipe == recipe.changed(values)


def test_recipes_differ():
    assert len({json.dumps(recipe.to_dict()) for recipe in RECIPES}) == len(RECIPES)
    assert all(one != other for i, one in enumerate(RECIPES) for other in RECIPES[:i])


def test_values_are_a_copy():
    recipe = Recipe()
    values = recipe.to_dict()
    values['quantization']['weight']['bits'] = 2
    values['quantization']['roles']['attention']['bits'] = 2
    values['synthesis']['priors'].clear()
    values['evolution']['taps']['backbone'] = 0.
    assert recipe == Recipe()


def test_settings_keep_no_one_elses_dicts():
    """What a caller does later to what he gave changes no recipe."""
    changes = copy.deepcopy(MINE)
    recipe = Recipe().changed(changes)
    expected = recipe.to_dict()
    changes['quantization']['overrides']['*.fc']['weight']['bits'] = 8
    changes['synthesis']['priors']['mine']['weight'] = 9.
    changes['evolution']['taps']['rois'] = 9.
    assert recipe.to_dict() == expected
    overrides = {'a': dict(input=dict(bits=4))}
    settings = QuantizationSettings(overrides=overrides)
    overrides['a']['input']['bits'] = 7
    assert settings.spec_for('a', 'input').bits == 4


def test_what_is_not_there_has_its_default():
    assert Recipe.from_dict({}) == Recipe()
    recipe = Recipe.from_dict(dict(quantization=dict(weight=dict(bits=4)), evolution=None))
    assert recipe == Recipe().changed(dict(quantization=dict(weight=dict(bits=4))))
    assert recipe.quantization.weight == QuantSpec(4, True, 'per_channel', rounding='gptq')


def test_sections():
    recipe = Recipe()
    for name, kind in (('quantization', QuantizationSettings), ('synthesis', SynthesisSettings),
                       ('calibration', CalibrationSettings), ('evolution', EvolutionSettings)):
        assert getattr(recipe, name) == kind() == kind.from_dict(None) == kind.from_dict({})
        assert kind.from_dict(recipe.to_dict()[name]) == kind()
        with pytest.raises(FrozenInstanceError):
            setattr(recipe, name, kind())


# Changes


def test_changed():
    """Dicts are merged, and anything else replaced; the recipe itself stays."""
    before = Recipe.shipped('w4a4', 'paper').changed(dict(quantization=dict(
        overrides={'@segmentor': dict(attention=dict(bits=4))})))
    values = before.to_dict()
    recipe = before.changed(MINE)
    assert before.to_dict() == values
    quantization = recipe.quantization
    assert (quantization.scope, quantization.placement) == ('model', ('weight', 'input'))
    assert quantization.include == ('backbone.*', 'neck.*')
    assert quantization.exclude == ('*.norm', )
    assert quantization.weight == QuantSpec(5, True, 'per_channel')
    assert (quantization.activation.bits, quantization.activation.bounds) == (4, (-1, 3.5))
    assert quantization.roles == dict(input=dict(symmetric=True))
    assert list(quantization.overrides) == ['@segmentor', '*.fc']  # the last one wins
    synthesis = recipe.synthesis
    assert (synthesis.size, synthesis.shifts, synthesis.steps) == ((56, 112), (3, 4, 5), 500)
    assert set(synthesis.build_priors()) == {'total_variation', 'mine'}
    assert (recipe.calibration.size, recipe.calibration.batch_size) == ((64, 64), 3)
    assert (recipe.evolution.rounds, recipe.evolution.student_steps) == (2, 100)
    assert (recipe.evolution.taps['rois'], recipe.evolution.taps['backbone']) == (0.5, 1)
    assert recipe.evolution.adversarial_fraction is None


def test_changes_on_changes():
    recipe = Recipe().changed(dict(synthesis=dict(steps=7)))
    recipe = recipe.changed(dict(synthesis=dict(num_images=2), evolution=None))
    assert (recipe.synthesis.steps, recipe.synthesis.num_images) == (7, 2)
    assert recipe.changed(dict(synthesis=None)) == recipe


def test_whole_sections_are_replaced():
    """By what the section's defaults are: that is what is below them."""
    recipe = Recipe.shipped('w4a4', 'paper').changed(dict(
        quantization=dict(_delete_=True, scope='model'), evolution=dict(_delete_=True)))
    assert recipe.quantization == QuantizationSettings(scope='model')
    assert recipe.evolution == EvolutionSettings()
    assert recipe.synthesis == Recipe.shipped(preset='paper').synthesis


def test_terms_are_dropped_or_replaced():
    recipe = Recipe().changed(dict(synthesis=dict(priors=dict(patch_similarity=None))))
    assert list(recipe.synthesis.build_priors()) == ['total_variation']
    recipe = Recipe().changed(dict(synthesis=dict(priors=dict(
        _delete_=True, mine=dict(type='TotalVariationPrior', weight=2.)))))
    terms = recipe.synthesis.build_priors()
    assert list(terms) == ['mine'] and terms['mine'].weight == 2.


@pytest.mark.parametrize('changes, message', [
    (dict(evolution=dict(round=3)), r"^unknown key evolution\.round\. Did you mean 'rounds'\?"),
    (dict(evolution=dict(taps=dict(neks=1.))), r'^unknown key evolution\.taps\.neks'),
    (dict(evolution=3), '^evolution must be a dict, got 3$'),
    (dict(quantization=['weight']), '^quantization must be a dict, got '),
    (dict(quantization=dict(weight=4)), '^quantization.weight must be a dict, got 4$'),
    (dict(evolution=dict(rounds=-1)), '^evolution.rounds must be an integer of at least 0'),
    (dict(calibration=dict(image_size='train')), "^calibration.image_size must be 'test'"),
    (dict(quantization=dict(activation=dict(margin=-1))), '^quantization.activation.margin'),
    (dict(quantization=dict(roles=dict(input=dict(bitz=4)))),
     r'^unknown key quantization\.roles\.input\.bitz'),
    (dict(evolve={}), r"^unknown section 'evolve'\. Did you mean 'evolution'\? Known sections: "
                      'quantization, synthesis, calibration, reconstruction, evolution$'),
    ({3: {}}, r'^unknown section 3\. Known sections'),
    (3, '^the changes of a recipe must be a dict, got 3$'),
    ([('evolution', {})], '^the changes of a recipe must be a dict, got '),
])
def test_wrong_changes(changes, message):
    with pytest.raises(UserError, match=message):
        Recipe().changed(changes)


@pytest.mark.parametrize('values, message', [
    (dict(evolve={}), r"^unknown section 'evolve'\. Did you mean 'evolution'\?"),
    (dict(evolution=3), '^evolution must be a dict, got 3$'),
    (dict(synthesis=dict(stepz=3)), r"^unknown key synthesis\.stepz\. Did you mean 'steps'\?"),
    (3, '^a recipe must be a dict, got 3$'), (None, '^a recipe must be a dict, got None$')])
def test_wrong_values(values, message):
    with pytest.raises(UserError, match=message):
        Recipe.from_dict(values)


# The rule of merging, by hand


@pytest.mark.parametrize('changes, expected', [
    ({}, dict(a=1, b=dict(c=2, d=dict(e=3)), f=[1, dict(g=2)])),
    (dict(a=dict(x=1)), dict(a=dict(x=1), b=dict(c=2, d=dict(e=3)), f=[1, dict(g=2)])),
    (dict(b=dict(c=None, d=dict(h=4))),
     dict(a=1, b=dict(c=None, d=dict(e=3, h=4)), f=[1, dict(g=2)])),
    (dict(b=4, f=()), dict(a=1, b=4, f=[])),
    (dict(b=dict(_delete_=True, x=1)), dict(a=1, b=dict(x=1), f=[1, dict(g=2)])),
    (dict(b=dict(_delete_=False, x=1)),
     dict(a=1, b=dict(c=2, d=dict(e=3), x=1), f=[1, dict(g=2)])),
    (dict(b=dict(d=dict(_delete_=True))), dict(a=1, b=dict(c=2, d={}), f=[1, dict(g=2)])),
    (dict(_delete_=True, y=dict(_delete_=True, z=1, _scope_='mmdet')), dict(y=dict(z=1))),
    (dict(n=dict(_scope_='mmdet', m=[dict(_scope_='mmdet', k=(1, 2))])),
     dict(a=1, b=dict(c=2, d=dict(e=3)), f=[1, dict(g=2)], n=dict(m=[dict(k=[1, 2])]))),
])
def test_merged(changes, expected):
    below = dict(a=1, b=dict(c=2, d=dict(e=3)), f=[1, dict(g=2)])
    kept, given = copy.deepcopy(below), copy.deepcopy(changes)
    result = merged(below, changes)
    assert result == expected
    assert below == kept and changes == given
    if 'f' in result and result['f']:
        result['f'][1]['g'] = 9
        assert below == kept


def test_plain_copy():
    value = dict(_scope_='mmdet', a=(1, dict(_delete_=True, b=[2])), c=None)
    assert plain_copy(value) == dict(a=[1, dict(b=[2])], c=None)


@pytest.mark.parametrize('value', [dict(steps=3), None, CalibrationSettings()])
def test_sections_have_their_types(value):
    with pytest.raises(UserError, match='synthesis must be SynthesisSettings'):
        Recipe(synthesis=value)


def test_recipes_are_hashable():
    same = [Recipe.shipped('w4a4'), Recipe.from_dict(Recipe.shipped('w4a4').to_dict())]
    assert len({*same, Recipe.shipped('w4a4', 'paper'), Recipe()}) == 3
