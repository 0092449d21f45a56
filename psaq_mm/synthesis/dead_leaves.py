# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Procedural images with the statistics of photographs: dead leaves over 1/f noise."""
from typing import Tuple

import cv2
import numpy as np

SMALLEST_RADIUS = 3.
"""Of a leaf, in pixels."""

LARGEST_RADIUS = 0.35
"""Of a leaf, as a fraction of the shorter side of the image."""


def power_law_noise(rng: np.random.Generator, size: Tuple[int, int], channels: int,
                    exponent: float) -> np.ndarray:
    """Noise whose amplitude falls as 1 / f^exponent; photographs have about 1.

    Args:
        rng (np.random.Generator): Source of all randomness.
        size (tuple[int, int]): Height and width in pixels.
        channels (int): Channels, independent of each other.
        exponent (float): Of the spatial frequency f.

    Returns:
        np.ndarray: Shape (H, W, channels), mean 0 and standard deviation 1 in each channel.
    """
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no constant part
    amplitude = frequency[..., None]**-exponent
    shape = (*frequency.shape, channels)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) * amplitude
    noise = np.fft.irfft2(spectrum, s=size, axes=(0, 1))
    return noise / noise.std((0, 1))


def dead_leaves(rng: np.random.Generator, size: Tuple[int, int], channels: int = 3) -> np.ndarray:
    """One image of shapes that hide each other [dead leaves: Lee, Mumford and Huang, 2001].

    Discs, ellipses, boxes and polygons fall on 1/f noise one after the other. Their radii r
    have a density of r^-3, so that the picture looks alike at all scales, as photographs do.
    Each has a colour, a gradient of light and maybe a texture [choice].

    Args:
        rng (np.random.Generator): Source of all randomness.
        size (tuple[int, int]): Height and width in pixels.
        channels (int): Channels of the image. Defaults to 3.

    Returns:
        np.ndarray: Float32 in [0, 255], shape (H, W, channels).
    """
    image = rng.uniform(30, 225, channels) + 25 * power_law_noise(rng, size, channels, 1.2)
    colourful = rng.uniform(0, 0.7)
    for _ in range(rng.integers(60, 400)):
        centre = rng.uniform(0, size[::-1])
        radius = _radius(rng, size)
        rows, columns = np.nonzero(_leaf(rng, size, centre, radius))
        if not len(rows):
            continue
        colour = rng.uniform(0, 255) + colourful * rng.normal(0, 80, channels)
        slope = rng.normal(0, 0.5, 2) * 30 / radius
        light = (columns - centre[0]) * slope[0] + (rows - centre[1]) * slope[1]
        contrast = rng.uniform(0, 15)
        if contrast > 3:
            texture = power_law_noise(rng, (64, 64), 1, rng.uniform(0.5, 1.5))[..., 0]
            light = light + contrast * texture[rows % 64, columns % 64]
        image[rows, columns] = np.clip(colour, 0, 255) + light[:, None]
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2)).reshape(image.shape)
    image += rng.normal(0, rng.uniform(0, 5), image.shape)
    return np.clip(image, 0, 255).astype(np.float32)


def _radius(rng: np.random.Generator, size: Tuple[int, int]) -> float:
    """A radius in pixels, with a density of r^-3 between the smallest and the largest."""
    largest = max(LARGEST_RADIUS * min(size), SMALLEST_RADIUS)
    at = rng.uniform()
    return float((at / SMALLEST_RADIUS**2 + (1 - at) / largest**2)**-0.5)


def _leaf(rng: np.random.Generator, size: Tuple[int, int], centre: np.ndarray,
          radius: float) -> np.ndarray:
    """Where a leaf of a random shape is: bool of the image's height and width."""
    mask = np.zeros(size, np.uint8)
    kind, angle = rng.integers(4), rng.uniform(0, 180)
    middle = int(centre[0]), int(centre[1])
    if kind == 0:
        cv2.circle(mask, middle, int(radius), 1, -1)
    elif kind == 1:
        axes = int(radius), max(1, int(radius * rng.uniform(0.2, 1)))
        cv2.ellipse(mask, middle, axes, angle, 0, 360, 1, -1)
    else:
        if kind == 2:
            sides = 2 * radius, 2 * radius * rng.uniform(0.1, 1)
            corners = cv2.boxPoints((tuple(centre.tolist()), sides, angle))
        else:
            turns = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            away = radius * rng.uniform(0.4, 1, (len(turns), 1))
            corners = centre + away * np.stack([np.cos(turns), np.sin(turns)], 1)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
    return mask.astype(bool)
