# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
from mmengine.config import Config

from psaq_mm.errors import UserError
from psaq_mm.recipe import CalibrationSettings, EvolutionSettings
from psaq_mm.recipe.evolution import TAP_GROUPS

NOT_INTEGERS = [-1, 1.5, '8', None, True, [8]]
NAN, INFINITY = float('nan'), float('inf')


def test_defaults():
    """No rounds, and all taps but those of the RoI heads."""
    settings = EvolutionSettings.from_dict(None)
    assert settings == EvolutionSettings() == EvolutionSettings.from_dict({})
    assert settings.rounds == 0 and settings.competes
    assert settings.chosen_groups(TAP_GROUPS) == ('backbone', 'neck', 'scores', 'deltas', 'logits')


@pytest.mark.parametrize('key', ['batch_size', 'patience', 'save_interval'])
@pytest.mark.parametrize('value', [0, *NOT_INTEGERS])
def test_bad_counts(key, value):
    with pytest.raises(UserError, match=f'^evolution.{key} must be a positive integer, got'):
        EvolutionSettings.from_dict({key: value})


@pytest.mark.parametrize('key', ['rounds', 'sample_steps', 'student_steps', 'buffer_size'])
def test_bad_steps(key):
    for value in NOT_INTEGERS:
        with pytest.raises(UserError, match=f'^evolution.{key} must be an integer of at least 0, '
                                            'got') as caught:
            EvolutionSettings.from_dict({key: value})
        assert repr(value) in str(caught.value)
    assert getattr(EvolutionSettings.from_dict({key: 0}), key) == 0


def test_rounds_of_nothing():
    nothing = dict(sample_steps=0, student_steps=0)
    with pytest.raises(UserError, match='^evolution.rounds of no steps: set sample_steps or'):
        EvolutionSettings.from_dict(dict(rounds=1, **nothing))
    assert EvolutionSettings.from_dict(dict(rounds=0, **nothing)).rounds == 0
    EvolutionSettings.from_dict(dict(rounds=1, sample_steps=1, student_steps=0))


@pytest.mark.parametrize('key, low, high, good', [
    ('adversarial_weight', '0', r'1e\+06', (0, 1e6, 2.5)), ('sample_lr', '0', '1000', (0, 0.3)),
    ('new_fraction', '0', '1', (0, 1, 0.25)), ('weight_lr', '0', '1', (0, 1e-5)),
    ('range_lr', '0', '1', (0., 1)), ('contrast', '0', '1', (0, 0.2, 1)),
    ('zoom', '1', '16', (1, 3., 16)),
    ('adversarial_fraction', '0', r'1e\+06', (0, 0.3, 7., None))])
def test_bad_numbers(key, low, high, good):
    bad = [-0.1, NAN, INFINITY, '0.1', True, [0.1]]
    if key != 'adversarial_fraction':
        bad.append(None)
    if high == '1':
        bad.append(1.1)
    for value in bad:
        with pytest.raises(UserError, match=f'^evolution.{key} must be a number from {low} to '
                                            f'{high}, got'):
            EvolutionSettings.from_dict({key: value})
    for value in good:
        assert getattr(EvolutionSettings.from_dict({key: value}), key) == value


@pytest.mark.parametrize('value', ['all', 'range', None, True, ['ranges']])
def test_bad_learn(value):
    with pytest.raises(UserError, match='^evolution.learn must be one of ranges, weights, both, '
                                        'got'):
        EvolutionSettings.from_dict(dict(learn=value))


@pytest.mark.parametrize('taps, message', [
    (None, 'evolution.taps must be a dict of groups, got None'),
    (['backbone'], 'evolution.taps must be a dict of groups'),
    (dict(bakbone=1.), r"unknown key evolution.taps.bakbone\. Did you mean 'backbone'\? "
                       'Known keys: backbone, neck, scores, deltas, rois, logits'),
    ({3: 1.}, r'unknown key evolution.taps.3\. Known keys'),
    (dict(backbone=-1), r'evolution.taps.backbone must be a number from 0 to 1e\+06, got -1'),
    (dict(neck='1'), "evolution.taps.neck must be a number from 0 .* got '1'"),
    (dict(rois=None), 'evolution.taps.rois must be a number'),
    (dict(logits=True), 'evolution.taps.logits must be a number'),
    (dict(scores=NAN), 'evolution.taps.scores must be a number'),
    ({}, 'evolution.taps has no weight above 0: teacher and student are compared nowhere'),
    (dict(backbone=0, neck=0.), 'evolution.taps has no weight above 0'),
    ({'_scope_': 'mmdet'}, 'evolution.taps has no weight above 0'),
])
def test_bad_taps(taps, message):
    with pytest.raises(UserError, match=f'^{message}'):
        EvolutionSettings.from_dict(dict(taps=taps))


