# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The recipe of a config: its own values over the shipped ones, options over both."""
import pytest
from conftest import DEMO, ROOT
from mmengine.config import Config

from psaq_mm import Recipe, UserError
from psaq_mm.engine import load_config, read_recipe

SHIPPED = sorted((ROOT / 'configs').glob('*_w?a?.py'))
PRESETS = ('default', 'fast', 'paper')
BASES = ('w3a3', 'w4a4', 'w4a8', 'w6a6', 'w8a8')


@pytest.fixture
def write(tmp_path):
    """Writes a config of a few lines; most tests need no model that could be built."""

    def write(text, bases=(), name='mine.py'):
        path = tmp_path / name
        path.write_text((f'_base_ = {list(map(str, bases))}\n' if bases else
                         "model = dict(type='Anything')\n") + text)
        return path

    return write


def read(path, **options):
    return read_recipe(load_config(path, {k.replace('__', '.'): v for k, v in options.items()}))


def changed(recipe, **sections):
    return recipe.changed(sections)


# What is shipped


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_shipped_config(path):
    """The shipped recipe of its name, and nothing on top of it."""
    config = load_config(path)
    base = path.stem.rsplit('_', 1)[1]
    assert (config.recipe, config.preset) == (base, 'default')
    expected = Recipe.shipped(base)
    if path.stem.startswith('deit'):  # [v1]
        assert config.synthesis.lr == 0.2
        expected = changed(expected, synthesis=dict(lr=0.2))
    assert read_recipe(config) == expected


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('base', BASES)
def test_base_and_preset(base, preset, write):
    """The same from a base file and an option, by name, and from Python."""
    expected = Recipe.shipped(base, preset)
    path = write('', [DEMO / 'mask_rcnn_swin_demo.py', ROOT / f'configs/_base_/{base}.py'])
    assert read(path) == Recipe.shipped(base)
    assert read(path, preset=preset) == expected
    assert read(write(f'recipe = {base!r}\npreset = {preset!r}\n')) == expected
    assert read(write('quantization = dict()\n'), recipe=base, preset=preset) == expected


def test_one_set_of_defaults(write):
    """Whatever of our keys a config has."""
    for text in ('quantization = dict()', "preset = 'default'", "recipe = 'w8a8'",
                 'recipe = None\nevolution = dict()', 'preset = None\nsynthesis = dict()',
                 "preset = 'default'\nevolution = None\nquantization = None"):
        assert read(write(text + '\n')) == Recipe()


def test_reading_leaves_the_config_as_it_is(write):
    config = load_config(write("recipe = 'w4a4'\nquantization = dict(roles=dict(_delete_=True), "
                               'weight=dict(bits=3))\n'))
    text = config.pretty_text
    for _ in range(2):
        assert read_recipe(config) == changed(Recipe.shipped('w4a4'), quantization=dict(
            roles=dict(_delete_=True), weight=dict(bits=3)))
        assert config.pretty_text == text
    assert config.quantization.weight == dict(bits=3)  # what it changes, and no more


# Who wins


def test_own_values_win(write):
    recipe = read(write(
        "preset = 'paper'\n"
        "quantization = dict(weight=dict(bits=4), placement='operands')\n"
        'synthesis = dict(steps=7, priors=dict(total_variation=dict(weight=0.2)))\n'
        'evolution = dict(rounds=3, taps=dict(rois=0.5))\n'
        'calibration = dict(image_size=None)\n'))
    weight = recipe.quantization.spec_for('x', 'weight')
    assert (weight.bits, weight.granularity) == (4, 'per_channel')
    assert recipe.quantization.spec_for('x', 'input').bits == 8
    assert recipe.quantization.placement == 'operands'
    assert (recipe.synthesis.steps, recipe.synthesis.num_images) == (7, 32)
    terms = recipe.synthesis.build_priors()
    assert (terms['total_variation'].weight, terms['patch_similarity'].form) == (0.2, 'v1')
    paper = Recipe.shipped(preset='paper')
    assert recipe.evolution.rounds == 3
    assert recipe.evolution.student_steps == paper.evolution.student_steps
    assert recipe.evolution.taps['rois'] == 0.5 and recipe.evolution.taps['backbone'] == 1.
    assert (recipe.calibration.image_size, recipe.calibration.batch_size) == (None, 8)


