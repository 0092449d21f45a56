# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The ``quantization`` section: defaults, precedence and errors."""
import pytest

from psaq_mm.errors import UserError
from psaq_mm.quantization import QuantSpec
from psaq_mm.quantization.placement import PLACEMENTS, ROLES, resolve_placement
from psaq_mm.recipe.merging import merged
from psaq_mm.recipe.quantization import QuantizationSettings, size_in_bytes

PLAIN = dict(weight=dict(rounding='nearest'), activation=dict(margin=0.), roles={}, overrides={})


def settings(**values):
    """With naive ranges and rounding, but for these values."""
    return QuantizationSettings.from_dict(merged(PLAIN, values))


def of_section(**values):
    """Of these values alone, as in a config."""
    return QuantizationSettings.from_dict(values)


def message_of(**values):
    with pytest.raises(UserError) as error:
        of_section(**values)
    return str(error.value)


def test_defaults():
    chosen = QuantizationSettings.from_dict(None)
    assert chosen == QuantizationSettings()
    assert chosen.scope == 'model'
    assert (tuple(chosen.include), tuple(chosen.exclude)) == (('*', ), ())
    assert chosen.placed_roles == {'weight', 'input', 'query', 'key', 'attention', 'value'}
    assert chosen.channel_limit == 1.5
    weight = QuantSpec(8, True, 'per_channel', rounding='gptq')
    activation = QuantSpec(8, False, 'per_tensor', margin=2.)
    assert (chosen.weight, chosen.activation) == (weight, activation)
    for role in set(ROLES) - {'attention', 'input'}:  # these have rules of their own
        assert chosen.spec_for('any', role) == (weight if role == 'weight' else activation)


def test_groups():
    chosen = settings(weight=dict(bits=4), activation=dict(bits=6, symmetric=True),
                      patch_embed_bits=None)
    assert chosen.spec_for('a', 'weight') == QuantSpec(4, True, 'per_channel')
    for role in set(ROLES) - {'weight'}:
        assert chosen.spec_for('a', role) == QuantSpec(6, True, 'per_tensor')
        assert chosen.spec_for('a', role, ('patch_embed', )).bits == 6
    assert chosen.spec_for('a', 'weight', ('patch_embed', )).bits == 4


# Each level differs from the one below by its bits, and from all by a second value of its own.
LEVELS = dict(
    activation=dict(bits=3, symmetric=True),
    patch_embed_bits=4,
    roles=dict(input=dict(bits=5)),
    overrides={'stem.*': dict(activation=dict(bits=6)), 'stem.conv': dict(input=dict(bits=7))},
)


def test_precedence():
    def bits(levels, name='stem.conv', role='input'):
        chosen = settings(**{level: LEVELS[level] for level in levels})
        return chosen.spec_for(name, role, ('patch_embed', )).bits

    assert bits(['activation']) == 8  # the default of patch_embed_bits
    names = list(LEVELS)
    assert [bits(names[:count]) for count in (2, 3)] == [4, 5]
    assert bits(names) == 7
    assert bits(names, 'stem.other') == 6
    assert bits(names, 'other') == 5
    assert bits(names, 'other', 'key') == 4
    # What a higher level leaves alone stays.
    assert settings(**LEVELS).spec_for('stem.conv', 'input', ('patch_embed', )).symmetric


def test_precedence_of_weight():
    chosen = settings(weight=dict(bits=3, granularity='per_tensor'), patch_embed_bits=4,
                      roles=dict(weight=dict(bits=5)),
                      overrides={'head': dict(weight=dict(bits=6))})
    assert chosen.spec_for('neck', 'weight') == QuantSpec(5, True, 'per_tensor')
    assert chosen.spec_for('neck', 'weight', ('patch_embed', )).bits == 5
    assert chosen.spec_for('head', 'weight') == QuantSpec(6, True, 'per_tensor')


def test_overrides_in_their_order():
    first = {'a*': dict(activation=dict(bits=4)), '*b': dict(activation=dict(bits=5))}
    last = dict(reversed(list(first.items())))
    assert settings(overrides=first).spec_for('ab', 'input').bits == 5
    assert settings(overrides=last).spec_for('ab', 'input').bits == 4
    # A role wins over its group within one entry, in whatever order.
    for keys in (('activation', 'input'), ('input', 'activation')):
        changes = {key: dict(bits=6 if key == 'input' else 3) for key in keys}
        assert settings(overrides={'*': changes}).spec_for('ab', 'input').bits == 6
        assert settings(overrides={'*': changes}).spec_for('ab', 'value').bits == 3