def test_losses_are_no_setting():
    """Which is the right one follows from the group."""
    with pytest.raises(UserError, match=r'^unknown key evolution.losses\.'):
        EvolutionSettings.from_dict(dict(losses=dict(scores='binary_kl')))


def test_copy_of_taps():
    taps = dict(backbone=1.)
    settings = EvolutionSettings(taps=taps)
    taps['backbone'] = 5.
    assert settings.taps == dict(backbone=1.)


@pytest.mark.parametrize('learn, weights', [('ranges', False), ('both', False), ('ranges', True),
                                            ('weights', True)])
def test_something_to_learn(learn, weights):
    EvolutionSettings(learn=learn).require_learnable(weights)


def test_nothing_to_learn():
    with pytest.raises(UserError, match="^evolution.learn='weights', but no weight is quantized; "
                                        "set it to 'ranges', or let"):
        EvolutionSettings(learn='weights').require_learnable(False)


@pytest.mark.parametrize('batch_size, processes, even', [(4, 3, 6), (1, 2, 2), (9, 8, 16)])
def test_batches_among_processes(batch_size, processes, even):
    settings = EvolutionSettings(rounds=1, batch_size=batch_size)
    with pytest.raises(UserError, match=f'^evolution.batch_size must be a multiple of the '
                                        f'{processes} processes, got {batch_size}; try {even}$'):
        settings.require_even_batches(processes)
    EvolutionSettings(rounds=1, batch_size=even).require_even_batches(processes)
    EvolutionSettings(batch_size=batch_size).require_even_batches(processes)  # no game


def test_chosen_groups():
    settings = EvolutionSettings(taps=dict(backbone=1., rois=0.5, neck=0., logits=2.))
    assert settings.chosen_groups(('backbone', 'neck', 'scores', 'rois')) == ('backbone', 'rois')
    assert settings.chosen_groups(('backbone', 'logits')) == ('backbone', 'logits')
    with pytest.raises(UserError, match='^evolution.taps has weights for none of the groups of '
                                        'this model: neck, scores$'):
        settings.chosen_groups(('neck', 'scores'))


@pytest.mark.parametrize('weight, fraction, expected', [
    (1., 0.3, True), (1., None, True), (0, 0.3, False), (0., None, False), (1., 0, False),
    (1., 0., False)])
def test_competes(weight, fraction, expected):
    settings = EvolutionSettings(adversarial_weight=weight, adversarial_fraction=fraction)
    assert settings.competes is expected


@pytest.mark.parametrize('key, hint', [('round', "'rounds'"), ('student_step', "'student_steps'"),
                                       ('weights_lr', "'weight_lr'"), ('tap', "'taps'")])
def test_unknown_key(key, hint):
    with pytest.raises(UserError, match=rf'^unknown key evolution.{key}\. Did you mean {hint}\?'):
        EvolutionSettings.from_dict({key: 1})


@pytest.mark.parametrize('section', [[1], 'x', 3])
def test_section_that_is_no_dict(section):
    with pytest.raises(UserError, match='^evolution must be a dict, got'):
        EvolutionSettings.from_dict(section)


def test_section_of_a_config():
    """mmengine's own keys are passed over."""
    config = Config(dict(evolution=dict(
        _scope_='mmdet', rounds=3, taps=dict(_scope_='mmdet', neck=0.5))))
    settings = EvolutionSettings.from_dict(config.to_dict()['evolution'])
    assert (settings.rounds, settings.taps['neck']) == (3, 0.5)
    assert settings.chosen_groups(TAP_GROUPS) == ('neck', )


# The size of the last ranges


@pytest.mark.parametrize('value, expected', [
    (None, None), ('test', None), (64, (64, 64)), ((800, 1088), (800, 1088)),
    ([32, 64], (32, 64))])
def test_size_of_the_last_ranges(value, expected):
    settings = CalibrationSettings.from_dict(dict(image_size=value))
    assert settings.size == expected and settings.image_size == (expected or value)


@pytest.mark.parametrize('value', ['train', '', 0, -1, 1.5, True, (64, ), (64, 64, 3), (64, 0),
                                   ('a', 64), {'h': 64}])
def test_bad_size_of_the_last_ranges(value):
    with pytest.raises(UserError, match=r"^calibration.image_size must be 'test', None, a "
                                        r'positive integer or \(height, width\), got'):
        CalibrationSettings.from_dict(dict(image_size=value))
