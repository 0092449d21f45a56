# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What mmdet's detectors do behind their neck, in operators that can be traced.

mmdet's own code loops over images and branches on how many boxes there are. Here are the same
steps for one image: candidates of a dense head, NMS, RoIAlign, box heads, mask heads. Their
parameters are read from the host's own objects, and its heads, coders and anchors are called.
"""
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from ..graph_ops import nms
from .detection_checks import has_masks, listed, nms_threshold


class Candidates(NamedTuple):
    """What may be a box.

    The last one is none: its score is -1. So there is always one, as engines do not agree on
    operators that are given nothing (OpenVINO 2026.4 leaves NMS out then, and returns what it
    found in the image before).

    Args:
        boxes (Tensor): x1, y1, x2, y2 in pixels, shape (N, 4).
        scores (Tensor): Shape (N, ).
        groups (Tensor): Boxes of different groups do not suppress each other:
            labels, or levels of an RPN. Shape (N, ).
    """
    boxes: Tensor
    scores: Tensor
    groups: Tensor

    def of(self, places: Tensor) -> 'Candidates':
        """Those at some places, shape (K, )."""
        return Candidates(*(values.index_select(0, places) for values in self))

    def real(self) -> Tensor:
        """The places of those that are some."""
        return (self.scores >= 0).nonzero().squeeze(1)


def suppress(found: Candidates, test_cfg: Any, head: Any) -> Candidates:
    """Greedy NMS in each group, as ``mmcv.ops.batched_nms`` does it: groups are moved apart.

    Returns:
        Candidates: The best, by falling score.
    """
    moved = found.boxes + (found.groups.to(found.boxes.dtype)
                           * (found.boxes.max() + 1)).unsqueeze(1)
    most = int(test_cfg.get('max_per_img', -1))
    most = most if most > 0 else 2 ** 31 - 1
    return found.of(nms(moved, found.scores, nms_threshold(test_cfg, head), most))


def decode(coder: Any, priors: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    """Boxes of deltas, within the image.

    Args:
        coder (BaseBBoxCoder): The host's.
        priors (Tensor): Boxes (N, 4) or points (N, 2).
        deltas (Tensor): Shape (N, 4).
        limits (Tensor): Width, height, width, height of the image.
    """
    boxes = coder.decode(priors, deltas)
    boxes = boxes if isinstance(boxes, Tensor) else boxes.tensor
    if not getattr(coder, 'clip_border', True):
        return boxes
    return torch.minimum(boxes.clamp(min=0), limits)


def _best(scores: Tensor, count: int) -> Tuple[Tensor, Tensor]:
    """The ``count`` highest of (N, ), all if they are fewer: by falling score."""
    if count <= 0:
        count = 2 ** 31 - 1
    length = torch._shape_as_tensor(scores)[0]  # a number of the graph, where sizes vary
    if not torch.jit.is_tracing():
        return scores.topk(min(int(length), count))
    return scores.topk(torch.minimum(length, torch.tensor(count)))  # type: ignore[arg-type]


class DenseBoxes(nn.Module):
    """The boxes of a dense head: proposals of an RPN, or what a single stage found.

    Args:
        head (nn.Module): The host's; :func:`.require_exportable` accepts it.
        is_rpn (bool): Whether NMS is by level, without a threshold.
    """

    def __init__(self, head: Any, is_rpn: bool) -> None:
        super().__init__()
        self.head, self.is_rpn = head, is_rpn
        self.count = int(head.test_cfg.get('nms_pre', -1))

    def forward(self, features: Tuple[Tensor, ...], limits: Tensor) -> Candidates:
        """Args:
            features (tuple[Tensor]): Of the neck, each (1, C, H, W).
            limits (Tensor): Width, height, width, height of the image.

        Returns:
            Candidates: By falling score.
        """
        levels = [self._level(index, limits, *maps)
                  for index, maps in enumerate(zip(*self.head.forward(features)))]
        last = Candidates(limits.new_zeros(1, 4), limits.new_full((1, ), -1.),
                          torch.zeros(1, dtype=torch.int64, device=limits.device))
        found = Candidates(*map(torch.cat, zip(*levels, last)))
        found = found.of((found.scores > -2).nonzero().squeeze(1))
        return suppress(found, self.head.test_cfg, self.head)

    def _level(self, level: int, limits: Tensor, scores: Tensor, deltas: Tensor,
               factors: Optional[Tensor] = None) -> Candidates:
        """The best candidates of a level. Only they are activated and decoded."""
        head = self.head
        size = scores.shape[2], scores.shape[3]
        rows = scores.permute(0, 2, 3, 1).reshape(-1, head.cls_out_channels)
        own = getattr(head.loss_cls, 'custom_cls_channels', False)
        if own:
            rows = head.loss_cls.get_activation(rows)
        elif not head.use_sigmoid_cls:
            rows = rows.softmax(-1)[:, :-1]
        # The best pairs of a place and a class are among the places with the best classes.
        best, places = _best(rows.amax(1), self.count)
        labels = torch.full_like(places, level)
        if rows.shape[1] > 1 and not self.is_rpn:
            classes = rows.shape[1]
            best, pairs = _best(rows.index_select(0, places).reshape(-1), self.count)
            labels = pairs % classes
            places = places.index_select(0, pairs // classes)
        elif not self.is_rpn:
            labels = torch.zeros_like(places)
        if head.use_sigmoid_cls and not own:
            best = best.sigmoid()
        priors = head.prior_generator.sparse_priors(places, size, level, deltas.dtype,
                                                    deltas.device)
        deltas = deltas.permute(0, 2, 3, 1).reshape(-1, 4).index_select(0, places)
        boxes = decode(head.bbox_coder, priors, deltas, limits)
        invalid = torch.zeros_like(best, dtype=torch.bool) if self.is_rpn else \
            best <= float(head.test_cfg.get('score_thr', 0))
        if factors is not None:
            factors = factors.permute(0, 2, 3, 1).reshape(-1).index_select(0, places)
            best = best * factors.sigmoid()
        smallest = head.test_cfg.get('min_bbox_size', -1)
        if smallest >= 0:
            sides = boxes[:, 2:] - boxes[:, :2]
            invalid = invalid | (sides <= smallest).any(1)
        return Candidates(boxes, best.masked_fill(invalid, -2.), labels)


def extract(extractor: Any, features: Sequence[Tensor], boxes: Tensor) -> Tuple[Tensor, Tensor]:
    """RoIAlign, each box on the level of its size.

    Args:
        extractor (SingleRoIExtractor): The host's.
        features (Sequence[Tensor]): Of all levels, each (1, C, H, W).
        boxes (Tensor): Shape (N, 4).

    Returns:
        tuple[Tensor, Tensor]: Features (N, C, h, w), level by level; and of which box each is,
        (N, ). To put them back in order would be a copy of all of them.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    ratio = (sides[:, 0] * sides[:, 1]).sqrt() / extractor.finest_scale + 1e-6
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    found, order = [], []
    last = extractor.num_inputs - 1
    for level, layer in enumerate(extractor.roi_layers):
        # Floor of the logarithm to base 2, as bounds.
        here = torch.ones_like(ratio, dtype=torch.bool)
        if level > 0:
            here = here & (ratio >= 2. ** level)
        if level < last:
            here = here & (ratio < 2. ** (level + 1))
        places = here.nonzero().squeeze(1)
        found.append(roi_align(features[level], rois.index_select(0, places), layer.output_size,
                               layer.spatial_scale, layer.sampling_ratio, layer.aligned))
        order.append(places)
    return torch.cat(found), torch.cat(order)


