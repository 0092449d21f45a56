# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Photographs as a model sees them in a test."""
import copy

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO
from small_models import detector

import psaq_mm
from psaq_mm import UserError
from psaq_mm.classification import TimmClassifier
from psaq_mm.engine import build_float_model, load_config

MEAN, STD = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])  # of RGB, as in the config


@pytest.fixture(scope='module')
def model():
    """A small detector whose test pipeline leaves images of up to 64 pixels as they are."""
    model = detector()
    model.cfg = load_config(DEMO / 'mask_rcnn_swin_demo.py')
    model.cfg.test_dataloader.dataset.pipeline[1].scale = (64, 64)
    return model


def with_loader(model, **changes):
    """The config of a model with another ``LoadImageFromFile``."""
    config = copy.deepcopy(model.cfg)
    config.test_dataloader.dataset.pipeline[0].update(changes)
    return config


def write(folder, name, height, width, seed=0):
    """An image of random pixels that are not repeated in it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(folder / name), pixels)
    return pixels


def normalized(pixels):
    """What the preprocessor makes of BGR pixels, written anew: shape (3, H, W)."""
    return torch.from_numpy(((pixels[..., ::-1] - MEAN) / STD).transpose(2, 0, 1)).float()


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


def test_pixels(model, tmp_path):
    """In an order that the seed draws, and from subfolders too."""
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'note.txt').write_text('')
    expected = [normalized(write(tmp_path, name, 64, 64, seed)) for seed, name in
                enumerate(('0.png', '1.bmp', '2.PNG', 'sub/3.png'))]
    images = psaq_mm.load_images(model, tmp_path)
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.float32
    order = [next(i for i, one in enumerate(expected) if close(image, one)) for image in images]
    assert sorted(order) == [0, 1, 2, 3]
    assert torch.equal(images, psaq_mm.load_images(model, tmp_path))
    drawn = [psaq_mm.load_images(model, tmp_path, 2, seed) for seed in range(5)]
    assert all(len(images) == 2 for images in drawn) and close(drawn[0], images[:2])
    assert len({float(images.sum()) for images in drawn}) > 1


def test_sizes(model, tmp_path):
    """Of most; what is higher is cropped, what is narrower stands beside itself."""
    sizes = [(32, 64)] * 3 + [(64, 64), (64, 32)]
    expected = [normalized(write(tmp_path, f'{i}.png', *size, i))
                for i, size in enumerate(sizes)]
    images = psaq_mm.load_images(model, tmp_path)
    assert images.shape == (5, 3, 32, 64)
    wanted = [*expected[:3]]
    for top in range(33):
        wanted += [expected[3][:, top:top + 32], expected[4][:, top:top + 32].repeat(1, 1, 2)]
    found = [next(i for i, one in enumerate(wanted) if close(image, one)) for image in images]
    assert len(set(found)) == 5


def test_padding_of_one_image(model, tmp_path):
    """The preprocessor pads to multiples of 32, as in a test of one image."""
    expected = normalized(write(tmp_path, 'a.png', 40, 64))
    image, = psaq_mm.load_images(model, tmp_path)
    assert image.shape == (3, 64, 64) and close(image[:, :40], expected)
    assert not image[:, 40:].any()


@pytest.mark.parametrize('kind', ['grey', 'alpha', '16 bits'])
def test_kinds_of_files(kind, model, tmp_path):
    """Those that the host's loader turns into 8 bits of three channels."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    colors = pixels[..., :3]
    if kind == 'grey':
        cv2.imwrite(str(tmp_path / 'a.png'), pixels[..., 0])
        colors = pixels[..., :1].repeat(3, -1)
    elif kind == 'alpha':
        cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    else:
        cv2.imwrite(str(tmp_path / 'a.tiff'), colors.astype(np.uint16) * 257)
    image, = psaq_mm.load_images(model, tmp_path)
    assert close(image, normalized(colors))


def test_channels_that_the_model_does_not_take(model, tmp_path):
    cv2.imwrite(str(tmp_path / 'a.png'), np.zeros((64, 64, 4), np.uint8))
    with pytest.raises(UserError, match=r'a\.png: the model takes 3 channels.*shape \(4, 64, 64'):
        psaq_mm.load_images(model, tmp_path, config=with_loader(model, color_type='unchanged'))


def test_unreadable_files(model, tmp_path, capsys):
    for name in ('0.png', '1.jpg', '2.tif', '3.png'):
        (tmp_path / name).write_bytes(b'no image')
    write(tmp_path, 'whole.png', 64, 64)
    (tmp_path / '4.png').write_bytes((tmp_path / 'whole.png').read_bytes()[:2000])  # cut short
    assert len(psaq_mm.load_images(model, tmp_path)) == 1
    error = capsys.readouterr().err
    assert 'images that are skipped: 5 (' in error and error.count('cannot be read') == 3
    (tmp_path / 'whole.png').unlink()
    with pytest.raises(UserError, match='none of the 5 images in .* can be read: .*cannot be'):
        psaq_mm.load_images(model, tmp_path)


def test_refused(model, tmp_path):
    for folder, message in ((tmp_path / 'none', 'does not exist'), (__file__, 'is a file'),
                            (tmp_path, 'holds no images')):
        with pytest.raises(UserError, match=message):
            psaq_mm.load_images(model, folder)
    write(tmp_path, 'a.png', 64, 64)
    with pytest.raises(UserError, match='max_images must be a positive integer, got 0'):
        psaq_mm.load_images(model, tmp_path, 0)
    with pytest.raises(UserError, match='has no cfg'):
        psaq_mm.load_images(model.backbone, tmp_path)
    with pytest.raises(UserError, match='no data_preprocessor'):
        psaq_mm.load_images(model.backbone, tmp_path, config=model.cfg)
    # A pipeline that fails is no matter of one file.
    with pytest.raises(UserError, match='cannot be prepared by the test pipeline'):
        psaq_mm.load_images(model, tmp_path, config=with_loader(model, imdecode_backend='none'))


def test_window_of_a_segmentor(tmp_path):
    config = load_config(DEMO / 'upernet_swin_demo.py')
    config.model.test_cfg = dict(mode='slide', crop_size=(32, 48), stride=(16, 16))
    config.test_dataloader.dataset.pipeline[1].scale = (64, 64)
    model = build_float_model(config)
    pixels = normalized(write(tmp_path, 'a.png', 64, 64))
    image, = psaq_mm.load_images(model, tmp_path, config=config)
    assert image.shape == (3, 32, 48)
    assert any(close(image, pixels[:, top:top + 32, left:left + 48])
               for top in range(33) for left in range(17))


def test_classifier(tmp_path):
    """As timm resizes and crops for it."""
    config = load_config(DEMO / 'deit_demo.py')
    config.test_dataloader.dataset.update(
        model='deit_tiny_patch16_224', transform=dict(input_size=(3, 32, 32), crop_pct=1.))
    model = TimmClassifier('deit_tiny_patch16_224', depth=1, embed_dim=24, num_classes=2,
                           img_size=32)
    pixels = normalized(write(tmp_path, 'a.png', 32, 64))
    image, = psaq_mm.load_images(model, tmp_path, config=config)
    assert close(image, pixels[:, :, 16:48])
    config.test_dataloader.dataset.transform.input_size = (3, 64, 64)
    with pytest.raises(UserError, match='the size of the images must be 32, the only size'):
        psaq_mm.load_images(model, tmp_path, config=config)
