# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Configs: every shipped one loads, bases combine, mistakes are named."""
import pytest
from conftest import DEMO, ROOT
from mmengine.config import Config

from psaq_mm import UserError
from psaq_mm.engine import load_config, read_recipe

QUANTIZED = sorted((ROOT / 'configs').glob('*_w?a?.py'))
BASES = sorted((ROOT / 'configs' / '_base_').glob('*w?a?.py'))
DEPTHS = dict(t=[2, 2, 6, 2], s=[2, 2, 18, 2], b=[2, 2, 18, 2])
WIDTHS = dict(t=96, s=96, b=128)


def test_all_configs_are_there():
    names = {p.stem for p in QUANTIZED}
    every = ('w8a8', 'w6a6', 'w4a8', 'w4a4')
    detectors = {f'{family}_{size}_{bits}' for bits in every for family, sizes in (
        ('mask_rcnn_swin', 'ts'), ('cascade_mask_rcnn_swin', 'tsb'), ('upernet_swin', 'tsb'),
        ('retinanet_swin', 't')) for size in sizes}
    classifiers = {f'{name}_{bits}' for bits in ('w8a8', 'w4a8')
                   for name in ('deit_t', 'deit_s', 'deit_b', 'swin_t', 'swin_s')}
    assert names == detectors | classifiers


@pytest.mark.parametrize('bits, percentile', [('w8a8', 0.999), ('w4a4', 0.999), ('w3a3', 0.98)])
def test_bits_of_a_base(tmp_path, bits, percentile):
    """Where integers are few, ranges clip more; weights learn as fast, counted in steps."""
    config = tmp_path / 'x.py'
    config.write_text(f"_base_ = ['{DEMO}/mask_rcnn_swin_demo.py', "
                      f"'{ROOT}/configs/_base_/{bits}.py']\n")
    recipe = read_recipe(load_config(config))
    quantization = recipe.quantization
    assert quantization.spec_for('x', 'weight').bits == int(bits[1])
    assert quantization.spec_for('x', 'input').bits == int(bits[3])
    assert quantization.spec_for('x', 'input').observer == dict(
        type='PercentileObserver', percentile=percentile)
    assert quantization.spec_for('x', 'input').margin == (2 if bits == 'w8a8' else 0)
    assert recipe.evolution.weight_lr == 0.01


@pytest.mark.parametrize('preset', ['default', 'fast', 'paper'])
@pytest.mark.parametrize('base', BASES, ids=lambda p: p.stem)
def test_every_base_takes_every_preset(tmp_path, base, preset):
    config = tmp_path / 'x.py'
    config.write_text(f"_base_ = ['{DEMO}/mask_rcnn_swin_demo.py', '{base}']\n")
    recipe = read_recipe(load_config(config, dict(preset=preset)))
    assert recipe.quantization.spec_for('x', 'input').observer['type'] in (
        'MinMaxObserver', 'PercentileObserver')


@pytest.mark.parametrize('path', QUANTIZED, ids=lambda p: p.stem)
def test_shipped_config(path):
    config = load_config(path)
    settings = read_recipe(config).quantization
    bits = path.stem.rsplit('_', 1)[1]
    assert f'w{settings.spec_for("x", "weight").bits}a{settings.spec_for("x", "input").bits}' \
        == bits
    assert settings.spec_for('x', 'weight', ('patch_embed', )).bits == 8
    if config.model.type != 'psaq_mm.TimmClassifier':
        assert config.model.backbone.type == 'SwinTransformer'
        size = path.stem.split('swin_')[1][0]
        assert config.model.backbone.depths == DEPTHS[size]
        assert config.model.backbone.embed_dims == WIDTHS[size]
    assert len(path.read_text().splitlines()) <= 5


