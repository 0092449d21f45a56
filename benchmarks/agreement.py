# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How far a quantized detector still finds what the float model finds."""
import contextlib
import io
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


class Detections(NamedTuple):
    """What a detector found in an image.

    Args:
        labels (list[int]): Class of each.
        scores (list[float]): From 0 to 1.
        boxes (list): Left, top, width and height in pixels.
        masks (list[dict]): COCO's compressed masks; empty if the model gives none.
    """
    labels: List[int]
    scores: List[float]
    boxes: List[List[float]]
    masks: List[Dict[str, Any]]


def detections_of(sample: Any) -> Detections:
    """What mmdet predicted in a data sample."""
    found = sample.pred_instances.cpu()
    corners = found.bboxes
    boxes = corners.clone()
    boxes[:, 2:] -= corners[:, :2]
    masks = found.masks if 'masks' in found else []
    return Detections(found.labels.tolist(), found.scores.tolist(), boxes.tolist(), [
        coco_mask.encode(np.asfortranarray(np.asarray(mask, dtype=np.uint8))) for mask in masks])


def agreement_ap(expected: Sequence[Detections], found: Sequence[Detections], kind: str,
                 score: float = 0.3) -> float:
    """COCO AP of a model's detections with the float model's as ground truth.

    Args:
        expected (Sequence[Detections]): Of the float model, for each image.
        found (Sequence[Detections]): Of the other model, for the same images.
        kind (str): ``bbox`` or ``segm``.
        score (float): The float model's detections above it count. Defaults to 0.3.

    Returns:
        float: From 0 to 1, the mean over the classes that the float model found and over
        IoU from 0.5 to 0.95; not a number if it found nothing.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _dataset(expected, score)
        judge = COCOeval(truth, _dataset(found, -1.), kind)
        judge.params.imgIds = sorted(truth.imgs)
        judge.params.catIds = sorted(truth.cats)
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ['all']
        judge.params.maxDets = [100]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval['precision']
    return float(precision[precision > -1].mean()) if (precision > -1).any() else float('nan')


def _dataset(images: Sequence[Detections], score: float) -> COCO:
    """Detections above a score in the form of annotations."""
    kept = [(index, label, value, box, mask) for index, image in enumerate(images)
            for label, value, box, mask in zip(
                image.labels, image.scores, image.boxes, image.masks or [None] * len(image.boxes))
            if value > score]
    data = COCO()
    data.dataset = dict(
        images=[dict(id=index, height=0, width=0)  # compressed masks have a size of their own
                for index in range(len(images))],
        categories=[dict(id=label) for label in sorted({label for _, label, *_ in kept})],
        annotations=[dict(id=number, image_id=index, category_id=label, score=value, bbox=box,
                          segmentation=mask, area=box[2] * box[3], iscrowd=0)
                     for number, (index, label, value, box, mask) in enumerate(kept, 1)])
    data.createIndex()
    return data