def test_overrides_by_wildcard_or_exact_name():
    chosen = settings(overrides={
        'stages.?.blocks.[01].*': dict(weight=dict(bits=4)), 'odd[0]': dict(weight=dict(bits=5))})
    bits = {name: chosen.spec_for(name, 'weight').bits for name in (
        'stages.0.blocks.1.attn', 'stages.0.blocks.2.attn', 'stages.10.blocks.1.attn',
        'STAGES.0.blocks.1.attn', 'odd[0]', 'odd0')}
    assert list(bits.values()) == [4, 8, 8, 8, 5, 5]


def test_patch_embed_bits():
    chosen = settings(weight=dict(bits=4), activation=dict(bits=4))
    for role in ('weight', 'input'):
        assert chosen.spec_for('patch_embed.projection', role, ('patch_embed', )).bits == 8
        assert chosen.spec_for('patch_embed.projection', role).bits == 4
    chosen = settings(weight=dict(bits=4), patch_embed_bits=6)
    assert chosen.spec_for('p', 'weight', ('patch_embed', )) == QuantSpec(6, True, 'per_channel')


def test_predictor_bits():
    chosen = settings(weight=dict(bits=4), activation=dict(bits=4))
    for role in ('weight', 'input'):
        assert chosen.spec_for('head.fc_reg', role, ('predictor', )).bits == 8
        assert chosen.spec_for('head.fc_reg', role).bits == 4
    chosen = settings(weight=dict(bits=4), predictor_bits=None)
    assert chosen.spec_for('p', 'weight', ('predictor', )).bits == 4
    chosen = settings(weight=dict(bits=4), predictor_bits=6, roles=dict(weight=dict(bits=5)))
    assert chosen.spec_for('p', 'weight', ('predictor', )).bits == 5  # roles win
    assert chosen.spec_for('p', 'input', ('predictor', )).bits == 6


def test_overrides_of_a_kind():
    """Whatever the layers are called; a kind that a model lacks is no error."""
    chosen = settings(overrides={'@roi_head': dict(weight=dict(bits=6), input=dict(bits=5)),
                                 '@predictor': dict(input=dict(bits=7))})
    for kinds, weight, activation in (((), 8, 8), (('roi_head', ), 6, 5), (('predictor', ), 8, 7),
                                      (('roi_head', 'predictor'), 6, 7)):
        assert chosen.spec_for('fc', 'weight', kinds).bits == weight
        assert chosen.spec_for('fc', 'input', kinds).bits == activation
    with pytest.raises(UserError, match="'@predictors'.*: @patch_embed, @predictor, @roi_head, "
                                        '@segmentor'):
        settings(overrides={'@predictors': {}})
    with pytest.raises(UserError, match='bits'):
        settings(overrides={'@predictor': dict(input=dict(bits=11))})


def test_observer_of_a_group():
    chosen = settings(activation=dict(observer=dict(type='MSEObserver', candidates=10)))
    assert chosen.spec_for('a', 'key').observer == dict(type='MSEObserver', candidates=10)
    assert chosen.spec_for('a', 'weight').observer == dict(type='MinMaxObserver')


# Placement and wildcards

@pytest.mark.parametrize('values, where', [
    (dict(activation=dict(rotate=True)), 'activation.rotate.* sets it for attention'),
    (dict(weight=dict(rotate=True)), 'weight.rotate.* sets it for weight'),
    (dict(roles=dict(key=dict(rotate=True))), 'roles.key.rotate'),
    (dict(overrides={'a.*': dict(value=dict(rotate=True))}), r"overrides\['a.\*'\].value.rotate")])
def test_rotation_is_of_inputs(values, where):
    assert settings(roles=dict(input=dict(rotate=True))).spec_for('layer', 'input').rotate
    with pytest.raises(UserError, match=rf'^quantization\.{where}'):
        settings(**values)


@pytest.mark.parametrize('values, where', [
    (dict(activation=dict(granularity='per_token')), 'activation.granularity.* for '),
    (dict(weight=dict(granularity='per_token')), 'weight.granularity.* for weight'),
    (dict(roles=dict(value=dict(granularity='per_token'))), 'roles.value.granularity'),
    (dict(overrides={'a.*': dict(key=dict(granularity='per_token'))}),
     r"overrides\['a.\*'\].key.granularity")])
def test_scales_of_tokens_are_of_rows_of_products(values, where):
    for role in ('input', 'attention'):
        chosen = settings(roles={role: dict(granularity='per_token')})
        assert chosen.spec_for('layer', role).granularity == 'per_token'
    with pytest.raises(UserError, match=rf'^quantization\.{where}'):
        settings(**values)


def test_rounding_is_of_weights():
    chosen = settings(weight=dict(rounding='gptq'), roles=dict(weight=dict(bits=4)))
    assert chosen.spec_for('layer', 'weight').rounding == 'gptq'
    assert chosen.spec_for('layer', 'input').rounding == 'nearest'


