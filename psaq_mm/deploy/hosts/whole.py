# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whole models as graphs: from the pixels of an image to results."""
import copy
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.errors import UserError

from ..adaptive_pool import replace_adaptive_pools
from ..subgraph import Size, Subgraph
from .detection import ExportableDetections
from .detection_checks import has_masks, refuse, require_exportable
from .openmmlab import ExportableModel, OpenMMLabSubgraph
from .openmmlab_swin import exportable_swin
from .pixels import Pixels
from .timm_models import TimmSubgraph, TimmSwinSubgraph


class WholeGraph(nn.Module):
    """Pixels, trunk and what follows.

    Args:
        pixels (Pixels): What the host does to pixels.
        trunk (nn.Module): Maps normalized images to a tuple.
        detections (nn.Module, optional): Of a detector.
    """

    def __init__(self, pixels: Pixels, trunk: nn.Module,
                 detections: Optional[ExportableDetections] = None) -> None:
        super().__init__()
        self.pixels, self.trunk, self.detections = pixels, trunk, detections

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        found: Tuple[Tensor, ...] = self.trunk(self.pixels(images))
        if self.detections is None:
            return found
        if self.pixels.size is not None:
            limits = images.new_tensor([*self.pixels.size[::-1], *self.pixels.size[::-1]])
        else:
            limits = torch._shape_as_tensor(images)[[3, 2, 3, 2]].to(images.dtype)
        return self.detections(found, limits)


class WholeOpenMMLab(OpenMMLabSubgraph):
    """What whole models of mmdet and mmseg have in common: they take pixels, of any size, and
    nothing stays in torch."""

    input_name = 'image'
    sees_rgb = False

    @property
    def in_torch(self) -> Tuple[str, ...]:
        return ()

    def for_sizes(self, sizes: Sequence[Optional[Size]]) -> None:
        """Any will do."""

    def _image_axes(self, size: Optional[Size]) -> Dict[str, Dict[int, str]]:
        return {self.input_name: {2: 'height', 3: 'width'}} if size is None else {}

    def _pixels(self, size: Optional[Size]) -> Pixels:
        return Pixels(self.model.data_preprocessor, self.sees_rgb, size)


class WholeDetector(WholeOpenMMLab):
    """A detector of mmdet, to boxes and masks."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self._bare:
            refuse(model, 'a backbone has no results')
        require_exportable(model)
        require_colour(self)
        require_same_pixels(model, self._pixels(None))

    @property
    def modules(self) -> str:
        names = ['backbone', 'neck', 'rpn_head', 'roi_head', 'bbox_head']
        return ' + '.join(name for name in names if getattr(self.model, name, None) is not None)

    @property
    def output_names(self) -> Tuple[str, ...]:
        return ('boxes', 'labels', *(['masks'] if has_masks(self.model) else []))

    def dynamic_axes(self, size: Optional[Size]) -> Dict[str, Dict[int, str]]:
        return {**{name: {0: 'count'} for name in self.output_names},
                **self._image_axes(size)}

    def info(self) -> Dict[str, Any]:
        last = getattr(self.model, 'roi_head', None)
        config = (last or self.model.bbox_head).test_cfg
        nms = config.get('nms') or {}
        found = dict(task='instance segmentation' if has_masks(self.model) else 'detection',
                     score_threshold=float(config.get('score_thr', 0)),
                     iou_threshold=float(nms.get('iou_threshold', nms.get('iou_thr', 0.5))),
                     padding=self._pixels(None).padding)
        if has_masks(self.model):
            found['mask_threshold'] = float(config.get('mask_thr_binary', 0.5))
        return found

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Predict with the host's own code.

        Returns:
            tuple[Tensor, ...]: Boxes and scores (N, 5), labels (N, ), and of mask heads masks
            of the image, bool of shape (N, H, W).
        """
        from mmdet.structures import DetDataSample
        size = tuple(images.shape[2:])
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size,
                                             scale_factor=(1., 1.)))
        data = self.model.data_preprocessor(dict(inputs=[images[0]], data_samples=[sample]))
        found = self.model.predict(data['inputs'], data['data_samples'])[0].pred_instances
        boxes = torch.cat([found.bboxes, found.scores.unsqueeze(1)], 1)
        return (boxes, found.labels, *([found.masks] if has_masks(self.model) else []))

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        model, pixels = copy.deepcopy(self.model), self._pixels(size)
        seen = None if size is None else pixels.padded_size(*size)
        trunk = ExportableModel(exportable_swin(model.backbone, seen, batch),
                                getattr(model, 'neck', None), None, None, True)
        graph = WholeGraph(pixels, trunk, ExportableDetections(model))
        replace_adaptive_pools(graph)
        return graph.eval()