class RoIBoxes(nn.Module):
    """The box heads of a two-stage detector, or of a cascade.

    Args:
        roi_head (nn.Module): The host's; :func:`.require_exportable` accepts it.
    """

    def __init__(self, roi_head: Any) -> None:
        super().__init__()
        self.heads = nn.ModuleList(listed(roi_head.bbox_head))
        self.extractors = nn.ModuleList(listed(roi_head.bbox_roi_extractor))
        self.test_cfg = roi_head.test_cfg

    def forward(self, features: Sequence[Tensor], boxes: Tensor, limits: Tensor) -> Candidates:
        """Args:
            features (Sequence[Tensor]): Of the neck, each (1, C, H, W).
            boxes (Tensor): Proposals, shape (N, 4).
            limits (Tensor): Width, height, width, height of the image.

        Returns:
            Candidates: By falling score; groups are labels.
        """
        total: Any = 0
        head: Any
        extractor: Any
        for stage, (head, extractor) in enumerate(zip(self.heads, self.extractors)):
            regions, order = extract(extractor, features, boxes)
            boxes = boxes.index_select(0, order)
            scores, deltas = head(regions)
            deltas = deltas.reshape(len(boxes) if not torch.jit.is_tracing() else -1,
                                    1 if head.reg_class_agnostic else head.num_classes, 4)
            total = (total.index_select(0, order) if stage else 0) + scores
            if stage < len(self.heads) - 1:
                if head.custom_activation:
                    scores = head.loss_cls.get_activation(scores)
                labels = scores[:, :-1].argmax(1)
                boxes = decode(head.bbox_coder, boxes, _of_class(deltas, labels), limits)
        scores = total / float(len(self.heads))
        scores = head.loss_cls.get_activation(scores) if head.custom_cls_channels else \
            scores.softmax(-1)
        scores = scores[:, :-1]
        classes = head.num_classes
        pairs = (scores > self.test_cfg.score_thr).reshape(-1).nonzero().squeeze(1)
        best = torch.cat([scores.reshape(-1).index_select(0, pairs), scores.new_full((1, ), -1.)])
        pairs = torch.cat([pairs, pairs.new_zeros(1)])  # the last of Candidates
        rows, labels = pairs // classes, pairs % classes
        boxes = decode(head.bbox_coder, boxes.index_select(0, rows),
                       _of_class(deltas.index_select(0, rows), labels), limits)
        return suppress(Candidates(boxes, best, labels), self.test_cfg, head)


