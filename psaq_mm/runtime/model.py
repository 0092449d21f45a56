# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A whole model that an engine runs: an image in, what is in it out."""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple, Union, overload

import cv2
import numpy as np

from psaq_mm.errors import UserError

from .engines import ENGINES, Engine
from .export_manifest import MANIFEST, read_export
from .images import Image, Prepared, prepare, read_image
from .masks import interpolation, paste_masks
from .results import Classification, Detections, Result, Segmentation


class Model:
    """A file that ``tools/export.py`` wrote, loaded by its engine.

    Args:
        file (str or Path): A ``.xml`` file for OpenVINO, or an ``.onnx`` file for onnxruntime.
        threads (int): Threads of the engine; 0 lets it choose. Defaults to 0.
        precision (str): ``fp32`` or ``bf16`` (OpenVINO), for what is not in integers. Defaults
            to ``fp32``.
        device (str): ``CPU``; with OpenVINO also ``GPU``, ``NPU`` or ``AUTO``, with onnxruntime
            ``CUDA``, where they are. Defaults to ``CPU``.
        resize (bool): Whether images are resized as the model was tested; False if they are
            already. Defaults to True.
        shrink (bool): Whether an image that is too large for a graph of one size may be made
            smaller than the model was tested on. Defaults to False: an error.

    Raises:
        UserError: If the engine is not installed, or the file is missing, damaged or of features
            alone.
    """

    def __init__(self, file: Union[str, Path], threads: int = 0, precision: str = 'fp32',
                 device: str = 'CPU', resize: bool = True, shrink: bool = False) -> None:
        path = Path(file)
        known = {engine.suffix: engine for engine in ENGINES.values()}
        if path.suffix not in known:
            raise UserError(f'{file} is no file of an engine; expected {" or ".join(known)}')
        if path.is_file() and (path.parent / MANIFEST).is_file():
            read_export(path.parent, path.name)
        self.engine: Engine = known[path.suffix](path, threads, precision, device)
        self.info: Dict[str, Any] = self.engine.info()
        self.resize, self.shrink = resize, shrink

    @property
    def classes(self) -> List[str]:
        """list[str]: Names of the classes."""
        return list(self.info['classes'])

    @overload
    def __call__(self, images: Image) -> Any:
        ...

    @overload
    def __call__(self, images: Sequence[Image]) -> List[Any]:
        ...

    def __call__(self, images: Union[Image, Sequence[Image]]) -> Any:
        """Find what is in an image, or in each of several.

        Args:
            images (str, Path, np.ndarray or a sequence of them): Files, or pixels: uint8 or
                uint16 of shape (H, W), (H, W, 3) in BGR, or (H, W, 4).

        Returns:
            Detections, Segmentation or Classification: By the model; a list of them for a
            sequence.

        Raises:
            UserError: If an image cannot be read, or does not fit into a graph of one size.
        """
        if isinstance(images, (str, Path, np.ndarray)):
            return self._one(images)
        if not isinstance(images, (list, tuple)):
            raise UserError(f'expected an image as a path or an array of numpy (BGR), or a list '
                            f'of them, got {type(images).__name__}')
        return [self._one(image) for image in images]

    def _one(self, image: Image) -> Result:
        pixels = read_image(image)
        prepared = prepare(pixels, self.info, self.resize, self.shrink)
        return interpret(self.engine.run(prepared.array), prepared, self.info, pixels)


def interpret(outputs: Sequence[np.ndarray], prepared: Prepared, info: Mapping[str, Any],
              pixels: np.ndarray) -> Any:
    """Make results of an image of the outputs of a graph.

    Args:
        outputs (Sequence[np.ndarray]): Of the engine.
        prepared (Prepared): What it was given.
        info (dict): What the file says.
        pixels (np.ndarray): The image itself.

    Returns:
        Detections, Segmentation or Classification: By the task of the file.
    """
    classes = info['classes']
    if info['task'] == 'classification':
        logits = outputs[0][0].astype(np.float64)
        scores = np.exp(logits - logits.max())
        return Classification(pixels, classes, scores / scores.sum())
    if info['task'] == 'segmentation':
        return Segmentation(pixels, classes, _label_map(outputs[0][0], prepared, info))
    rows, labels = outputs[0].reshape(-1, 5), outputs[1].reshape(-1)
    height, width = prepared.size
    boxes = np.clip(rows[:, :4], 0, np.array([width, height, width, height], np.float32))
    boxes = boxes / prepared.scale
    crops = None
    if len(outputs) > 2:
        crops = paste_masks(outputs[2], boxes, prepared.original, info['mask_threshold'])
    return Detections(pixels, classes, boxes, rows[:, 4], labels.astype(np.int64), crops)


def _label_map(logits: np.ndarray, prepared: Prepared, info: Mapping[str, Any]) -> np.ndarray:
    """The best class of each pixel: as mmseg, logits are resized to what the model saw and then,
    without the padding, to the image."""
    size, corners = prepared.size, info['align_corners']
    divisor: int = info.get('divisor', 1)
    given = tuple(-(-max(length, least) // divisor) * divisor for length, least
                  in zip(prepared.array.shape[2:], info.get('least', (1, 1))))

    def plane_of(label: int) -> np.ndarray:
        plane = _resized(logits[label], given, corners)[:size[0], :size[1]]
        return _resized(plane, prepared.original, corners)

    def best_of(classes: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        best = np.full(prepared.original, -np.inf, np.float32)
        labels = np.zeros(prepared.original, np.min_scalar_type(len(logits)))
        better, this = np.empty(prepared.original, np.uint8), np.empty_like(labels)
        for label in classes:
            plane = plane_of(label)
            cv2.compare(plane, best, cv2.CMP_GT, better)
            this.fill(label)
            cv2.copyTo(this, better, labels)
            cv2.max(plane, best, best)
        return best, labels

    if len(logits) == 1:  # one class, and what is not it
        return (1 / (1 + np.exp(-plane_of(0))) > info['threshold']).astype(np.int64)
    possible = _possible(logits)
    # As many threads as OpenCV has, if each has some classes to resize.
    parts = np.array_split(possible, min(cv2.getNumThreads(), len(possible) // 8) or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        (best, labels), *others = pool.map(best_of, parts)
    for other, found in others:  # classes come in order: of equal ones the first
        cv2.copyTo(found, cv2.compare(other, best, cv2.CMP_GT), labels)
        cv2.max(other, best, best)
    return labels.astype(np.int64)


def _possible(logits: np.ndarray) -> np.ndarray:
    """Classes that can be the best of a pixel: the others need not be resized, most of the time.

    A pixel is a mean of logits that lie in 3 x 3, as logits are not larger than what the graph was
    given. So the best class there is at least the highest of the classes' minima.
    """
    around, least = np.ones((3, 3), np.uint8), np.full(logits.shape[1:], -np.inf, np.float32)
    for plane in logits:
        cv2.max(cv2.erode(plane, around), least, least)
    return np.flatnonzero((logits >= cv2.erode(least, around)).any((1, 2)))


def _resized(plane: np.ndarray, size: Tuple[int, ...], align_corners: bool) -> np.ndarray:
    if plane.shape == tuple(size):
        return plane
    if not align_corners:
        return cv2.resize(plane, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    rows, cols = (interpolation(np.linspace(0, have - 1, want, dtype=np.float32), have)
                  for have, want in zip(plane.shape, size))
    return rows @ plane @ cols.T