class WholeSegmentor(WholeOpenMMLab):
    """A segmentor of mmseg, to the logits of its decode head."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if self._decode_head is None:
            refuse(model.decode_head, 'it needs more than features')
        if model.test_cfg.get('mode', 'whole') != 'whole':
            refuse(model, f'it tests in mode {model.test_cfg.mode}, window by window')
        require_colour(self)
        require_same_pixels(model, self._pixels(None))

    @property
    def output_names(self) -> Tuple[str, ...]:
        return ('logits', )

    def dynamic_axes(self, size: Optional[Size]) -> Dict[str, Dict[int, str]]:
        axes = self._image_axes(size)
        return {**axes, 'logits': {2: 'rows', 3: 'cols'}} if axes else {}

    def info(self) -> Dict[str, Any]:
        head: Any = self._decode_head
        pixels = self._pixels(None)
        return dict(task='segmentation', align_corners=bool(head.align_corners),
                    threshold=getattr(head, 'threshold', None) if head.out_channels == 1 else None,
                    padding=pixels.padding, divisor=pixels.divisor,
                    least=list(pixels.least or (1, 1)))

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Predict from what the host's own code makes of pixels."""
        from mmseg.structures import SegDataSample
        sample = SegDataSample(metainfo=dict(img_shape=tuple(images.shape[2:])))
        data = self.model.data_preprocessor(dict(inputs=[images[0]], data_samples=[sample]))
        return super().run(data['inputs'])

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        pixels = self._pixels(size)
        seen = None if size is None else pixels.padded_size(*size)
        return WholeGraph(pixels, super().exportable(seen, batch)).eval()


class WholeTimm(TimmSubgraph):
    """A classifier of timm, to its logits."""

    input_name = 'image'

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        require_colour(self)

    def _pixels(self, size: Optional[Size]) -> Pixels:
        if self._model is self.model:
            from mmengine.model import ImgDataPreprocessor
            from timm.data import resolve_model_data_config
            data = resolve_model_data_config(self.model)
            return Pixels(ImgDataPreprocessor(mean=[255 * v for v in data['mean']],
                                              std=[255 * v for v in data['std']]), True, size)
        return Pixels(self.model.data_preprocessor, True, size)

    def info(self) -> Dict[str, Any]:
        return dict(task='classification', padding=self._pixels(None).padding)

    def dynamic_axes(self, size: Optional[Size]) -> Dict[str, Dict[int, str]]:
        return {}

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        return super().run(self._pixels(None)(images))

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        return WholeGraph(self._pixels(size), super().exportable(size, batch)).eval()


class WholeTimmSwin(WholeTimm, TimmSwinSubgraph):
    """A Swin Transformer of timm."""


def require_colour(subgraph: Subgraph) -> None:
    """Raise a :class:`UserError` if a model's images have no three channels."""
    if subgraph.channels != 3:
        refuse(subgraph.model, f'it takes images of {subgraph.channels} channels, and the graph '
               'those of 3, in BGR')


def require_same_pixels(model: Any, pixels: Pixels) -> None:
    """Raise a :class:`UserError` if a model sees other pixels of black and white images than
    those that its data preprocessor makes, as its test pipeline normalizes or turns them too."""
    adapter = find_adapter(model)
    for value, expected in zip((0., 255.), adapter.valid_range(model)):
        image = torch.full((1, expected.shape[1], 32, 32), value)
        if not torch.allclose(pixels(image)[..., :1, :1], expected, rtol=1e-3, atol=1e-3):
            refuse(model, 'its test pipeline changes pixel values, and the graph has only what '
                   'the data_preprocessor does; move mean and std there')
    if adapter.is_rgb(model) != pixels.reverse:
        refuse(model, 'its test pipeline turns channels, and the graph has only what the '
               'data_preprocessor does; set bgr_to_rgb there')


def whole_openmmlab(model: Any) -> Any:
    """The graph of a whole model of mmdet or mmseg.

    Raises:
        UserError: If a part of it cannot be exported; it is named.
    """
    if hasattr(model, 'decode_head'):
        return WholeSegmentor(model)
    if not hasattr(model, 'data_preprocessor'):
        raise UserError(f'{type(model).__name__} has no results; export its features with '
                        '--part features')
    return WholeDetector(model)
