# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Run what was exported: numpy, OpenCV and an engine, without torch, mmcv, mmengine or mmdet.

    import psaq_mm.runtime
    model = psaq_mm.runtime.Model('export_openvino/model_800x1344.xml')
    found = model('photo.jpg')
    found.boxes, found.labels, found.scores, found.masks
    cv2.imwrite('drawn.png', found.draw())
"""
from .export_manifest import read_export
from .model import Model
from .results import Classification, Detections, Result, Segmentation

__all__ = ['Classification', 'Detections', 'Model', 'Result', 'Segmentation', 'read_export']
