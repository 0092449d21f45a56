# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Configs: every shipped one loads, bases combine, mistakes are named."""
import pytest
from conftest import ROOT
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
    assert (loaded.recipe, loaded.preset) == ('w4a4', 'default')
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
    assert recipe.synthesis.batches() == [5]
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
