# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images as timm prepares them, but for the normalization."""
import numpy as np
import pytest
import timm
import torch
from mmengine.registry import DATASETS
from PIL import Image
from timm.data import create_transform, resolve_data_config

from psaq_mm.classification import ImageFolder, TimmClassifier
from psaq_mm.errors import UserError

MODELS = ('deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224', 'deit_base_patch16_384')
SIZES = dict(a=(320, 250), b=(200, 260), c=(224, 224), d=(700, 500))


@pytest.fixture
def root(tmp_path):
    """Four images in the classes n2 and n10, the second grey."""
    generator = np.random.default_rng(0)
    for index, (name, (width, height)) in enumerate(SIZES.items()):
        coarse = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
        folder = tmp_path / ('n2' if index < 2 else 'n10')
        folder.mkdir(exist_ok=True)
        (image.convert('L') if name == 'b' else image).save(folder / f'{name}.png')
    return tmp_path


def test_items(root):
    images = ImageFolder(str(root), MODELS[0])
    assert len(images) == 4
    assert images.metainfo == dict(classes=['n10', 'n2'])  # alphabetical
    assert [item['data_samples'] for item in images] == [0, 0, 1, 1]
    for item in images:
        assert set(item) == {'inputs', 'data_samples'}
        assert item['inputs'].dtype == torch.uint8
        assert item['inputs'].shape == (3, 224, 224)
    grey = images[3]['inputs']
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


@pytest.mark.parametrize('name', MODELS)
def test_equals_timm_after_normalization(root, name):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    reference = create_transform(**config, is_training=False)  # normalizes
    images = ImageFolder(str(root), name)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ('mean', 'std'))
    for index, (path, _) in enumerate(images.images.samples):
        expected = reference(Image.open(path).convert('RGB'))
        pixels = images[index]['inputs']
        assert pixels.shape == expected.shape == config['input_size']
        assert torch.allclose((pixels.float() / 255 - mean) / std, expected, atol=1e-6)


def test_equals_timm_after_the_preprocessor_of_the_model(root):
    images = ImageFolder(str(root), MODELS[0])
    model = TimmClassifier(MODELS[0], depth=1, embed_dim=24, num_classes=2)
    config = resolve_data_config(model=model.model)
    reference = create_transform(**config, is_training=False)
    batch = model.data_preprocessor(dict(
        inputs=[item['inputs'] for item in images],
        data_samples=[item['data_samples'] for item in images]))
    expected = [reference(Image.open(path).convert('RGB')) for path, _ in images.images.samples]
    assert torch.allclose(batch['inputs'], torch.stack(expected), atol=1e-6)
    assert batch['data_samples'] == [0, 0, 1, 1]


def test_transform(root):
    whole = ImageFolder(str(root), MODELS[0], dict(crop_pct=1.0, input_size=[3, 64, 64]))
    assert whole[1]['inputs'].shape == (3, 64, 64)
    path, _ = whole.images.samples[0]
    resized = Image.open(path).convert('RGB').resize((64, 64), Image.BICUBIC)  # of 224 x 224
    assert torch.equal(whole[0]['inputs'], torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_training(root):
    images = ImageFolder(str(root), MODELS[0], dict(hflip=1.0), training=True)
    first, second = images[0]['inputs'], images[0]['inputs']
    assert first.dtype == torch.uint8 and first.shape == (3, 224, 224)
    assert not torch.equal(first, second)  # drawn anew
    augmented = ImageFolder(str(root), MODELS[0],
                            dict(auto_augment='rand-m9-mstd0.5-inc1'), training=True)
    assert augmented[2]['inputs'].dtype == torch.uint8


def test_no_folder(root):
    with pytest.raises(UserError, match=r'/none does not exist; expected <root>/<class>/<image>'):
        ImageFolder(str(root / 'none'), MODELS[0])
    with pytest.raises(UserError, match=r'class folder.*; expected <root>/<class>/<image>'):
        ImageFolder(str(root / 'n2'), MODELS[0])  # images, but no folders
    for name in ('empty/a', 'empty/b'):
        (root / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r'no images in .*empty; expected <root>/<class>/<image>'):
        ImageFolder(str(root / 'empty'), MODELS[0])


def test_empty_folders_keep_their_place(root):
    """A part of a data set keeps the labels of all of it."""
    before = [images['data_samples'] for images in ImageFolder(str(root), MODELS[0])]
    (root / 'a_before_all').mkdir()
    images = ImageFolder(str(root), MODELS[0])
    assert images.metainfo['classes'][0] == 'a_before_all'
    assert [image['data_samples'] for image in images] == [label + 1 for label in before]


def test_wrong_arguments(root):
    with pytest.raises(UserError, match='The nearest: deit_tiny_patch16_224'):
        ImageFolder(str(root), 'deit_tiny_patch16_22')
    with pytest.raises(UserError, match="unknown key 'crop_pt'. Did you mean 'crop_pct'"):
        ImageFolder(str(root), MODELS[0], dict(crop_pt=1.0))
    for key in ('normalize', 'is_training', 're_prob'):
        with pytest.raises(UserError, match=f'unknown key {key!r}'):
            ImageFolder(str(root), MODELS[0], {key: True})


def test_config(root):
    images = DATASETS.build(dict(type='psaq_mm.ImageFolder', root=str(root), model=MODELS[0]))
    assert isinstance(images, ImageFolder)
