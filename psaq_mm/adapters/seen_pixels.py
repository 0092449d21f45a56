# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The pixels that a model sees of test images: what its test pipeline and preprocessor make
of the darkest and the brightest."""
import copy
import re
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from torch import Tensor

from psaq_mm.errors import UserError

from .pixel_range import pixel_range
from .tested_size import step_name, test_dataset

SIDE = 64
"""Of the made-up images, in pixels."""

KEEP_PIXELS = re.compile('Load|^Pack|Pad$|Resize|Flip$|Crop$|ShortestEdge$')
"""Names of steps that only load, move or cut pixels: they are not run."""


class SeenPixels(NamedTuple):
    """What a model sees.

    Args:
        low (Tensor): Of pixel 0, shape (1, C, 1, 1).
        high (Tensor): Of pixel 255, the same shape.
        rgb (bool): Whether channels are in the order of RGB; else BGR.
        failed (str): Steps that could not be run, and are left out.
    """
    low: Tensor
    high: Tensor
    rgb: bool
    failed: str

    @property
    def plain(self) -> bool:
        """bool: Whether nothing changes pixels."""
        return bool((self.low == 0).all() and (self.high == 255).all())


def turns_channels(preprocessor: Any) -> bool:
    """Whether a host's data preprocessor turns BGR into RGB, or RGB into BGR.

    Upstream's mmseg has a name of its own for that.
    """
    return bool(getattr(preprocessor, '_channel_conversion',
                        getattr(preprocessor, 'channel_conversion', False)))


def seen_pixels(config: Any, preprocessor: Any, channels: int) -> SeenPixels:
    """Run the test pipeline of a config, and a model's preprocessor, on made-up images.

    Args:
        config (Config): Its test set need not be there: steps that load are left out.
        preprocessor (nn.Module, optional): Of the model.
        channels (int): Of an image.

    Returns:
        SeenPixels: Of 8-bit images.

    Raises:
        UserError: If a channel has the same value for pixel 0 and 255, or one not finite.
    """
    failed: List[str] = []
    steps = _built_steps(config, failed)
    if preprocessor is not None:  # the same pixels, wherever the model is
        preprocessor = copy.deepcopy(preprocessor).cpu()
    dark = np.zeros((SIDE, SIDE, channels), np.uint8)
    # Two halves: a step may stretch what an image has to the whole range.
    halves = dark.copy()
    halves[:, SIDE // 2:] = 255
    first, second = (_first_pixel(image, steps, preprocessor, failed)
                     for image in (halves, halves[:, ::-1].copy()))
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    if not (low < high).all() or not torch.isfinite(high - low).all():
        raise UserError('test pipeline and data_preprocessor make '
                        f'{_shown(low)} of black and {_shown(high)} of white: these cannot be '
                        'the pixels that the model was trained on')
    blue = halves.copy()
    blue[..., 1:] = 0
    rgb = False
    if channels == 3:
        colour = torch.maximum(*(_first_pixel(image, steps, preprocessor, [])
                                 for image in (blue, blue[:, ::-1].copy())))
        rgb = bool(((colour - low) / (high - low))[-1] > 0.5)
    shape = (1, -1, 1, 1)
    return SeenPixels(low.view(shape), high.view(shape), rgb, '; '.join(dict.fromkeys(failed)))


def _shown(values: Tensor) -> str:
    return ', '.join(f'{value:.4g}' for value in values.tolist())


def _built_steps(config: Any, failed: List[str]) -> List[Tuple[str, Any]]:
    """Names and transforms of the test pipeline, up to the one that packs; none that load."""
    found: List[Tuple[str, Any]] = []
    steps = [(step_name(step), step) for step in test_dataset(config)[1]]
    changing = [(name, step) for name, step in steps if not KEEP_PIXELS.search(name)
                # The steps of a wrapper follow it.
                and (name == 'Albu' or not step.get('transforms'))]
    if not changing:  # the registry would import all datasets
        return found
    with TRANSFORMS.switch_scope_and_registry(config.get('default_scope') or 'mmdet') as registry:
        for name, step in changing:
            try:
                found.append((name, registry.build(dict(step))))
            except Exception as error:  # of a package that is not here, or with wrong arguments
                failed.append(f'{name} ({type(error).__name__}: '
                              f'{" ".join(str(error).split())[:100]})')
    return found


def _first_pixel(image: np.ndarray, steps: List[Tuple[str, Any]], preprocessor: Any,
                 failed: List[str]) -> Tensor:
    """The upper left pixel of an image as the model sees it, shape (C,)."""
    size = image.shape[:2]
    results: Any = dict(img=image, img2=image, img_shape=size, ori_shape=size, pad_shape=size,
                        scale_factor=(1., 1.), img_path='', img_id=0, img_fields=['img'])
    for name, step in steps:
        before = dict(results)
        try:
            results = step(results)
            if not isinstance(results, dict) or 'img' not in results:
                raise TypeError('gives no image')
        except Exception as error:  # it may need annotations, or words
            results = before
            failed.append(f'{name} ({type(error).__name__}: '
                          f'{" ".join(str(error).split())[:100]})')
    pixels = results['img']
    pixels = pixels[0] if isinstance(pixels, list) else pixels
    if not isinstance(pixels, Tensor):  # else some ToTensor has turned it already
        array = np.asarray(pixels)
        array = array[..., None] if array.ndim == 2 else array
        pixels = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    if preprocessor is not None:
        data: Dict[str, Any] = dict(inputs=[pixels], data_samples=None)
        try:
            pixels = preprocessor(data, False)['inputs'][0]
        except Exception:  # one of videos, with other channels, or that pads samples too
            low, high = pixel_range(len(pixels), getattr(preprocessor, 'mean', None),
                                    getattr(preprocessor, 'std', None))
            if turns_channels(preprocessor):
                pixels = pixels.flip(0)
            pixels = low[0] + pixels.float() * (high - low)[0] / 255
    return pixels[:, 0, 0].detach().float().cpu()
