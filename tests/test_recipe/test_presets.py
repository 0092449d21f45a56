# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Presets: under the config's own values, which are under the options."""
import copy

import pytest
import torch
from conftest import DEMO, ROOT
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.config import Config
from psaq_mm.presets import BASES, PRESETS, SECTIONS

import psaq_mm
from psaq_mm import UserError
from psaq_mm.engine import load_config, read_sections

SHIPPED = sorted((ROOT / 'configs').glob('*_w?a?.py'))
NAMES = ('default', 'evolve', 'fast', 'paper')


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
    return read_sections(load_config(path, {k.replace('__', '.'): v for k, v in options.items()}))


def preset_file(name):
    return Config.fromfile(str(ROOT / 'configs' / '_base_' / 'presets' / f'{name}.py')).to_dict()


# What a preset says


def test_all_presets_are_there():
    assert sorted(path.stem for path in PRESETS.glob('*.py')) == sorted(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_preset_fills_in_all_sections(name, write):
    config = load_config(write(f'preset = {name!r}\n'))
    values = preset_file(name)
    assert {section: config[section].to_dict() for section in SECTIONS} == values
    sections = read_sections(config)
    assert sections.synthesis.num_images == values['synthesis']['num_images']
    assert sections.evolution.rounds == values['evolution']['rounds']
    assert sections.calibration.image_size == 'test'


def test_default(write):
    sections = read(write("preset = 'default'\n"))
    assert sections.quantization.placement == 'operands'
    assert sections.quantization.scope == 'backbone'
    assert sections.quantization.patch_embed_bits == sections.quantization.predictor_bits == 8
    for name, kinds, rule in (
            ('x.qkv', (), 'PercentileObserver'), ('x.attn.w_msa.proj', (), 'MinMaxObserver'),
            ('patch_embed.proj', ('patch_embed', ), 'MinMaxObserver'),
            ('roi_head.bbox_head.fc_reg', ('roi_head', 'predictor'), 'MinMaxObserver')):
        spec = sections.quantization.spec_for(name, 'input', kinds)
        assert spec.observer['type'] == rule and spec.margin == 2
    assert sections.quantization.spec_for('x', 'input').observer['percentile'] == 0.999
    spec = sections.quantization.spec_for('x', 'input', ('roi_head', ))
    assert spec.observer['percentile'] == 0.9995 and (spec.bits, spec.margin) == (8, 2)
    assert sections.quantization.spec_for('x', 'weight').rounding == 'gptq'
    assert sections.evolution.rounds == 0
    assert sections.synthesis.batches() == [8]


@pytest.mark.parametrize('base', ['w4a4', 'w3a3', 'w4a8', 'w8a8'])
def test_inputs_of_roi_heads_keep_bits_and_room(base, write):
    """Whatever the rest has; weights do not, and a user can say otherwise."""
    model = "model = dict(type='Anything')\n"
    quantization = read(write(model, [BASES / f'{base}.py'])).quantization
    spec = quantization.spec_for('roi_head.x', 'input', ('roi_head', ))
    assert (spec.bits, spec.margin) == (8, 2)
    assert quantization.spec_for('roi_head.x', 'weight', ('roi_head', )).bits == int(base[1])
    assert quantization.spec_for('neck.x', 'input').bits == int(base[3])
    mine = "quantization = dict(overrides={'@roi_head': dict(input=dict(bits=5, margin=0.))})\n"
    quantization = read(write(model + mine, [BASES / f'{base}.py'])).quantization
    spec = quantization.spec_for('roi_head.x', 'input', ('roi_head', ))
    assert (spec.bits, spec.margin) == (5, 0) and spec.observer['percentile'] == 0.9995


def changes(write, name):
    """What a preset says that the default does not: section and key to both values."""
    mine, default = (load_config(write(f'preset = {n!r}\n')).to_dict() for n in (name, 'default'))
    return {(section, key): (value, default[section][key]) for section in SECTIONS
            for key, value in mine[section].items() if value != default[section][key]}


def test_fast_is_the_default_in_fewer_steps(write):
    (key, (steps, of_default)), = changes(write, 'fast').items()
    assert key == ('synthesis', 'steps') and 2 * steps == of_default


def test_evolve_is_the_default_with_rounds(write):
    (key, (rounds, of_default)), = changes(write, 'evolve').items()
    assert key == ('evolution', 'rounds') and rounds > 0 == of_default
    evolution = read(write("preset = 'evolve'\n")).evolution
    assert not evolution.sample_steps
    assert evolution.zoom > 1 > evolution.contrast and evolution.learn == 'both'


def test_paper(write):
    sections = read(write("preset = 'paper'\n"))
    quantization, synthesis = sections.quantization, sections.synthesis
    assert quantization.placement == 'v1'
    assert quantization.patch_embed_bits is quantization.predictor_bits is None
    assert not {*quantization.overrides} - {'_scope_'}
    for role in ('weight', 'input', 'output', 'attention'):  # naive ranges
        assert quantization.spec_for('x', role).observer == dict(type='MinMaxObserver')
        assert quantization.spec_for('x', role).margin == 0
    assert synthesis.batches() == [32]
    assert (synthesis.steps, tuple(synthesis.shifts), synthesis.lr) == (500, (15, 30), 0.25)
    terms = synthesis.build_priors()
    assert set(terms) == {'patch_similarity', 'total_variation'}  # no BatchNorm prior
    assert terms['patch_similarity'].form == 'v1'
    assert (terms['patch_similarity'].weight, terms['total_variation'].weight) == (1., 0.05)
    assert sections.evolution.rounds > 0 and not dict(sections.evolution.losses)
    assert sections.evolution.sample_steps and sections.evolution.competes
    assert sections.evolution.zoom == sections.evolution.contrast == 1  # V2 tells of no views


# Who wins


def test_own_values_win(write):
    sections = read(write(
        "preset = 'paper'\n"
        "quantization = dict(weight=dict(bits=4), placement='operands')\n"
        'synthesis = dict(steps=7, priors=dict(total_variation=dict(weight=0.2)))\n'
        'evolution = dict(rounds=3, taps=dict(rois=0.5))\n'
        'calibration = dict(image_size=None)\n'))
    weight = sections.quantization.spec_for('x', 'weight')
    assert (weight.bits, weight.granularity) == (4, 'per_channel')
    assert sections.quantization.spec_for('x', 'input').bits == 8
    assert sections.quantization.placement == 'operands'
    assert (sections.synthesis.steps, sections.synthesis.num_images) == (7, 32)
    terms = sections.synthesis.build_priors()
    assert (terms['total_variation'].weight, terms['patch_similarity'].form) == (0.2, 'v1')
    assert sections.evolution.rounds == 3
    assert sections.evolution.student_steps == preset_file('paper')['evolution']['student_steps']
    assert sections.evolution.taps['rois'] == 0.5 and sections.evolution.taps['backbone'] == 1.
    assert (sections.calibration.image_size, sections.calibration.batch_size) == (None, 8)


def test_values_of_the_default_win_over_another_preset(write):
    """Even where the config says what the default would have said."""
    assert preset_file('default')['evolution']['rounds'] == 0
    assert read(write("preset = 'evolve'\nevolution = dict(rounds=0)\n")).evolution.rounds == 0


def test_options_win_over_both(write):
    path = write("preset = 'fast'\nevolution = dict(rounds=3, sample_steps=7)\n"
                 'synthesis = dict(steps=7)\n')
    sections = read(path, evolution__rounds=9, synthesis__num_images=2,
                    quantization__activation__bits=6,
                    synthesis__priors__total_variation__weight=0.4)
    evolution = sections.evolution
    assert (evolution.rounds, evolution.sample_steps, evolution.student_steps) == (
        9, 7, preset_file('fast')['evolution']['student_steps'])
    assert (sections.synthesis.steps, sections.synthesis.num_images) == (7, 2)
    assert sections.quantization.spec_for('x', 'input').bits == 6
    assert sections.synthesis.build_priors()['total_variation'].weight == 0.4


def test_preset_by_an_option(write):
    """It gives way to the config's own values as the config's would."""
    path = write("preset = 'default'\nevolution = dict(sample_steps=7)\n")
    sections = read(path, preset='paper')
    assert sections.quantization.placement == 'v1'
    assert (sections.evolution.sample_steps, sections.evolution.student_steps) == (
        7, preset_file('paper')['evolution']['student_steps'])
    assert read(path, preset='fast').evolution.rounds == 0
    assert read(path, preset='fast', evolution__rounds=2).evolution.rounds == 2


def test_terms_are_dropped_or_replaced(write):
    path = write("preset = 'default'\nsynthesis = dict(priors=dict(patch_similarity=None))\n")
    assert list(read(path).synthesis.build_priors()) == ['total_variation']
    path = write("preset = 'default'\nsynthesis = dict(priors=dict(_delete_=True, "
                 "mine=dict(type='TotalVariationPrior', weight=2.)))\n")
    terms = read(path).synthesis.build_priors()
    assert list(terms) == ['mine'] and terms['mine'].weight == 2.


def test_presets_are_read_afresh(write):
    """What one config changes does not reach the next."""
    values = load_config(write("preset = 'default'\n")).to_dict()
    changed = read(write("preset = 'default'\nsynthesis = dict(steps=7)\n"), evolution__rounds=77)
    assert (changed.synthesis.steps, changed.evolution.rounds) == (7, 77)
    assert load_config(write("preset = 'default'\n")).to_dict() == values


def test_section_that_is_none_is_the_presets(write):
    sections = read(write("preset = 'fast'\nevolution = None\nquantization = None\n"))
    assert sections.evolution.rounds == 0
    assert sections.quantization.placement == 'operands'


# Mistakes


@pytest.mark.parametrize('name, hint', [
    ('fats', "Did you mean 'fast'?"), ('Paper', "Did you mean 'paper'?"),
    ('defaults', "Did you mean 'default'?"), ('zzz', ''), ('', ''), (3, ''), (['fast'], '')])
@pytest.mark.parametrize('by_option', [False, True])
def test_unknown_preset(name, hint, by_option, write):
    path = write('' if by_option else f'preset = {name!r}\n')
    with pytest.raises(UserError, match=f'must be one of {", ".join(NAMES)}, got') as error:
        load_config(path, dict(preset=name) if by_option else None)
    assert repr(name) in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize('text', ['', 'preset = None\n'])
def test_no_preset(text, write):
    with pytest.raises(UserError, match="has no 'quantization' section"):
        read(write(text))
    sections = read(write(text + 'quantization = dict(weight=dict(bits=4))\n'))
    assert sections.evolution.rounds == 0  # the sections' own defaults


@pytest.mark.parametrize('text, message', [
    ('evolution = dict(round=3)', r"unknown key evolution\.round\. Did you mean 'rounds'\?"),
    ('evolution = dict(taps=dict(neks=1.))', r"unknown key evolution\.taps\.neks"),
    ('evolution = 3', 'evolution must be a dict, got 3'),
    ('evolution = dict(rounds=-1)', 'evolution.rounds must be an integer of at least 0'),
    ("calibration = dict(image_size='train')", "calibration.image_size must be 'test'"),
    ('quantization = dict(activation=dict(margin=-1))', 'quantization.activation.margin')])
def test_wrong_values_over_a_preset(text, message, write):
    with pytest.raises(UserError, match=message):
        read(write(f"preset = 'default'\n{text}\n"))


def test_misspelt_preset_key(write):
    with pytest.raises(UserError, match="unknown config key 'presets'. Did you mean 'preset'"):
        load_config(write("presets = 'fast'\nquantization = dict()\n"))
    with pytest.raises(UserError, match="no key 'prest'. Did you mean 'preset'"):
        load_config(write("preset = 'fast'\n"), dict(prest='paper'))


# What is shipped


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: p.stem)
def test_shipped_config_resolves(path):
    """By the default preset, but for what it says itself."""
    config = load_config(path)
    assert config.preset == 'default'
    sections, preset = read_sections(config), preset_file('default')
    assert sections.evolution.rounds == preset['evolution']['rounds']
    assert sections.calibration.image_size == 'test'
    assert sections.quantization.placement == 'operands'
    for section in SECTIONS:
        assert config[section].to_dict().keys() == preset[section].keys()


