# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Image files, and what a graph takes of an image."""
import itertools
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

from psaq_mm.errors import UserError

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')

Image = Union[str, Path, np.ndarray]
"""A file, or pixels of shape (H, W), (H, W, 3) in BGR or (H, W, 4): uint8 or uint16."""


def find_files(paths: Sequence[Union[str, Path]]) -> List[Path]:
    """The image files among files and folders.

    Args:
        paths (Sequence[str or Path]): Files, and folders to search with their subfolders.

    Returns:
        list[Path]: In the order of ``paths``; those of a folder sorted.

    Raises:
        UserError: If a path does not exist, or a folder holds no image.
    """
    found: List[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'image {path} does not exist')
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.rglob('*') if file.suffix.lower() in IMAGE_SUFFIXES
                        and not file.name.startswith('.') and file.is_file())
        if not inside:
            raise UserError(f'folder {path} holds no images ({", ".join(IMAGE_SUFFIXES)})')
        found += inside
    return found


def picture_paths(images: Sequence[Path], folder: str) -> List[Path]:
    """A file in a folder for the picture of each image, named after it.

    Raises:
        UserError: If a picture would replace one of the images.
    """
    paths: Dict[Path, None] = {}  # in order, and quickly searched
    for image in images:
        names = itertools.chain([image.stem], (f'{image.stem}_{i}' for i in itertools.count(2)))
        paths[next(path for path in (Path(folder) / f'{name}.png' for name in names)
                   if path not in paths)] = None
    own = {os.path.realpath(image) for image in images}
    for path in paths:
        if os.path.realpath(path) in own:
            raise UserError(f'{path} is an image that was given, and would be overwritten; choose '
                            'another --out-dir')
    return list(paths)


def read_image(image: Image) -> np.ndarray:
    """Pixels of an image, upright: uint8 BGR of shape (H, W, 3), as the hosts read them.

    Gray becomes three channels, transparency is left out, 16 bits become 8.

    Raises:
        UserError: If it cannot be read, or is no image.
    """
    pixels: Any
    if isinstance(image, (str, Path)):
        try:
            data = np.fromfile(image, np.uint8)
        except OSError as error:
            raise UserError(f'image {image} cannot be read ({error.strerror})') from error
        try:
            pixels = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        except cv2.error:  # it has a limit of pixels
            pixels = None
        if pixels is None:
            raise UserError(f'image {image} cannot be read by OpenCV; convert it to PNG or JPEG')
        return pixels
    pixels = np.asarray(image)
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, 2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) \
            or 0 in pixels.shape:
        raise UserError(f'an image has shape {np.shape(image)} and type '
                        f'{np.asarray(image).dtype}; expected (H, W), (H, W, 3) in BGR or '
                        '(H, W, 4), uint8 or uint16')
    return pixels[..., :3]


class Prepared(NamedTuple):
    """What a graph takes of an image.

    Args:
        array (np.ndarray): float32, shape (1, 3, H, W).
        size (tuple[int, int]): Height and width of the image in it; the rest is padding.
        original (tuple[int, int]): Those of the image itself.
        factors (tuple[float, float], optional): By how much it is wider and higher than the
            image, if ``size`` does not say so. Defaults to None.
    """
    array: np.ndarray
    size: Tuple[int, int]
    original: Tuple[int, int]
    factors: Optional[Tuple[float, float]] = None

    @property
    def scale(self) -> np.ndarray:
        """np.ndarray: By how much x, y, x and y of boxes are larger than in the image."""
        factors = self.factors or (self.size[1] / self.original[1],
                                   self.size[0] / self.original[0])
        return np.array([*factors, *factors], np.float32)


def resized_size(height: int, width: int, rule: Mapping[str, Any]) -> Tuple[int, int]:
    """Height and width of an image after a rule of resizing.

    Args:
        height (int): Of the image.
        width (int): Of the image.
        rule (Mapping): ``mode`` and what it needs: ``fit`` keeps the aspect and fits into ``size``
            (long side, short side), as mmcv does; ``stretch`` makes it ``size`` (height, width);
            ``crop`` makes the short side ``short``, and the middle is cut out; ``factor`` scales;
            ``none`` leaves it.

    Raises:
        UserError: If the rule is not known.
    """
    mode = rule['mode']
    if mode == 'fit':
        long, short = rule['size']
        factor = min(long / max(height, width), short / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))
    if mode == 'stretch':
        return rule['size'][0], rule['size'][1]
    if mode == 'factor':
        return (max(1, int(height * rule['factor'][0] + 0.5)),
                max(1, int(width * rule['factor'][1] + 0.5)))
    if mode == 'crop':
        factor = rule['short'] / min(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor))
    if mode == 'none':
        return height, width
    raise UserError(f'the file does not say how images are resized ({rule.get("step", mode)}); '
                    'resize them as the model wants it, and call Model with resize=False')


def prepare(pixels: np.ndarray, info: Mapping[str, Any], resize: bool = True,
            shrink: bool = False) -> Prepared:
    """Resize and pad an image as a graph wants it.

    Args:
        pixels (np.ndarray): uint8 BGR, shape (H, W, 3).
        info (Mapping): What the file says.
        resize (bool): Whether to resize. Defaults to True.
        shrink (bool): Whether an image may be made smaller than the rule says, to fit into a
            graph of one size. Defaults to False.

    Raises:
        UserError: If it does not fit.
    """
    height, width = pixels.shape[:2]
    rule: Any = info['resize'] if resize else dict(mode='none')
    size = resized_size(height, width, rule)
    if rule['mode'] == 'crop':
        smaller = size[0] < height  # timm, by Pillow, takes the mean of pixels then
        scaled = _scaled(pixels, size, cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
        return Prepared(_planes(_cut(scaled, rule['size'])), tuple(rule['size']), (height, width))
    fixed = info['size']
    if fixed is not None and (size[0] > fixed[0] or size[1] > fixed[1]):
        if not shrink:
            raise UserError(
                f'the graph takes images of {fixed[0]} x {fixed[1]} pixels, and this one has '
                f'{size[0]} x {size[1]} after resizing; export with --size {size[0]} {size[1]} '
                'too or without --size, or let it shrink (shrink=True, --shrink)')
        factor = min(fixed[0] / size[0], fixed[1] / size[1])
        size = (min(fixed[0], int(size[0] * factor + 0.5)),
                min(fixed[1], int(size[1] * factor + 0.5)))
    return Prepared(pad(_planes(_scaled(pixels, size)), info), size, (height, width))


def pad(array: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """Pad images at the bottom and on the right to the size of a graph.

    Args:
        array (np.ndarray): Shape (1, 3, H, W).
        info (Mapping): What the file says; a graph of any size pads by itself.
    """
    size = info['size']
    if size is None or array.shape[2:] == tuple(size):
        return array
    full = np.empty((1, 3, *size), np.float32)
    full[:] = np.array(info['padding'], np.float32).reshape(1, 3, 1, 1)
    full[:, :, :array.shape[2], :array.shape[3]] = array
    return full


def _scaled(pixels: np.ndarray, size: Tuple[int, int],
            interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    if pixels.shape[:2] == tuple(size):
        return pixels
    return cv2.resize(pixels, (size[1], size[0]), interpolation=interpolation)


def _cut(pixels: np.ndarray, size: Any) -> np.ndarray:
    top, left = ((have - want) // 2 for have, want in zip(pixels.shape[:2], size))
    return pixels[top:top + size[0], left:left + size[1]]


def _planes(pixels: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)
