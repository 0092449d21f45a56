# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Masks of boxes as masks of images."""
from typing import Any, Dict, Tuple

import numpy as np


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
                threshold: float = 0.5) -> np.ndarray:
    """Put masks into an image, as mmdet does: bilinear, zero outside of the box.

    Args:
        masks (np.ndarray): Probabilities, shape (N, h, w).
        boxes (np.ndarray): x1, y1, x2, y2 in pixels of the image, shape (N, 4).
        size (tuple[int, int]): Height and width of the image.
        threshold (float): Least probability. Defaults to 0.5.

    Returns:
        np.ndarray: bool, shape (N, H, W).
    """
    found = np.zeros((len(masks), *size), bool)
    low, high = boxes[:, :2].astype(np.float32), boxes[:, 2:].astype(np.float32)
    starts = np.maximum(np.floor(low).astype(int) - 1, 0)
    stops = np.minimum(np.ceil(high).astype(int) + 1, (size[1], size[0]))
    rows, columns = (np.arange(length, dtype=np.float32) + np.float32(0.5) for length in size)
    # A box without area holds nothing.
    for i in np.flatnonzero(((stops > starts) & (high > low)).all(1)):
        (x0, y0), (x1, y1), mask = starts[i], stops[i], masks[i]
        down, along = (
            interpolation((places - first) / (last - first) * length - np.float32(0.5), length)
            for places, first, last, length in (
                (rows[y0:y1], low[i, 1], high[i, 1], mask.shape[0]),
                (columns[x0:x1], low[i, 0], high[i, 0], mask.shape[1])))
        np.greater_equal(down @ mask @ along.T, threshold, out=found[i, y0:y1, x0:x1])
    return found


def run_lengths(mask: np.ndarray) -> Dict[str, Any]:
    """A mask as COCO's run lengths, not compressed: pycocotools reads them.

    Args:
        mask (np.ndarray): bool, shape (H, W).
    """
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return dict(size=list(mask.shape), counts=[int(count) for count in counts])