@pytest.mark.parametrize('base, placement, bits', [
    ('paper_w8a8', 'v1', (8, 8)), ('w8a8', 'operands', (8, 8)), ('w4a4', 'operands', (4, 4)),
    ('w4a8', 'operands', (4, 8)), ('w6a6', 'operands', (6, 6))])
def test_bases(base, placement, bits, write):
    path = write('', [DEMO / 'mask_rcnn_swin_demo.py', ROOT / f'configs/_base_/{base}.py'])
    quantization = read(path).quantization
    assert quantization.placement == placement
    assert tuple(quantization.spec_for('x', role).bits for role in ('weight', 'input')) == bits
    quantization = read(path, preset='paper').quantization
    assert quantization.placement == 'v1'
    assert tuple(quantization.spec_for('x', role).bits for role in ('weight', 'input')) == bits


# From Python


def without_scope(values):
    """Without what mmengine writes into dictionaries of a base in another package."""
    if isinstance(values, dict):
        return {k: without_scope(v) for k, v in values.items() if k != '_scope_'}
    return values


@pytest.mark.parametrize('preset', NAMES)
@pytest.mark.parametrize('base', ['w8a8', 'w6a6', 'w4a8', 'w4a4', 'w3a3'])
def test_as_a_config_gets_them(base, preset, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = ['psaq_mm::_base_/{base}.py']\npreset = {preset!r}\n"
                    "model = dict(type='Anything')\n")
    config = load_config(path).to_dict()
    assert without_scope(psaq_mm.shipped(base, preset)) == without_scope(
        {section: config[section] for section in SECTIONS})


