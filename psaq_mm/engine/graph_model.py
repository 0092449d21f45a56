# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""An exported whole model in the place of the runner's."""
from typing import Any, Dict, List, Mapping, Sequence, Union

import numpy as np
import torch
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from psaq_mm.deploy import Graphs
from psaq_mm.runtime.images import Prepared, pad
from psaq_mm.runtime.masks import whole_masks
from psaq_mm.runtime.model import interpret


class GraphModel(nn.Module):
    """Runs graphs on the images of a data loader, and gives what the host's evaluator takes.

    Args:
        graphs (Graphs): Of a whole model.
    """

    def __init__(self, graphs: Graphs) -> None:
        super().__init__()
        self.graphs = graphs

    def test_step(self, data: Mapping[str, Any]) -> List[Any]:
        """Args:
            data (Mapping): ``inputs``, images of shape (3, H, W), resized by the test pipeline;
                and their ``data_samples``.

        Returns:
            list: The samples with what was found in them; of classifiers dicts.
        """
        return [self._one(image, sample)
                for image, sample in zip(data['inputs'], data['data_samples'])]

    def _one(self, image: Tensor, sample: Any) -> Any:
        size = int(image.shape[1]), int(image.shape[2])
        engine, info = self.graphs.whole(size)
        array = image.float().numpy()[None]
        if info['task'] == 'classification':
            outputs = engine.run(np.ascontiguousarray(array[:, ::-1]))  # timm's images are RGB
            return dict(logits=torch.from_numpy(outputs[0][0]), label=sample)
        original = tuple(sample.metainfo['ori_shape'][:2])
        array = pad(array, info)
        # Detectors of mmdet divide by it: the pipeline may have padded the image too.
        factors = sample.metainfo.get('scale_factor') if info['task'] != 'segmentation' else None
        prepared = Prepared(array, size, original, None if factors is None else
                            (float(factors[0]), float(factors[1])))
        found: Any = interpret(engine.run(array), prepared, info, np.empty((0, 0, 3), np.uint8))
        if info['task'] == 'segmentation':
            sample.pred_sem_seg = PixelData(data=torch.from_numpy(found.labels)[None])
            return sample
        values: Dict[str, Union[Tensor, Sequence[Any]]] = dict(
            bboxes=torch.from_numpy(found.boxes), scores=torch.from_numpy(found.scores),
            labels=torch.from_numpy(found.labels))
        if found.crops is not None:
            values['masks'] = torch.from_numpy(whole_masks(found.crops, original))
        sample.pred_instances = InstanceData(**values)
        return sample
