# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Masks of boxes as masks of images."""
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np


class Crop(NamedTuple):
    """The part of a mask outside of which it holds nothing. A hundred masks of a large photograph
    would fill a gigabyte.

    Args:
        left (int): First column of the part.
        top (int): Its first row.
        pixels (np.ndarray): bool, shape (h, w).
    """
    left: int
    top: int
    pixels: np.ndarray

    @property
    def part(self) -> Tuple[slice, slice]:
        """tuple[slice, slice]: The part, as rows and columns of the image."""
        height, width = self.pixels.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)


def interpolation(centers: np.ndarray, length: int) -> np.ndarray:
    """The weights by which samples at some places are made of ``length`` values; beside them
    are zeros.

    Args:
        centers (np.ndarray): Places, in values; shape (N, ).
        length (int): Number of values.

    Returns:
        np.ndarray: Shape (N, length).
    """
    apart = np.abs(centers[:, None] - np.arange(length, dtype=centers.dtype))
    return np.maximum(0, 1 - apart)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: Tuple[int, int],
                threshold: float = 0.5) -> List[Crop]:
    """Put masks into an image, as mmdet does: bilinear, zero outside of the box.

    Args:
        masks (np.ndarray): Probabilities, shape (N, h, w).
        boxes (np.ndarray): x1, y1, x2, y2 in pixels of the image, shape (N, 4).
        size (tuple[int, int]): Height and width of the image.
        threshold (float): Least probability. Defaults to 0.5.

    Returns:
        list[Crop]: Of each box.
    """
    low, high = boxes[:, :2].astype(np.float32), boxes[:, 2:].astype(np.float32)
    starts = np.maximum(np.floor(low).astype(int) - 1, 0)
    stops = np.minimum(np.ceil(high).astype(int) + 1, (size[1], size[0]))
    rows, columns = (np.arange(length, dtype=np.float32) + np.float32(0.5) for length in size)
    holds = ((stops > starts) & (high > low)).all(1)  # a box without area holds nothing
    crops: List[Crop] = []
    for i, mask in enumerate(masks):
        if not holds[i]:
            crops.append(Crop(0, 0, np.zeros((0, 0), bool)))
            continue
        (x0, y0), (x1, y1) = starts[i].tolist(), stops[i].tolist()
        down, along = (
            interpolation((places - first) / (last - first) * length - np.float32(0.5), length)
            for places, first, last, length in (
                (rows[y0:y1], low[i, 1], high[i, 1], mask.shape[0]),
                (columns[x0:x1], low[i, 0], high[i, 0], mask.shape[1])))
        crops.append(Crop(x0, y0, down @ mask @ along.T >= threshold))
    return crops


def whole_masks(crops: Sequence[Crop], size: Tuple[int, int]) -> np.ndarray:
    """Masks of all pixels of an image.

    Args:
        crops (Sequence[Crop]): N of them.
        size (tuple[int, int]): Height and width of the image.

    Returns:
        np.ndarray: bool, shape (N, H, W).
    """
    masks = np.zeros((len(crops), *size), bool)
    for mask, crop in zip(masks, crops):
        mask[crop.part] = crop.pixels
    return masks


def run_lengths(crop: Crop, size: Tuple[int, int]) -> Dict[str, Any]:
    """A mask as COCO's run lengths, not compressed: pycocotools reads them.

    Args:
        crop (Crop): The mask.
        size (tuple[int, int]): Height and width of the image.
    """
    height, width = size
    bounded = np.pad(crop.pixels.T, ((0, 0), (1, 1))).astype(np.int8)
    columns, rows = np.nonzero(np.diff(bounded, axis=1))
    places = (crop.left + columns) * height + crop.top + rows
    # Runs that go on from the last row of a column to the first of the next end where one begins.
    changes, times = np.unique(places, return_counts=True)
    counts = np.diff(np.concatenate([[0], changes[times == 1], [height * width]]))
    return dict(size=[height, width], counts=[int(count) for count in counts])
