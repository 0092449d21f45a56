# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Photographs of one's own, without labels, in the place of synthetic images."""
import sys
from pathlib import Path
from statistics import median_low
from typing import Any, Callable, List, Optional, Tuple, Union

import torch
from mmengine.config import Config
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.tested_size import slid_window
from psaq_mm.errors import UserError
from psaq_mm.pipeline import check_images
from psaq_mm.recipe.checks import check_model, check_positive_int, check_seed
from psaq_mm.runtime.images import find_files
from psaq_mm.synthesis import mosaics

from .inference import input_pipeline, read_rgb, require_readable

MAX_IMAGES = 32
"""As many as are usual for calibration."""


def load_images(model: nn.Module, folder: Union[str, Path], max_images: int = MAX_IMAGES,
                seed: int = 0, config: Optional[Config] = None) -> Tensor:
    """Photographs as a model sees them in a test, for :func:`psaq_mm.quantize`.

        images = psaq_mm.load_images(model, 'photos')
        student = psaq_mm.quantize(model, recipe, images=images, test_size=images.shape[-2:])

    Each goes alone through the test pipeline and the model's preprocessor, annotations left
    out. Where that leaves them of several sizes they get the median height and width: what is
    larger is cropped to a random part, what is smaller is laid side by side with itself
    [choice: padding has activations of its own, and scaling changes how fine texture is]. Of a
    segmentor that slides over its images, each becomes a random window.

    Args:
        model (nn.Module): The float model.
        folder (str or Path): Searched with its subfolders. Files that cannot be read are
            skipped, with a warning.
        max_images (int): Of more files, so many are drawn. Defaults to 32.
        seed (int): Seed of which are drawn, and of the parts. Defaults to 0.
        config (Config, optional): How images are tested. Defaults to None: ``model.cfg``.

    Returns:
        Tensor: Normalized images of shape (N, C, H, W), on the CPU: 4 bytes for each of these
        numbers, and twice as much while they are read.

    Raises:
        UserError: If the folder is missing, holds no image or none that can be read; the config
            does not say how images are prepared; or the model does not take such images.
    """
    check_model(model)
    check_positive_int(max_images, 'max_images')
    check_seed(seed, 'seed')
    files = own_files(folder)
    config = config if config is not None else getattr(model, 'cfg', None)
    if config is None:
        raise UserError('psaq_mm.load_images: the model has no cfg that says how images are '
                        'prepared; take one of psaq_mm.init_model, or give config=')
    prepare = _preparing(model, config)
    generator = torch.Generator().manual_seed(seed)
    images: List[Tensor] = []
    skipped: List[str] = []
    for index in torch.randperm(len(files), generator=generator).tolist():
        try:
            require_readable(files[index])
            read_rgb(files[index])
        except UserError as error:
            skipped.append(str(error))
            continue
        images.append(prepare(files[index]))
        if len(images) == max_images:
            break
    if skipped:
        shown = '; '.join(skipped[:3]) + ('; ...' if len(skipped) > 3 else '')
        if not images:
            raise UserError(f'none of the {len(files)} images in {folder} can be read: {shown}')
        # To the terminal alone: no log holds names of images.
        print(f'images that are skipped: {len(skipped)} ({shown})', file=sys.stderr)
    size = slid_window(config) or _median(images)
    found = torch.cat([_fitted(image, size, generator) for image in images])
    check_images(model, found)
    return found


def own_files(folder: Union[str, Path]) -> List[Path]:
    """The image files of a folder and of its subfolders, sorted; none is opened.

    Raises:
        UserError: If there is no such folder, or no image in it.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f'{path} is a file; expected a folder of images' if path.exists()
                        else f'folder of images {path} does not exist')
    return find_files([path])


def _preparing(model: nn.Module, config: Config) -> Callable[[Path], Tensor]:
    """What makes a model's input of an image file: normalized, of shape (1, C, H, W)."""
    prepare = input_pipeline(config)
    channels = find_adapter(model).valid_range(model)[0].shape[1]
    preprocess: Any = getattr(model, 'data_preprocessor', None)
    if preprocess is None:
        raise UserError('psaq_mm.load_images: the model has no data_preprocessor that normalizes '
                        'images')

    def normalized(path: Path) -> Tensor:
        batch = prepare(path)
        pixels = batch.get('inputs', [None])[0]
        if not isinstance(pixels, Tensor) or pixels.dim() != 3 or len(pixels) != channels:
            got = f'shape {tuple(pixels.shape)}' if isinstance(pixels, Tensor) \
                else type(pixels).__name__
            raise UserError(f'image {path}: the model takes {channels} channels, (C, H, W), and '
                            f'the test pipeline gives {got}; look at its LoadImageFromFile')
        with torch.no_grad():
            return preprocess(batch, False)['inputs'].float().cpu()

    return normalized


def _median(images: List[Tensor]) -> Tuple[int, int]:
    """Median height and width; an even number of images has the lower of two."""
    height, width = (median_low(image.shape[axis] for image in images) for axis in (-2, -1))
    return height, width


def _fitted(image: Tensor, size: Tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random part of an image, or the image beside itself, of a size; shape (1, C, H, W)."""
    top, left = (int(torch.randint(max(0, own - wanted) + 1, (), generator=generator))
                 for own, wanted in zip(image.shape[-2:], size))
    return mosaics(image[..., top:top + size[0], left:left + size[1]], size)