def test_values_of_the_default_win_over_another_preset(write):
    """Even where the config says what the default would have said."""
    assert Recipe().evolution.rounds == 0
    assert read(write("preset = 'paper'\nevolution = dict(rounds=0)\n")).evolution.rounds == 0


def test_options_win_over_both(write):
    path = write("preset = 'fast'\nevolution = dict(rounds=3, sample_steps=7)\n"
                 'synthesis = dict(steps=7)\n')
    recipe = read(path, evolution__rounds=9, synthesis__num_images=2,
                  quantization__activation__bits=6,
                  synthesis__priors__total_variation__weight=0.4)
    fast = Recipe.shipped(preset='fast')
    assert (recipe.evolution.rounds, recipe.evolution.sample_steps,
            recipe.evolution.student_steps) == (9, 7, fast.evolution.student_steps)
    assert (recipe.synthesis.steps, recipe.synthesis.num_images) == (7, 2)
    assert recipe.quantization.spec_for('x', 'input').bits == 6
    assert recipe.synthesis.build_priors()['total_variation'].weight == 0.4


def test_preset_and_bits_by_an_option(write):
    """They give way to the config's own values as the config's would."""
    path = write("recipe = 'w4a4'\nevolution = dict(sample_steps=7)\n")
    for preset in PRESETS:
        for base in BASES:
            assert read(path, preset=preset, recipe=base) == changed(
                Recipe.shipped(base, preset), evolution=dict(sample_steps=7))
    assert read(path, preset='fast', evolution__rounds=2) == changed(
        Recipe.shipped('w4a4', 'fast'), evolution=dict(sample_steps=7, rounds=2))


def test_child_wins_over_its_base(write):
    base = write("recipe = 'w4a4'\npreset = 'fast'\nsynthesis = dict(steps=7, num_images=3)\n",
                 name='base.py')
    assert read(write("recipe = 'w6a6'\nsynthesis = dict(steps=8)\n", [base])) == changed(
        Recipe.shipped('w6a6', 'fast'), synthesis=dict(steps=8, num_images=3))


def test_configs_are_read_afresh(write):
    """What one config changes does not reach the next."""
    path = write("preset = 'default'\n")
    assert read(path, synthesis__steps=7, evolution__rounds=77) != Recipe()
    assert read(path) == Recipe()


# What a config removes


DELETED = dict(_delete_=True)
ATTENTION = dict(attention=dict(bits=5))


@pytest.mark.parametrize('text, expected', [
    ('quantization = dict(roles=dict(_delete_=True))', dict(quantization=dict(roles=DELETED))),
    ('quantization = dict(roles=dict(_delete_=True, attention=dict(bits=5)))',
     dict(quantization=dict(roles=dict(DELETED, **ATTENTION)))),
    ('quantization = dict(_delete_=True, scope="model")',
     dict(quantization=dict(DELETED, scope='model'))),
    ('quantization = dict(overrides={"@predictor": dict(_delete_=True, input=dict(bits=7))})',
     dict(quantization=dict(overrides={'@predictor': dict(DELETED, input=dict(bits=7))}))),
    ("synthesis = dict(priors=dict(_delete_=True, tv=dict(type='TotalVariationPrior')))",
     dict(synthesis=dict(priors=dict(DELETED, tv=dict(type='TotalVariationPrior'))))),
    ('evolution = dict(taps=dict(_delete_=True, logits=1.))',
     dict(evolution=dict(taps=dict(DELETED, logits=1.)))),
])
@pytest.mark.parametrize('where', ['own', 'child', 'grandchild'])
def test_deleted(where, text, expected, write):
    """From the shipped recipe, whether the file that says so has bases or not."""
    path = write("recipe = 'w4a4'\n", name='0.py')
    for name in dict(own=(), child=('1.py', ), grandchild=('1.py', '2.py'))[where]:
        path = write('', [path], name=name)
    path = write(text + '\n', [path], name='last.py')
    recipe = Recipe.shipped('w4a4').changed(expected)
    assert read(path) == recipe != Recipe.shipped('w4a4')
    # Also where the deletion is not the last word.
    below = write('synthesis = dict(steps=3)\n', [path], name='below.py')
    assert read(below) == changed(recipe, synthesis=dict(steps=3))