def _of_class(values: Tensor, labels: Tensor) -> Tensor:
    """Of values (N, classes, ...) those of one class each; (N, 1, ...) know no classes."""
    if values.shape[1] == 1:
        return values.squeeze(1)
    # As rows: a gather along an axis would need indices as large as the values.
    rows = torch.arange(labels.shape[0], device=labels.device) * values.shape[1] + labels
    return values.flatten(0, 1).index_select(0, rows)


class RoIMasks(nn.Module):
    """The mask heads of a two-stage detector; of a cascade their mean.

    Args:
        roi_head (nn.Module): The host's; :func:`.require_exportable` accepts it.
    """

    def __init__(self, roi_head: Any) -> None:
        super().__init__()
        self.heads = nn.ModuleList(listed(roi_head.mask_head))
        self.extractors = nn.ModuleList(listed(roi_head.mask_roi_extractor))

    def forward(self, features: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Args:
            features (Sequence[Tensor]): Of the neck, each (1, C, H, W).
            boxes (Tensor): Shape (N, 4).
            labels (Tensor): Shape (N, ).

        Returns:
            Tensor: Probabilities in the boxes, shape (N, 28, 28).
        """
        total: Any = 0
        head: Any
        for index, (head, extractor) in enumerate(zip(self.heads, self.extractors)):
            if index == 0 or extractor is not self.extractors[0]:
                regions, order = extract(extractor, features, boxes)
            masks = _of_class(head(regions), labels.index_select(0, order)).sigmoid()
            total = total + _in_order(masks, order)
        return total / len(self.heads)


def _in_order(values: Tensor, order: Tensor) -> Tensor:
    """Undo a reordering by ``order``, a permutation of rows."""
    return values.index_select(0, order.argsort())


class ExportableDetections(nn.Module):
    """All that a detector does behind its neck, for one image.

    Args:
        model (nn.Module): A copy of the host's detector; :func:`.require_exportable` accepts it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        roi_head = getattr(model, 'roi_head', None)
        self.dense = DenseBoxes(model.bbox_head if roi_head is None else model.rpn_head,
                                is_rpn=roi_head is not None)
        self.boxes = RoIBoxes(roi_head) if roi_head is not None else None
        self.masks = RoIMasks(roi_head) if has_masks(model) else None

    def forward(self, features: Tuple[Tensor, ...], limits: Tensor) -> Tuple[Tensor, ...]:
        """Args:
            features (tuple[Tensor]): Of the neck, each (1, C, H, W).
            limits (Tensor): Width, height, width, height of the image.

        Returns:
            tuple[Tensor, ...]: Boxes and scores (N, 5), labels (N, ), and of mask heads
            probabilities in each box (N, 28, 28).
        """
        found = self.dense(features, limits)
        if self.boxes is not None:
            proposals = found.boxes.index_select(0, found.real())
            found = self.boxes(features, proposals, limits)
        results = [torch.cat([found.boxes, found.scores.unsqueeze(1)], 1), found.groups]
        if self.masks is not None:
            results.append(self.masks(features, found.boxes, found.groups))
        real = found.real()
        return tuple(values.index_select(0, real) for values in results)