@pytest.mark.parametrize('values, where', [
    (dict(activation=dict(rounding='gptq')), 'activation'),
    (dict(roles=dict(key=dict(rounding='gptq'))), 'roles.key'),
    (dict(overrides={'a.*': dict(input=dict(rounding='gptq'))}), "overrides['a.*'].input")])
def test_rounding_of_activations(values, where):
    with pytest.raises(UserError) as error:
        QuantizationSettings.from_dict(values)
    assert str(error.value) == (f"quantization.{where}.rounding must be 'nearest': only weights "
                                "can be rounded otherwise, got 'gptq'")


def test_placement_names():
    assert resolve_placement('operands') == {'weight', 'input', 'query', 'key', 'attention',
                                             'value'}
    assert resolve_placement('v1') == {'weight', 'input', 'output', 'logits', 'bias_table',
                                       'attention_residual', 'ffn_residual'}
    assert resolve_placement(['weight', 'value', 'weight']) == {'weight', 'value'}
    assert set().union(*PLACEMENTS.values()) == set(ROLES)
    assert settings(placement='v1').placed_roles == resolve_placement('v1')


@pytest.mark.parametrize('placement, message', [
    ('operand', "quantization.placement must be one of operands, v1 .* Did you mean 'operands'?"),
    ([], 'quantization.placement is an empty list'),
    (['weight', 'atention'], "quantization.placement names the unknown role 'atention'. "
     "Did you mean 'attention'?"),
    ([3], 'quantization.placement names the unknown role 3'),
    (8, 'quantization.placement must be a name or a list of roles, got 8'),
    (None, 'quantization.placement must be a name or a list of roles, got None'),
])
def test_wrong_placement(placement, message):
    with pytest.raises(UserError, match='^' + message):
        settings(placement=placement)


def test_one_wildcard_or_several():
    chosen = settings(include='backbone.*', exclude=['a', 'b'])
    assert list(chosen.include) == ['backbone.*']
    assert list(chosen.exclude) == ['a', 'b']
    for key in ('include', 'exclude'):
        for value in (5, [5], dict(a=1), None):
            assert message_of(**{key: value}).startswith(
                f'quantization.{key} must be a wildcard or a list of wildcards, got {value!r}')


def test_scope():
    assert settings(scope='model').scope == 'model'
    assert message_of(scope='neck') == (
        "quantization.scope must be one of backbone, model, got 'neck'")


def test_groups_change_their_defaults():
    """Of a section's group only what differs is there; a spec is a whole one."""
    chosen = of_section(weight=dict(bits=4), activation=dict(margin=0.))
    assert chosen.weight == QuantSpec(4, True, 'per_channel', rounding='gptq')
    assert chosen.activation == QuantSpec(8, False)
    for values in (of_section(weight=QuantSpec(3)), QuantizationSettings(weight=QuantSpec(3))):
        assert values.weight == QuantSpec(3, True, 'per_tensor', rounding='nearest')
    with pytest.raises(UserError, match='^weight must be a QuantSpec, got '):
        QuantizationSettings(weight=dict(bits=4))


def test_ranges_are_learned_or_not_without_a_setting():
    assert message_of(learnable_ranges=True).startswith(
        'unknown key quantization.learnable_ranges.')


# Unknown keys and wrong values

@pytest.mark.parametrize('values, where, hint', [
    (dict(wieght={}), 'quantization.wieght', 'weight'),
    (dict(placment='v1'), 'quantization.placment', 'placement'),
    (dict(weight=dict(bitz=4)), 'quantization.weight.bitz', 'bits'),
    (dict(activation=dict(granularty=4)), 'quantization.activation.granularty', 'granularity'),
    (dict(roles=dict(atention={})), 'quantization.roles.atention', 'attention'),
    (dict(roles=dict(attention=dict(bit=4))), 'quantization.roles.attention.bit', 'bits'),
    (dict(overrides={'a.*': dict(wieght={})}), "quantization.overrides['a.*'].wieght", 'weight'),
    (dict(overrides={'a.*': dict(input=dict(bitss=3))}),
     "quantization.overrides['a.*'].input.bitss", 'bits'),
    (dict(overrides={'*': dict(activations=dict(bits=3))}),
     "quantization.overrides['*'].activations", 'activation'),
])
def test_unknown_key(values, where, hint):
    assert message_of(**values).startswith(
        f'unknown key {where}. Did you mean {hint!r}? Known keys: ')


def test_unknown_key_that_resembles_none():
    # Not 'weight.bits': a key is looked for where it was written.
    assert message_of(bitz=4).startswith('unknown key quantization.bitz. Known keys: weight, ')