def test_deleted_by_a_file_without_bases(write):
    assert read(write("recipe = 'w4a4'\nquantization = dict(roles=dict(_delete_=True))\n")) \
        == changed(Recipe.shipped('w4a4'), quantization=dict(roles=DELETED))


def test_deleted_between(write):
    """A base sets what a child deletes, and a grandchild adds to what is left."""
    base = write("recipe = 'w4a4'\nquantization = dict(scope='model', roles=dict("
                 'key=dict(bits=3), value=dict(bits=6)))\n', name='base.py')
    child = write('quantization = dict(roles=dict(_delete_=True, query=dict(bits=7)))\n', [base],
                  name='child.py')
    grandchild = write('quantization = dict(roles=dict(attention=dict(bits=5)))\n', [child],
                       name='grandchild.py')
    for path, roles in ((child, {}), (grandchild, ATTENTION)):
        recipe = read(path)
        assert recipe.quantization.roles == dict(query=dict(bits=7), **roles)
        assert recipe == changed(Recipe.shipped('w4a4'), quantization=dict(
            scope='model', roles=dict(DELETED, query=dict(bits=7), **roles)))
    # What a base added is deleted too, and the whole section with what was deleted in it.
    last = write('quantization = dict(_delete_=True, roles=dict(key=dict(bits=4)))\n',
                 [grandchild], name='last.py')
    assert read(last) == changed(Recipe.shipped('w4a4'), quantization=dict(
        DELETED, roles=dict(key=dict(bits=4))))


def test_deleted_by_an_option(write):
    path = write("recipe = 'w4a4'\nquantization = dict(roles=dict(key=dict(bits=3)))\n")
    shipped = Recipe.shipped('w4a4')
    assert read(path, quantization__roles___delete_=True) == changed(
        shipped, quantization=dict(roles=DELETED))
    for options in (dict(quantization__roles=dict(DELETED, **ATTENTION)),
                    dict(quantization__roles___delete_=True,
                         quantization__roles__attention__bits=5)):
        assert read(path, **options) == changed(
            shipped, quantization=dict(roles=dict(DELETED, **ATTENTION)))
    assert read(path, quantization=dict(_delete_=True, scope='model')) == changed(
        shipped, quantization=dict(_delete_=True, scope='model'))


def test_other_keys_are_deleted_as_ever(write):
    """mmengine's mark of deletion stays in our sections alone."""
    base = write("recipe = 'w4a4'\ntest_cfg = dict(type='A', x=1)\n", name='base.py')
    config = load_config(write("test_cfg = dict(_delete_=True, type='B')\n"
                               'quantization = dict(roles=dict(_delete_=True))\n', [base]))
    assert config.test_cfg == dict(type='B')
    assert config.quantization.roles == DELETED
    merge = Config._merge_a_into_b
    assert merge(dict(quantization=dict(_delete_=True, a=1)), dict(quantization=dict(b=2))) \
        == dict(quantization=dict(a=1))  # outside of our loader


# Written down and read again


@pytest.mark.parametrize('text', [
    '', 'quantization = dict(roles=dict(_delete_=True, attention=dict(bits=5)))\n',
    "quantization = dict(_delete_=True, scope='model')\n",
    "synthesis = dict(steps=3, priors=dict(_delete_=True, tv=dict(type='TotalVariationPrior')))\n",
])
def test_dumped_config(text, write, tmp_path):
    """Gives the same recipe, and presets, bits and options still take effect."""
    base = write("recipe = 'w4a4'\nquantization = dict(roles=dict(key=dict(bits=3)))\n",
                 name='base.py')
    config = load_config(write(text, [base]), {'calibration.batch_size': 3})
    dumped = tmp_path / 'dumped.py'
    config.dump(str(dumped))
    recipe, again = read_recipe(config), load_config(dumped)
    assert read_recipe(again) == recipe
    assert again.pretty_text == config.pretty_text
    for options in (dict(preset='paper'), dict(recipe='w8a8'),
                    dict(preset='fast', synthesis__num_images=2)):
        found = read(dumped, **options)
        assert found == read(tmp_path / 'mine.py', calibration__batch_size=3, **options)
        # Bits are those of a section, which one of the texts replaces.
        assert (found == recipe) is ('recipe' in options and 'scope' in text)
    if 'steps' not in text:
        assert read(dumped, preset='paper').evolution.rounds == 10
        assert read(dumped, preset='fast').synthesis.steps == 25
    # As a base it is as good.
    child = write('quantization = dict(roles=dict(value=dict(bits=6)))\n', [dumped],
                  name='child.py')
    deleted = dict(_delete_=True) if 'scope' in text else {}  # with the rest of the section
    assert read(child) == changed(recipe, quantization=dict(roles=dict(
        deleted, value=dict(bits=6))))


