# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""timm's classifiers in mmengine: building, modes, evaluation, configs."""
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from mmengine.model import ImgDataPreprocessor
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

import psaq_mm
from psaq_mm.classification import TimmClassifier
from psaq_mm.engine import PSAQRunner, build_float_model, load_config, read_recipe
from psaq_mm.errors import UserError

DEIT, SWIN = 'deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'
TINY = {DEIT: dict(img_size=64, embed_dim=16, depth=2, num_heads=2, num_classes=5),
        SWIN: dict(img_size=64, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
                   num_classes=5)}


def classifier(name=DEIT, **changes):
    return TimmClassifier(name, **{**TINY[name], **changes}).eval()


# Building


@pytest.mark.parametrize('name', TINY)
def test_is_the_model_of_timm(name):
    torch.manual_seed(1)
    model = classifier(name)
    torch.manual_seed(1)
    reference = timm.create_model(name, **TINY[name])
    assert type(model.model) is type(reference)
    assert list(model.state_dict()) == [f'model.{key}' for key in reference.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(),
                                                 reference.state_dict().values()))


def test_mean_and_std_are_those_of_timm():
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet
    preprocessor = classifier().data_preprocessor
    assert isinstance(preprocessor, ImgDataPreprocessor)
    assert not preprocessor._channel_conversion
    assert preprocessor.mean.flatten().tolist() == pytest.approx(mean)
    assert preprocessor.std.flatten().tolist() == pytest.approx(std)
    # This one was trained with 0.5 and 0.5.
    other = TimmClassifier('vit_tiny_patch16_224', **TINY[DEIT]).data_preprocessor
    assert other.mean.flatten().tolist() == other.std.flatten().tolist() == [127.5] * 3


def test_preprocessor_of_the_user():
    model = classifier(data_preprocessor=dict(type='ImgDataPreprocessor', mean=[1.], std=[2.]))
    assert model.data_preprocessor.mean.flatten().tolist() == [1.]
    given = ImgDataPreprocessor()
    assert classifier(data_preprocessor=given).data_preprocessor is given


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet'])
def test_config(scope):
    init_default_scope(scope)
    model = MODELS.build(dict(type='psaq_mm.TimmClassifier', name=DEIT, **TINY[DEIT]))
    assert isinstance(model, TimmClassifier)


@pytest.mark.parametrize('name, nearest', [
    ('deit_tiny', 'deit_tiny_distilled_patch16_224, deit_tiny_patch16_224'),
    ('swin_tini_patch4_window7_224', SWIN),
    ('deit_tiny_patch16_224.fb_in1', 'deit_tiny_patch16_224.fb_in1k')])
def test_wrong_name(name, nearest):
    with pytest.raises(UserError, match=f'{name!r} is no model of timm.*The nearest: {nearest}'):
        TimmClassifier(name)


@pytest.mark.parametrize('name', ['hf-hub:timm/deit_tiny_patch16_224.fb_in1k', 'qqqqqqqqq'])
def test_nothing_is_downloaded(name):
    with pytest.raises(UserError, match='is no model of timm'):
        TimmClassifier(name)


def test_name_with_a_tag():
    assert TimmClassifier('deit_tiny_patch16_224.fb_in1k', **TINY[DEIT]).model.num_classes == 5


# Modes


@pytest.mark.parametrize('name', TINY)
def test_modes(name):
    model, x, labels = classifier(name), torch.randn(3, 3, 64, 64), [4, 0, 2]
    with torch.no_grad():
        logits = model.model(x)
        assert torch.equal(model(x), logits)
        loss = model(x, labels, mode='loss')
        predictions = model(x, labels, mode='predict')
        unlabelled = model(x, mode='predict')
    assert list(loss) == ['loss']
    expected = -logits.log_softmax(1)[torch.arange(3), labels].mean()
    assert torch.allclose(loss['loss'], expected)
    for row, label, predicted, alone in zip(logits, labels, predictions, unlabelled):
        assert set(predicted) == {'logits', 'label'}
        assert torch.equal(predicted['logits'], row) and torch.equal(alone['logits'], row)
        assert predicted['label'] == label and type(predicted['label']) is int
        assert alone['label'] is None
    assert model(x, torch.tensor(labels), mode='predict')[0]['label'] == 4
    with pytest.raises(ValueError, match="got 'test'"):
        model(x, mode='test')


