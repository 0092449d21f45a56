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
    box: Any
    for full, mask, box in zip(found, masks, boxes.astype(np.float32)):
        x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
        x1, y1 = np.minimum(np.ceil(box[2:]).astype(int) + 1, (size[1], size[0]))
        if x1 <= x0 or y1 <= y0:
            continue
        weights = []
        for first, last, low, high, length in ((y0, y1, box[1], box[3], mask.shape[0]),
                                               (x0, x1, box[0], box[2], mask.shape[1])):
            places = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
            with np.errstate(divide='ignore', invalid='ignore'):
                places = (places - low) / (high - low) * length - np.float32(0.5)
            places[~np.isfinite(places)] = -2  # a box without area holds nothing
            weights.append(interpolation(places, length))
        full[y0:y1, x0:x1] = weights[0] @ mask @ weights[1].T >= threshold
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
