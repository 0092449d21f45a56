# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Image classification with timm's models, data and accuracy, for mmengine's runner."""
from .image_folder import ImageFolder
from .timm_classifier import TimmClassifier
from .top_k_accuracy import TopKAccuracy

__all__ = ['ImageFolder', 'TimmClassifier', 'TopKAccuracy']
