# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How often the right class is among the best guesses."""
import logging
from typing import Any, Dict, List, Sequence, Union

from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from psaq_mm.errors import UserError
from psaq_mm.registry import METRICS


@METRICS.register_module()
class TopKAccuracy(BaseMetric):
    """Percentage of images whose label is among the k largest logits.

    The metrics are called ``accuracy/top1`` and so on. A k that is no smaller
    than the number of classes says nothing, since it always gives 100: that
    metric is left out, with a warning.

    Args:
        topk (int or Sequence[int]): The values of k. Defaults to (1, 5).
        **kwargs: As of :class:`mmengine.evaluator.BaseMetric`.

    Raises:
        UserError: If k is not positive, an image has no label, a label is
            not among the model's classes, or the data set has another number
            of classes.
    """

    default_prefix = 'accuracy'

    def __init__(self, topk: Union[int, Sequence[int]] = (1, 5), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.topk: List[Any] = list(topk) if isinstance(topk, (list, tuple)) else [topk]
        if not self.topk or not all(type(k) is int and k > 0 for k in self.topk):
            raise UserError(f'TopKAccuracy: topk must be positive integers, got {topk!r}')

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Compare ``logits``, shape (num_classes, ), with the ``label`` of each image."""
        for sample in data_samples:
            logits, label = sample['logits'], sample['label']
            if label is None:
                raise UserError('TopKAccuracy: an image has no label')
            classes = len(logits)
            folders = len((self.dataset_meta or {}).get('classes', logits))
            if folders != classes:
                raise UserError(f'TopKAccuracy: the data set has {folders} class folders, the '
                                f'model {classes} classes; labels would not agree. Add empty '
                                'folders for classes that the data set lacks.')
            if not 0 <= label < classes:
                raise UserError(f'TopKAccuracy: label {label} is not among the {classes} classes '
                                'of the model; is it of another data set?')
            ranked = logits.topk(min(max(self.topk), classes)).indices.tolist()
            # One entry for each image, so that BaseMetric can drop those that
            # only fill up the last batch of a distributed run.
            self.results.append({k: label in ranked[:k] for k in self.topk if k < classes})

    def compute_metrics(self, results: List[Dict[int, bool]]) -> Dict[str, float]:
        """The average over images: ``top<k>`` in percent, 0 to 100."""
        metrics = {}
        for k in self.topk:
            if results and k in results[0]:
                metrics[f'top{k}'] = 100 * sum(right[k] for right in results) / len(results)
            else:
                print_log(f'top{k} is left out: there are no more than {k} classes, or no images',
                          logger='current', level=logging.WARNING)
        return metrics