# Mistakes


@pytest.mark.parametrize('name, hint', [
    ('fats', "Did you mean 'fast'?"), ('Paper', "Did you mean 'paper'?"),
    ('defaults', "Did you mean 'default'?"), ('zzz', ''), ('', ''), (3, ''), (['fast'], '')])
@pytest.mark.parametrize('by_option', [False, True])
def test_unknown_preset(name, hint, by_option, write):
    path = write('quantization = dict()\n' if by_option else f'preset = {name!r}\n')
    with pytest.raises(UserError) as error:
        read(path, **(dict(preset=name) if by_option else {}))
    message = str(error.value)
    assert message.startswith(f'config {path}: preset must be one of {", ".join(PRESETS)}, '
                              f'got {name!r}')
    assert hint in message


@pytest.mark.parametrize('by_option', [False, True])
def test_unknown_recipe(by_option, write):
    path = write('quantization = dict()\n' if by_option else "recipe = 'w8a9'\n")
    with pytest.raises(UserError, match=r"mine.py: recipe must be one of w3a3, w4a4, w4a8, w6a6, "
                                        r"w8a8, got 'w8a9'\. Did you mean 'w8a8'\?$"):
        read(path, **(dict(recipe='w8a9') if by_option else {}))


@pytest.mark.parametrize('text', ['', 'preset = None\n', 'recipe = None\n',
                                  'quantization = None\npreset = None\n'])
def test_no_recipe(text, write):
    with pytest.raises(UserError, match=r"mine.py has no recipe; add ours to its bases, e.g. "
                                        r"_base_ = \['my_mask_rcnn_swin.py', "
                                        r"'psaq_mm::_base_/w8a8.py'\]$"):
        read(write(text))


@pytest.mark.parametrize('text, message', [
    ('evolution = dict(round=3)', r"unknown key evolution\.round\. Did you mean 'rounds'\?"),
    ('evolution = dict(taps=dict(neks=1.))', r'unknown key evolution\.taps\.neks'),
    ('evolution = 3', 'evolution must be a dict, got 3'),
    ('evolution = dict(rounds=-1)', 'evolution.rounds must be an integer of at least 0'),
    ("calibration = dict(image_size='train')", "calibration.image_size must be 'test'"),
    ('quantization = dict(activation=dict(margin=-1))', 'quantization.activation.margin'),
    ('quantization = dict(learnable_ranges=True)',
     r'unknown key quantization\.learnable_ranges\.'),
    ("evolution = dict(losses=dict(scores='binary_kl'))", r'unknown key evolution\.losses\.')])
def test_wrong_values(text, message, write):
    path = write(f"preset = 'default'\n{text}\n")
    with pytest.raises(UserError, match=f'^config .*mine.py: {message}'):
        read(path)


def test_misspelt_keys(write):
    for key, right in (('presets', 'preset'), ('recipes', 'recipe'), ('evolutions', 'evolution')):
        with pytest.raises(UserError, match=f"unknown config key '{key}'. Did you mean '{right}'"):
            load_config(write(f"{key} = 'fast'\nquantization = dict()\n"))
    for key, right in (('prest', 'preset'), ('receipt', 'recipe')):
        with pytest.raises(UserError, match=f"no key '{key}'. Did you mean '{right}'"):
            load_config(write("preset = 'fast'\n"), {key: 'paper'})