@pytest.mark.parametrize('host', [
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'])
@pytest.mark.parametrize('base', BASES, ids=lambda p: p.stem)
def test_bases_clash_with_no_host_config(host, base, tmp_path):
    """mmengine refuses a top-level key that two bases define."""
    if host.startswith('mmseg'):
        pytest.importorskip('mmseg')
    config = tmp_path / 'mine.py'
    for reference in (f'psaq_mm::_base_/{base.name}', str(base)):
        config.write_text(f"_base_ = ['{host}', '{reference}']\n")
        read_recipe(load_config(config))


def test_bases_work_by_path_without_our_loader(tmp_path, demo_config):
    """As a stock tool reads them."""
    config = tmp_path / 'mine.py'
    config.write_text(f"_base_ = ['{demo_config}', '{ROOT / 'configs/_base_/w4a4.py'}']\n")
    loaded = Config.fromfile(str(config))
    assert loaded.recipe == 'w4a4' and loaded.preset == 'default'
    assert loaded.custom_hooks[0].type == 'psaq_mm.QuantizedCheckpointHook'


def test_inheritance_and_options_override(tmp_path, demo_config):
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = ['{demo_config}', 'psaq_mm::_base_/w8a8.py']\n"
        "quantization = dict(weight=dict(bits=4), exclude=['*.downsample.*'])\n"
        "synthesis = dict(priors=dict(total_variation=dict(weight=0.2)))\n")
    recipe = read_recipe(load_config(config, {
        'quantization.activation.granularity': 'per_channel',
        'quantization.weight.observer.type': 'MSEObserver',
        'synthesis.image_size': (224, 448), 'synthesis.num_images': 5,
        'synthesis.priors.patch_similarity.weight': 2.0, 'calibration.batch_size': 3}))
    weight = recipe.quantization.spec_for('x', 'weight')
    assert (weight.bits, weight.observer['type']) == (4, 'MSEObserver')
    assert recipe.quantization.spec_for('x', 'input').granularity == 'per_channel'
    assert recipe.quantization.exclude == ('*.downsample.*', )
    assert recipe.synthesis.size == (224, 448)
    assert recipe.synthesis.num_images == 5
    weights = {k: t.weight for k, t in recipe.synthesis.build_priors().items()}
    assert weights == dict(patch_similarity=2.0, total_variation=0.2)
    assert recipe.calibration.batch_size == 3


def test_priors_can_be_dropped(quantization_config):
    options = {'synthesis.priors.patch_similarity': None}
    settings = read_recipe(load_config(quantization_config, options)).synthesis
    assert list(settings.build_priors()) == ['total_variation']


@pytest.mark.parametrize('key, hint', [
    ('quantization.weigth.bits', "Did you mean 'weight'?"),
    ('quantization.roles.atention.bits', "Did you mean 'attention'?"),
    ('synthesis.num_image', "Did you mean 'num_images'?"),
    ('calibration.batchsize', "Did you mean 'batch_size'?"),
    ('synthesys.steps', "Did you mean 'synthesis'?")])
def test_unknown_keys_name_the_nearest(key, hint, quantization_config):
    with pytest.raises(UserError, match=hint.replace('?', r'\?')):
        read_recipe(load_config(quantization_config, {key: 4}))


@pytest.mark.parametrize('key, value, hint', [
    ('recipe', 'w4a5', r"recipe must be one of w3a3, .*, got 'w4a5'. Did you mean 'w4a8'\?"),
    ('preset', 'papr', r"preset must be one of default, .*, got 'papr'. Did you mean 'paper'"),
    ('synthesis', 'few', "synthesis must be a dict, got 'few'")])
def test_unknown_names(key, value, hint, quantization_config):
    with pytest.raises(UserError, match=hint) as caught:
        read_recipe(load_config(quantization_config, {key: value}))
    assert str(quantization_config) in str(caught.value)


def test_config_stays_as_it_is(quantization_config):
    """Reading a recipe writes nothing into the config: what is dumped is what was given."""
    config = load_config(quantization_config, {'synthesis.steps': 3})
    before = config.to_dict()
    read_recipe(config)
    assert config.to_dict() == before
    assert config.synthesis == dict(steps=3) and 'quantization' not in config


@pytest.mark.parametrize('preset, rounds', [('default', 0), ('paper', 10), ('fast', 0)])
def test_dumped_config(preset, rounds, tmp_path, demo_config):
    """It gives the same recipe, a preset on top of it takes effect, and what was removed
    stays removed, in options too."""
    config = tmp_path / 'mine.py'
    config.write_text(
        f"_base_ = ['{demo_config}', 'psaq_mm::_base_/w4a4.py']\n"
        "quantization = dict(roles=dict(_delete_=True, input=dict(margin=1.)), "
        "overrides=dict(_delete_=True))\n"
        "synthesis = dict(priors=dict(total_variation=None))\n")
    first = load_config(config, {'synthesis.steps': 7})
    recipe = read_recipe(first)
    assert dict(recipe.quantization.roles) == dict(input=dict(margin=1.))
    assert not recipe.quantization.overrides
    assert list(recipe.synthesis.build_priors()) == ['patch_similarity']
    first.dump(str(tmp_path / 'dumped.py'))
    again = read_recipe(load_config(tmp_path / 'dumped.py'))
    assert again == recipe
    changed = read_recipe(load_config(tmp_path / 'dumped.py', dict(preset=preset)))
    assert changed == read_recipe(load_config(config, {'synthesis.steps': 7, 'preset': preset}))
    assert changed.evolution.rounds == rounds and changed.synthesis.steps == 7
    assert dict(changed.quantization.roles) == dict(input=dict(margin=1.))
    # Inherited, dumped and changed once more: what is removed in a base file stays so.
    heir = tmp_path / 'heir.py'
    heir.write_text(f"_base_ = '{tmp_path / 'dumped.py'}'\n"
                    "quantization = dict(roles=dict(attention=dict(bits=8)))\n")
    assert dict(read_recipe(load_config(heir)).quantization.roles) == dict(
        input=dict(margin=1.), attention=dict(bits=8))
