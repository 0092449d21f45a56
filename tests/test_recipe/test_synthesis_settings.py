# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import pytest
from mmengine.config import Config

from psaq_mm.errors import UserError
from psaq_mm.prior import PatchSimilarityPrior, TotalVariationPrior
from psaq_mm.recipe import CalibrationSettings, SynthesisSettings

NOT_COUNTS = [0, -1, 1.5, '8', None, True, [8]]


def test_defaults():
    settings = SynthesisSettings.from_dict(None)
    assert settings == SynthesisSettings()
    assert settings.num_images == settings.batch_size == 8
    assert settings.image_size is None  # that of the model
    with pytest.raises(ValueError, match='follows a model'):
        assert settings.size
    assert settings.steps == 50 and len(settings.shifts) == 2
    terms = settings.build_priors()
    assert isinstance(terms['patch_similarity'], PatchSimilarityPrior)
    assert isinstance(terms['total_variation'], TotalVariationPrior)
    assert CalibrationSettings.from_dict({}).batch_size == 8


@pytest.mark.parametrize('image_size, expected', [
    (1, (1, 1)), (448, (448, 448)), ((224, 448), (224, 448)), ([448, 224], (448, 224)),
])
def test_size(image_size, expected):
    assert SynthesisSettings(image_size=image_size).size == expected


@pytest.mark.parametrize('key', ['num_images', 'batch_size', 'steps', 'save_interval'])
@pytest.mark.parametrize('value', NOT_COUNTS)
def test_bad_counts(key, value):
    with pytest.raises(UserError, match=f'^synthesis.{key} must be a positive integer, got'):
        SynthesisSettings.from_dict({key: value})


@pytest.mark.parametrize('value', [0, -1, 1.5, '8', True, [8], 'x', (1, 2, 3), (), (224, 0),
                                   (224, -1), (224, 2.5), ('224', 224), {'h': 224}])
def test_bad_image_size(value):
    with pytest.raises(UserError, match='^synthesis.image_size must be None, a positive integer'):
        SynthesisSettings.from_dict(dict(image_size=value))


NAN, INFINITY = float('nan'), float('inf')


@pytest.mark.parametrize('key, values', [
    ('lr', [0, -0.1, NAN, INFINITY, '0.1', None, True, [0.1]]),
    ('warmup', [-0.1, 1.1, NAN, '0', None, True]),
    ('flip', [-0.1, 1.1, NAN, 'yes', None, True]),
    ('betas', [0.5, (), (0.5, ), (0.5, 0.9, 0.9), (0.5, 1), (-0.1, 0.9), (NAN, 0.9), ('a', 0.9),
               None, 'ab', {0: 0.5, 1: 0.9}]),
    ('shifts', [15, (), [], (15, -1), (15, 225), (15, NAN), ('15', ), None, '15']),
])
def test_bad_numbers(key, values):
    for value in values:
        with pytest.raises(UserError, match=f'^synthesis.{key} must be '):
            SynthesisSettings.from_dict({key: value})


@pytest.mark.parametrize('priors, message', [
    (None, 'synthesis.priors must be a dict of named terms, got None'),
    ([dict(type='TotalVariationPrior')], 'synthesis.priors must be a dict of named terms'),
    ({}, 'synthesis.priors is empty'),
    ({'tv': None, '_scope_': 'mmdet'}, 'synthesis.priors is empty'),
    ({'tv': 'TotalVariationPrior'}, "synthesis.priors.tv must be a dict with a 'type'"),
    ({'tv': {'weight': 1}}, "synthesis.priors.tv must be a dict with a 'type'"),
    ({'tv': dict(type='TotalVariation')}, "synthesis.priors.tv.type: 'TotalVariation' is not "
     "registered. Did you mean 'TotalVariationPrior'"),
    ({'tv': dict(type='zzz')}, 'Known: .*PatchSimilarityPrior'),
    ({'tv': dict(type=None)}, 'synthesis.priors.tv.type'),
    ({'tv': dict(type=['TotalVariationPrior'])}, 'synthesis.priors.tv.type'),
    ({'tv': dict(type='TotalVariationPrior', weihgt=1)}, 'synthesis.priors.tv: .*weihgt'),
    ({'tv': dict(type='TotalVariationPrior', weight=-1)}, 'weight must be a number of at least 0'),
    ({'tv': dict(type='TotalVariationPrior', weight='1')}, 'weight must be a number'),
    ({'tv': dict(type='TotalVariationPrior', low=10, high=5)}, 'high must be'),
    ({'pse': dict(type='PatchSimilarityPrior', bins=0)}, 'bins must be'),
    ({'pse': dict(type='PatchSimilarityPrior', form='v2')}, 'form must be'),
    ({'total': dict(type='TotalVariationPrior')}, "synthesis.priors.total: .*another name"),
])
def test_bad_priors(priors, message):
    with pytest.raises(UserError, match=message) as caught:
        SynthesisSettings.from_dict(dict(priors=priors))
    assert str(caught.value).startswith('synthesis.priors')


def test_priors_of_a_config():
    """A term is dropped by None; mmengine's own keys are passed over."""
    config = Config(dict(synthesis=dict(_scope_='mmdet', priors=dict(
        patch_similarity=None, tv=dict(type='TotalVariationPrior', weight=2, _scope_='mmdet')))))
    terms = SynthesisSettings.from_dict(config.synthesis).build_priors()
    assert list(terms) == ['tv']
    assert terms['tv'].weight == 2.


def test_priors_are_built_afresh():
    settings = SynthesisSettings()
    assert settings.build_priors()['total_variation'] is not settings.build_priors()[
        'total_variation']


@pytest.mark.parametrize('key, hint', [('stepz', "'steps'"), ('images', "'num_images'"),
                                       ('imagesize', "'image_size'"), ('prior', "'priors'")])
def test_unknown_key(key, hint):
    with pytest.raises(UserError, match=rf'unknown key synthesis.{key}\. Did you mean {hint}\?'):
        SynthesisSettings.from_dict({key: 1})


@pytest.mark.parametrize('section', [[1], 'x', 3])
@pytest.mark.parametrize('cls, name', [(SynthesisSettings, 'synthesis'),
                                       (CalibrationSettings, 'calibration')])
def test_section_that_is_no_dict(cls, name, section):
    with pytest.raises(UserError, match=f'^{name} must be a dict, got'):
        cls.from_dict(section)


@pytest.mark.parametrize('value', NOT_COUNTS)
def test_bad_calibration(value):
    with pytest.raises(UserError, match='^calibration.batch_size must be a positive integer, got'):
        CalibrationSettings.from_dict(dict(batch_size=value))
    with pytest.raises(UserError, match="calibration.batchsize. Did you mean 'batch_size'"):
        CalibrationSettings.from_dict(dict(batchsize=value))