def test_train_step():
    model = classifier(SWIN)
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    data = dict(inputs=[torch.randint(256, (3, 64, 64), dtype=torch.uint8) for _ in range(4)],
                data_samples=[0, 1, 2, 3])
    model.train()
    losses = [float(model.train_step(data, optimizer)['loss']) for _ in range(8)]
    assert losses[-1] < losses[0]


# Evaluation


@pytest.fixture
def folder(tmp_path):
    """Five classes of three images each."""
    generator = np.random.default_rng(0)
    for label in range(5):
        (tmp_path / 'val' / f'class_{label}').mkdir(parents=True)
        for index in range(3):
            pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((80, 72), Image.BICUBIC)
            image.save(tmp_path / 'val' / f'class_{label}' / f'{index}.png')
    return tmp_path / 'val'


def small_config(name, folder, work_dir):
    config = load_config(ROOT / 'configs' / name)
    config.model.update(TINY[config.model.name])
    config.test_dataloader.update(num_workers=0, batch_size=4)
    config.test_dataloader.dataset.update(
        root=str(folder), transform=dict(input_size=[3, 64, 64]))
    config.test_evaluator.topk = [1, 2]
    config.work_dir = str(work_dir)
    return config


def accuracy(model, dataset, k):
    """Image by image, in percent."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in
                 (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD))
    right = []
    for item in dataset:
        with torch.no_grad():
            logits = model((item['inputs'][None] / 255 - mean) / std)[0]
        right.append(item['data_samples'] in logits.argsort(descending=True)[:k].tolist())
    return 100 * sum(right) / len(right)


@pytest.mark.parametrize('name', ['deit_t_w8a8.py', 'swin_t_w8a8.py'])
def test_evaluation(name, folder, tmp_path):
    config = small_config(name, folder, tmp_path / 'work')
    models = [build_float_model(config) for _ in range(2)]
    assert isinstance(models[0], TimmClassifier) and not models[0].training
    torch.save(dict(state_dict=models[0].state_dict()), tmp_path / 'float.pth')
    models[1] = psaq_mm.prepare(models[1], psaq_mm.QuantizationSettings.from_dict(dict(
        channel_limit=None, weight=dict(bits=4, rounding='nearest'))))
    psaq_mm.calibrate(models[1], torch.randn(2, 3, 64, 64))
    psaq_mm.save(models[1], tmp_path / 'quantized.pth')
    for model, file in zip(models, ('float.pth', 'quantized.pth')):
        config.load_from = str(tmp_path / file)
        runner = PSAQRunner.from_cfg(config)
        metrics = runner.test()
        dataset = runner.test_dataloader.dataset
        assert len(dataset) == 15
        assert metrics == {f'accuracy/top{k}': pytest.approx(accuracy(model, dataset, k))
                           for k in (1, 2)}


# Configs

NAMES = dict(deit_t='deit_tiny_patch16_224', deit_s='deit_small_patch16_224',
             deit_b='deit_base_patch16_224', swin_t='swin_tiny_patch4_window7_224',
             swin_s='swin_small_patch4_window7_224')


@pytest.mark.parametrize('short', NAMES)
def test_configs(short):
    config = load_config(ROOT / 'configs' / f'{short}.py')
    assert config.model.to_dict() == dict(type='psaq_mm.TimmClassifier', name=NAMES[short])
    assert config.test_dataloader.dataset.model == NAMES[short]
    assert config.default_scope == 'mmengine'
    assert timm.is_model(NAMES[short])
    for preset, bits in (('w8a8', 8), ('w4a8', 4)):
        quantized = load_config(ROOT / 'configs' / f'{short}_{preset}.py')
        recipe = read_recipe(quantized)
        assert quantized.model == config.model
        assert quantized.test_dataloader == config.test_dataloader
        assert recipe.quantization.weight.bits == bits
        assert recipe.quantization.activation.bits == 8
        assert recipe.synthesis.image_size is None  # that of the model
        assert recipe.synthesis.lr == (0.2 if short.startswith('deit') else 0.25)
