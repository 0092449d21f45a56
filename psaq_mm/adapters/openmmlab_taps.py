# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where teacher and student are compared in models of mmdet and mmseg."""
import inspect
from typing import Any, Callable, Collection, ContextManager, Dict, List, Optional, Tuple

from torch import Tensor, nn

from .tap_record import TapRecord


def numbered(group: str, tensors: Any) -> Dict[str, Tensor]:
    """``group.0``, ``group.1``, ... for the tensors of a sequence."""
    return {f'{group}.{index}': tensor for index, tensor in enumerate(tensors)}


def takes_features_alone(head: nn.Module) -> bool:
    """Whether a head runs on feature maps and nothing else: a Mask2Former asks for
    samples too, GLIP for words."""
    parameters = inspect.signature(head.forward).parameters.values()
    needed = [p for p in parameters if p.default is p.empty
              and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


def dense_head(model: Any) -> Optional[nn.Module]:
    """The convolutional head of a detector that scores every position: the RPN,
    or that of a single-stage detector; None if there is none."""
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.dense_heads.anchor_free_head import AnchorFreeHead
    for name in ('rpn_head', 'bbox_head'):
        head = getattr(model, name, None)
        if isinstance(head, (AnchorHead, AnchorFreeHead)) and takes_features_alone(head):
            return head
    return None


def tap_groups(model: Any) -> Tuple[str, ...]:
    """Groups of taps of a detector or segmentor."""
    groups = ['backbone']
    if getattr(model, 'with_neck', False):
        groups.append('neck')
    if hasattr(model, 'encode_decode'):
        head = model.decode_head
        first = head[0] if isinstance(head, nn.ModuleList) else head
        return (*groups, 'logits') if takes_features_alone(first) else tuple(groups)
    if dense_head(model) is not None:
        groups += ['scores', 'deltas']
    if getattr(model, 'roi_head', None) is not None and getattr(model, 'with_rpn', False):
        groups.append('rois')
    return tuple(groups)


def forward_taps(model: Any, features: Tuple[Tensor, ...], size: Tuple[int, int],
                 groups: Collection[str], regions: Optional[List[Tensor]],
                 fewer_proposals: Callable[[Any], ContextManager[None]]) -> TapRecord:
    """Run neck and heads as far as the groups need.

    Args:
        model (nn.Module): Detector or segmentor.
        features (tuple[Tensor]): What its backbone computed.
        size (tuple[int, int]): Height and width of the images.
        groups (Collection[str]): Wanted groups.
        regions (list[Tensor], optional): Boxes for RoI heads; None for the
            model's own proposals.
        fewer_proposals (Callable): Bounds the number of those.

    Returns:
        TapRecord: The taps.
    """
    taps = numbered('backbone', features) if 'backbone' in groups else {}
    heads = set(groups) - {'backbone'}
    if not heads:
        return TapRecord(taps)
    if getattr(model, 'with_neck', False):
        features = tuple(model.neck(features))
        if 'neck' in groups:
            taps.update(numbered('neck', features))
    if 'logits' in groups:
        taps['logits.0'] = _segment(model, features)
    if heads & {'scores', 'deltas'}:
        head: Any = dense_head(model)
        scores, deltas = head(features)[:2]
        for group, tensors in (('scores', scores), ('deltas', deltas)):
            if group in groups:
                taps.update(numbered(group, tensors))
    if 'rois' in groups:
        if regions is None:
            with fewer_proposals(model):
                regions = _propose(model, features, size)
        taps.update(numbered('rois', _classify_regions(model.roi_head, features, regions)))
    return TapRecord(taps, regions)


def _segment(model: Any, features: Tuple[Tensor, ...]) -> Tensor:
    """Logits of the decode head, before they are resized."""
    if not isinstance(model.decode_head, nn.ModuleList):
        return model.decode_head(features)
    first, *others = model.decode_head  # a cascade of heads, each sees the one before
    out = first(features)
    for head in others:
        out = head(features, out)
    return out


def _propose(model: Any, features: Tuple[Tensor, ...], size: Tuple[int, int]) -> List[Tensor]:
    from mmdet.structures import DetDataSample
    samples = []
    for _ in range(len(features[0])):
        sample = DetDataSample()
        sample.set_metainfo(dict(img_shape=size, ori_shape=size, pad_shape=size,
                                 batch_input_shape=size, scale_factor=(1.0, 1.0)))
        samples.append(sample)
    found = model.rpn_head.predict(features, samples, rescale=False)
    # As many for each image, so that regions of one image stay together.
    count = min(len(boxes) for boxes in found)
    return [boxes.bboxes[:count].detach() for boxes in found]


def _classify_regions(roi_head: Any, features: Tuple[Tensor, ...],
                      regions: List[Tensor]) -> List[Tensor]:
    """Class logits, box deltas and mask logits of every stage on the same
    regions (a cascade would move them in between) [choice]."""
    from mmdet.structures.bbox import bbox2roi
    if not len(regions[0]):
        return []
    rois = bbox2roi(list(regions))
    found: List[Dict[str, Tensor]] = []
    if isinstance(roi_head.bbox_head, nn.ModuleList):  # a cascade
        for stage in range(len(roi_head.bbox_head)):
            found.append(roi_head._bbox_forward(stage, features, rois))
            if roi_head.with_mask:
                found.append(roi_head._mask_forward(stage, features, rois))
    else:
        found.append(roi_head._bbox_forward(features, rois))
        if roi_head.with_mask:
            found.append(roi_head._mask_forward(features, rois))
    return [output[key].unflatten(0, (len(regions), -1)) for output in found
            for key in ('cls_score', 'bbox_pred', 'mask_preds') if key in output]