@pytest.mark.parametrize('values, message', [
    (dict(weight=dict(bits=1)), 'quantization.weight.bits must be an integer from 2 to 8, got 1'),
    (dict(activation=dict(bits=9)),
     'quantization.activation.bits must be an integer from 2 to 8, got 9'),
    (dict(roles=dict(key=dict(symmetric='no'))),
     "quantization.roles.key.symmetric must be True or False, got 'no'"),
    (dict(overrides={'a*': dict(key=dict(bits=99))}),
     "quantization.overrides['a*'].key.bits must be an integer from 2 to 8, got 99"),
])
def test_wrong_value(values, message):
    assert message_of(**values) == message


@pytest.mark.parametrize('key', ['patch_embed_bits', 'predictor_bits'])
@pytest.mark.parametrize('bits', [1, 9, '8', 4.0, True])
def test_wrong_bits_of_the_first_or_last_layer(bits, key):
    assert message_of(**{key: bits}) == (
        f'quantization.{key} must be None or an integer from 2 to 8, got {bits!r}')


@pytest.mark.parametrize('values, where', [
    (dict(weight=4), 'weight'), (dict(weight='4'), 'weight'),
    (dict(activation=None), 'activation'),
    (dict(roles=['attention']), 'roles'), (dict(roles=dict(attention=4)), 'roles.attention'),
    (dict(overrides='a.*'), 'overrides'), (dict(overrides={'a.*': 4}), "overrides['a.*']"),
    (dict(overrides={'a.*': dict(weight=4)}), "overrides['a.*'].weight"),
])
def test_what_must_be_a_dict(values, where):
    assert message_of(**values).startswith(f'quantization.{where} must be a dict, got ')


def test_section_that_is_no_dict():
    with pytest.raises(UserError, match='^quantization must be a dict, got 8'):
        QuantizationSettings.from_dict(8)


def test_scope_notes_of_mmengine_are_ignored():
    values = dict(bits=4, _scope_='mmdet')
    chosen = settings(weight=values, roles=dict(key=values, _scope_='mmdet'), _scope_='mmdet',
                      overrides={'a': dict(value=values, _scope_='mmdet'), '_scope_': 'mmdet'})
    plain = dict(bits=4)
    expected = settings(weight=plain, roles=dict(key=plain), overrides=dict(a=dict(value=plain)))
    for role in ROLES:
        for name in ('a', 'b'):
            assert chosen.spec_for(name, role) == expected.spec_for(name, role)


# Budgets


def test_no_budget_by_default():
    assert QuantizationSettings().budget == ''
    assert of_section(mean_bits=3.5).budget == 'mean_bits=3.5'
    assert of_section(candidate_bits=[8, 4, 4]).candidate_bits == (4, 8)


@pytest.mark.parametrize('size, expected', [
    ('12MB', 12_000_000), ('1.5 MiB', 1_572_864), ('300kb', 300_000), (4096, 4096), ('5B', 5)])
def test_sizes(size, expected):
    assert size_in_bytes(size) == expected
    assert of_section(target_size=size).budget == f'target_size={size}'


@pytest.mark.parametrize('size', ['12', 'MB', '-1MB', '12 XB', 0, -5, 1.5, True, '0MB', [1]])
def test_no_sizes(size):
    assert 'target_size must be bytes or a size such as' in message_of(target_size=size)


@pytest.mark.parametrize('values, message', [
    (dict(mean_bits=1.9), 'mean_bits=1.9 is below the smallest possible, 2'),
    (dict(mean_bits=9), 'mean_bits=9 is above the largest possible, 8'),
    (dict(mean_bits='4'), 'mean_bits must be a number'),
    (dict(max_drop=0), 'max_drop must be a percentage above 0'),
    (dict(mean_bits=4, max_drop=1), 'mean_bits=4 contradicts max_drop=1: give one'),
    (dict(mean_bits=4, target_size='1MB'), "contradicts target_size='1MB'"),
    (dict(candidate_bits=[4, 16]), 'no format of an engine has 16 bits'),
    (dict(candidate_bits=[]), 'candidate_bits must be a list of bits'),
    (dict(candidate_bits=8), 'candidate_bits must be a list of bits'),
    (dict(mean_bits=4, candidate_bits=[2, 4, 6]), 'activations are to have 8 on the average'),
])
def test_budgets_that_cannot_be(values, message):
    assert message in message_of(**values)


def test_exact_names_are_no_wildcards():
    chosen = settings(overrides={'a.b': dict(weight=dict(bits=3)), 'a*': dict(input=dict(bits=2))})
    assert chosen.spec_for('a.b', 'weight').bits == 3
    assert chosen.spec_for('aXb', 'weight').bits == 8
    assert chosen.spec_for('aXb', 'input').bits == 2
