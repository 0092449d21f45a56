# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where teacher and student are compared in models of mmdet and mmseg."""
import copy
import inspect
from contextlib import ExitStack, contextmanager
from typing import Any, Collection, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
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


def is_two_stage(model: Any) -> bool:
    """Whether a detector proposes regions, and has heads for them."""
    return getattr(model, 'roi_head', None) is not None and bool(getattr(model, 'with_rpn', False))


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
    if is_two_stage(model) and _runs_on_boxes(model.roi_head):
        groups.append('rois')
    return tuple(groups)


def _runs_on_boxes(roi_head: Any) -> bool:
    """Whether a RoI head is one of boxes, or a cascade of them, and nothing else: queries, a
    grid or a context for all images would be wanted too."""
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
    kind = type(roi_head)
    return any(all(getattr(kind, name) is getattr(known, name) for name in (
        '_bbox_forward', '_mask_forward', 'predict', 'predict_bbox', 'predict_mask'))
        for known in (CascadeRoIHead, StandardRoIHead))


@contextmanager
def fewer_regions(model: nn.Module, proposals: int = 64, detections: int = 16) -> Iterator[None]:
    """Within the block, no more than so many regions of an image reach the RoI heads: 1000
    in each stage of a cascade would take tens of gigabytes.

    Box heads see the proposals that the RPN scores best. Mask heads see, as in a test, what
    the box heads make of them; the best are detected whatever their score, so that each
    image has some. 64 and 16 are for passes with gradients [choice].

    Args:
        model (nn.Module): Detector, or another.
        proposals (int): At most for box heads. Defaults to 64.
        detections (int): At most for mask heads. Defaults to 16.
    """
    before: Dict[Any, Any] = {}
    bounds = dict(rpn_head=proposals, roi_head=detections, bbox_head=detections,
                  mask_head=detections)
    if getattr(getattr(model, 'rpn_head', None), 'test_cfg', None) is None:
        del bounds['roi_head']  # it has as many queries as it has
    try:
        for name, count in bounds.items():
            head: Any = getattr(model, name, None)
            if getattr(head, 'test_cfg', None) is not None:
                before[head] = head.test_cfg
                head.test_cfg = settings = copy.deepcopy(head.test_cfg)
                settings.max_per_img = min(count, settings.get('max_per_img', count))
                if 'score_thr' in settings:
                    settings.score_thr = 0.
        with _nothing_pasted(model):
            yield
    finally:
        for head, settings in before.items():
            head.test_cfg = settings


@contextmanager
def _nothing_pasted(model: nn.Module) -> Iterator[None]:
    """Within the block, RoI heads do not paste masks into images: no layer reads these, they
    take longest, and boxes outside of an image are an error there. What fuses them with
    segments gets empty ones."""
    heads: List[Any] = []
    fused = getattr(model, 'panoptic_fusion_head', None) is not None

    def unpasted(mask_preds: Any, results_list: List[Any], batch_img_metas: List[Any],
                 *args: Any, **kwargs: Any) -> List[Any]:
        for results, meta in zip(results_list, batch_img_metas) if fused else ():
            results.masks = results.bboxes.new_zeros(len(results), *meta['ori_shape'][:2]).bool()
        return results_list

    if getattr(model, 'roi_head', None) is not None:
        from mmdet.models.roi_heads.mask_heads import FCNMaskHead
        heads += [part for part in model.modules() if isinstance(part, FCNMaskHead)
                  and 'predict_by_feat' not in vars(part)]  # blocks may be nested
    try:
        for head in heads:
            head.predict_by_feat = unpasted
        yield
    finally:
        for head in heads:
            del head.predict_by_feat


def samples_for(images_or_features: Tensor, size: Tuple[int, int],
                words: Sequence[str] = ('object', )) -> List[Any]:
    """What mmdet wants to know of each image of a batch that is not resized.

    Args:
        images_or_features (Tensor): Shape (B, ...).
        size (tuple[int, int]): Height and width of the images.
        words (Sequence[str]): What models that are asked by words look for.
            Defaults to one word.
    """
    from mmdet.structures import DetDataSample
    return [DetDataSample(metainfo=dict(
        img_id=index, img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
        scale_factor=(1.0, 1.0), text=tuple(words), custom_entities=True))
        for index in range(len(images_or_features))]


def forward_taps(model: Any, features: Tuple[Tensor, ...], size: Tuple[int, int],
                 groups: Collection[str], regions: Optional[List[Tensor]]) -> TapRecord:
    """Run neck and heads as far as the groups need.

    Args:
        model (nn.Module): Detector or segmentor.
        features (tuple[Tensor]): What its backbone computed.
        size (tuple[int, int]): Height and width of the images.
        groups (Collection[str]): Wanted groups.
        regions (list[Tensor], optional): Of :class:`TapRecord`; None for the model's own.

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
            with fewer_regions(model), torch.no_grad():
                regions = _find_regions(model, features, size)
        taps.update(numbered('rois', _classify_regions(
            model.roi_head, features, regions, len(features[0]))))
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


def _find_regions(model: Any, features: Tuple[Tensor, ...], size: Tuple[int, int]) \
        -> List[Tensor]:
    """What each RoI head sees in a test, as many for each image."""
    from mmdet.structures.bbox import bbox2roi
    roi_head, samples = model.roi_head, samples_for(features[0], size)
    proposals = model.rpn_head.predict(features, samples, rescale=False)
    # As many for each image, so that regions of one image stay together.
    count = min(len(boxes) for boxes in proposals)
    seen: List[Tensor] = []
    with ExitStack() as hooks:
        for extractor in _stages(roi_head.bbox_roi_extractor):
            hooks.enter_context(extractor.register_forward_pre_hook(
                lambda module, args: seen.append(args[1])))
        found = roi_head.predict_bbox(features, [sample.metainfo for sample in samples],
                                      [boxes[:count] for boxes in proposals], roi_head.test_cfg)
    if roi_head.with_mask and seen:
        count = min(len(boxes) for boxes in found)
        seen.append(bbox2roi([boxes.bboxes[:count] for boxes in found]))
    return seen


def _stages(part: nn.Module) -> List[Any]:
    """Those of a cascade, or the one there is."""
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _classify_regions(roi_head: Any, features: Tuple[Tensor, ...], regions: List[Tensor],
                      images: int) -> List[Tensor]:
    """Class logits, box deltas and mask logits of every stage."""
    found: List[Dict[str, Tensor]] = []
    for stage, rois in enumerate(regions[:len(_stages(roi_head.bbox_head))]):
        which = (stage, ) if isinstance(roi_head.bbox_head, nn.ModuleList) else ()
        found.append(roi_head._bbox_forward(*which, features, rois))
        if roi_head.with_mask and len(regions[-1]):
            found.append(roi_head._mask_forward(*which, features, regions[-1]))
    outputs = [output[key] for output in found
               for key in ('cls_score', 'bbox_pred', 'mask_preds') if key in output]
    return [tensor.unflatten(0, (images, -1)) for output in outputs
            for tensor in (output if isinstance(output, (list, tuple)) else [output])]