def test_plain_values_of_ones_own():
    first = psaq_mm.shipped('w4a4')
    assert type(first['quantization']['weight']) is dict
    first['quantization']['weight']['bits'] = 2
    assert psaq_mm.shipped('w4a4')['quantization']['weight']['bits'] == 4


def test_the_verbs_take_them():
    swin = SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                           out_indices=(0, 1))
    swin.eval()
    settings = psaq_mm.shipped('w4a4', 'evolve')
    images = psaq_mm.synthesize(swin, seed=0, **{
        **settings['synthesis'], 'num_images': 2, 'batch_size': 2, 'steps': 1, 'image_size': 56})
    student = psaq_mm.quantize(copy.deepcopy(swin), **settings['quantization'])
    psaq_mm.calibrate(student, images)
    psaq_mm.evolve(student, swin, images, **{
        **settings['evolution'], 'rounds': 1, 'student_steps': 1, 'batch_size': 2})
    with torch.no_grad():
        expected, found = swin(images)[-1], student(images)[-1]
    assert 0 < float((expected - found).norm() / expected.norm()) < 0.9


@pytest.mark.parametrize('arguments, message', [
    (('w5a5', ), "a base must be one of w3a3, w4a4, w4a4_segmentor, w4a8, w6a6, w8a8, got 'w5a5'"),
    (('w4a4', 'fats'), "preset must be one of default, evolve, fast, paper, got 'fats'"),
])
def test_bad_names(arguments, message):
    with pytest.raises(psaq_mm.UserError, match=message):
        psaq_mm.shipped(*arguments)


def test_bases_are_all_that_is_shipped():
    named = {file.stem for file in BASES.glob('*.py')}
    for base in ('w3a3', 'w4a4', 'w4a8', 'w6a6', 'w8a8'):
        assert base in named
        assert 'quantization' in Config.fromfile(str(BASES / f'{base}.py'))
