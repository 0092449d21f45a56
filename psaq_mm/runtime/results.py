# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What was found in an image: as arrays, as a picture, and as plain values."""
import colorsys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from .masks import Crop, run_lengths, whole_masks

TOP = 5
"""Classes that are shown of a classifier."""


def color_of(label: int) -> Tuple[int, int, int]:
    """A bright BGR colour; each hue is a golden angle from the one before."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * label % 1, 0.75, 0.95)
    return round(255 * blue), round(255 * green), round(255 * red)


def halfway(pixels: np.ndarray, colors: np.ndarray, out: Optional[np.ndarray] = None) \
        -> np.ndarray:
    """uint8 pixels of shape (H, W, 3), mixed half and half with as many others."""
    return cv2.addWeighted(pixels, 0.5, colors, 0.5, -0.25, out)  # halves are rounded down


def write(picture: np.ndarray, text: str, left: int, bottom: int, size: float,
          color: Tuple[int, int, int]) -> None:
    """Write a line on a black background, in place. An outline took ten times as long."""
    font, width = cv2.FONT_HERSHEY_SIMPLEX, max(1, round(size))
    (right, up), down = cv2.getTextSize(text, font, size, width)
    cv2.rectangle(picture, (left, bottom - up), (left + right, bottom + down // 2), (0, 0, 0), -1)
    cv2.putText(picture, text, (left, bottom), font, size, color, width, cv2.LINE_AA)


@dataclass
class Result:
    """What was found in an image.

    Args:
        image (np.ndarray): uint8 BGR, shape (H, W, 3).
        classes (Sequence[str]): Names of the classes.
    """
    image: np.ndarray
    classes: Sequence[str]

    def name_of(self, label: int) -> str:
        """Name of a class."""
        return self.classes[label] if label < len(self.classes) else f'class {label}'

    def draw(self, score_thr: float = 0.3) -> np.ndarray:
        """Draw it.

        Args:
            score_thr (float): Least score of what is drawn. Defaults to 0.3.

        Returns:
            np.ndarray: uint8 BGR, shape (H, W, 3).
        """
        raise NotImplementedError

    def plain(self, score_thr: float = 0.) -> Dict[str, Any]:
        """Values for JSON.

        Args:
            score_thr (float): Least score. Defaults to 0.
        """
        raise NotImplementedError


@dataclass
class Detections(Result):
    """Objects, by falling score.

    Args:
        boxes (np.ndarray): x1, y1, x2, y2 in pixels of the image, shape (N, 4).
        scores (np.ndarray): In [0, 1], shape (N, ).
        labels (np.ndarray): Indices of classes, shape (N, ).
        crops (list[Crop], optional): Their masks; None for a detector of boxes.
    """
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    crops: Optional[Sequence[Crop]] = None

    def __len__(self) -> int:
        return len(self.boxes)

    @cached_property
    def masks(self) -> Optional[np.ndarray]:
        """np.ndarray, optional: Masks of all pixels, bool, shape (N, H, W), made when they are
        first asked for; None for a detector of boxes."""
        return None if self.crops is None else whole_masks(self.crops, self.image.shape[:2])

    def draw(self, score_thr: float = 0.3) -> np.ndarray:
        shown = [i for i in range(len(self)) if self.scores[i] >= score_thr][::-1]
        picture = self.image.copy()
        colors, mixed = np.empty_like(picture), np.empty_like(picture)
        for i in shown if self.crops is not None else []:
            assert self.crops is not None
            crop = self.crops[i]
            if crop.pixels.size:
                colors[crop.part] = color_of(self.labels[i])
                cv2.copyTo(halfway(picture[crop.part], colors[crop.part], mixed[crop.part]),
                           np.ascontiguousarray(crop.pixels).view(np.uint8), picture[crop.part])
        size = max(0.4, min(picture.shape[:2]) / 1200)
        for i in shown:
            color = color_of(self.labels[i])
            x1, y1, x2, y2 = (int(round(float(v))) for v in self.boxes[i])
            cv2.rectangle(picture, (x1, y1), (x2, y2), color, max(1, round(2 * size)))
            write(picture, f'{self.name_of(int(self.labels[i]))} {self.scores[i]:.2f}', x1,
                  max(y1 - round(10 * size), round(22 * size)), size, color)
        return picture

    def plain(self, score_thr: float = 0.) -> Dict[str, Any]:
        rows: List[Dict[str, Any]] = []
        for i in np.flatnonzero(self.scores >= score_thr):
            rows.append({'class': self.name_of(int(self.labels[i])), 'label': int(self.labels[i]),
                         'score': round(float(self.scores[i]), 4),
                         'bbox': [round(float(value), 2) for value in self.boxes[i]]})
            if self.crops is not None:
                rows[-1]['segmentation'] = run_lengths(self.crops[i], self.image.shape[:2])
        return dict(instances=rows)


@dataclass
class Segmentation(Result):
    """A class for each pixel.

    Args:
        labels (np.ndarray): Indices of classes, shape (H, W).
    """
    labels: np.ndarray

    def draw(self, score_thr: float = 0.3) -> np.ndarray:
        table = np.array([color_of(i) for i in range(int(self.labels.max()) + 1)], np.uint8)
        return halfway(self.image, table.take(self.labels, axis=0))

    def plain(self, score_thr: float = 0.) -> Dict[str, Any]:
        found, counts = np.unique(self.labels, return_counts=True)
        return dict(pixels={self.name_of(int(label)): round(float(count / counts.sum()), 4)
                            for label, count in zip(found, counts)})


@dataclass
class Classification(Result):
    """A score for each class.

    Args:
        scores (np.ndarray): They sum to 1, shape (classes, ).
    """
    scores: np.ndarray

    def draw(self, score_thr: float = 0.3) -> np.ndarray:
        picture, size = self.image.copy(), max(0.4, min(self.image.shape[:2]) / 800)
        for row, entry in enumerate(self.plain()['top']):
            write(picture, f'{entry["class"]} {100 * entry["score"]:.1f} %', 4,
                  round(32 * size * (row + 1)), size, (255, 255, 255))
        return picture

    def plain(self, score_thr: float = 0.) -> Dict[str, Any]:
        order = np.argsort(-self.scores)[:TOP]
        return dict(top=[{'class': self.name_of(int(label)), 'label': int(label),
                          'score': round(float(self.scores[label]), 4)} for label in order
                         if self.scores[label] >= score_thr])
