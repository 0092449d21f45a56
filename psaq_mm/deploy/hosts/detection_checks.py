# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whether all of a detector of mmdet can be exported: what cannot is refused by name."""
from typing import Any, List, NoReturn, Optional

from torch import nn

from psaq_mm.errors import UserError

OWN_OPERATORS = tuple(f'mmcv.ops.{name}' for name in (
    'deform_conv', 'modulated_deform_conv', 'carafe', 'masked_conv'))
"""Files of mmcv whose modules compute in C++."""


def known_to_engines(part: Optional[nn.Module]) -> bool:
    """Whether engines know all operators of a neck or head, as they know none of mmcv's own."""
    return part is None or not hasattr(part, 'deform_sampling') and not any(
        type(module).__module__.startswith(OWN_OPERATORS)
        for module in part.modules())  # the former is TOOD's, a function


def refuse(what: Any, reason: str) -> NoReturn:
    """Raise the error of a part that cannot be exported."""
    name = what if isinstance(what, str) else type(what).__name__
    raise UserError(f'{name} cannot be exported ({reason}); export the features alone with '
                    '--part features, and let mmdet do the rest')


def require_exportable(model: Any) -> None:
    """Check that all of a detector can be exported.

    Raises:
        UserError: If not; it names the part.
    """
    from mmdet.models.dense_heads import RPNHead
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
    from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    def same(part: Any, base: type, *methods: str) -> None:
        changed = [name for name in methods
                   if getattr(type(part), name, None) is not getattr(base, name)]
        if not isinstance(part, base) or changed:
            refuse(part, f'no {base.__name__}' if not isinstance(part, base) else
                   f'its {changed[0]} is not that of {base.__name__}')

    roi_head = getattr(model, 'roi_head', None)
    dense = model.rpn_head if roi_head is not None and getattr(model, 'with_rpn', False) else \
        getattr(model, 'bbox_head', None)
    if dense is None:
        refuse(model, 'it has no head that scores every position')
    if getattr(model, 'semantic_head', None) is not None:
        refuse(model.semantic_head, 'it segments all pixels beside the objects')
    for part in (getattr(model, 'neck', None), dense):
        if not known_to_engines(part):
            refuse(part, 'no engine knows an operator of mmcv in it')
    same(model, SingleStageDetector if roi_head is None else TwoStageDetector, 'predict')
    base = RPNHead if roi_head is not None else BaseDenseHead
    same(dense, base, '_predict_by_feat_single', '_bbox_post_process')
    same(dense, BaseDenseHead, 'predict', 'predict_by_feat')
    if not hasattr(getattr(dense, 'prior_generator', None), 'sparse_priors'):
        refuse(dense, 'its prior generator has no sparse_priors')
    nms_threshold(dense.test_cfg, dense)
    if roi_head is None:
        if getattr(model, 'mask_head', None) is not None:
            refuse(model.mask_head, 'a mask head without RoIs')
        return
    cascade = isinstance(roi_head, CascadeRoIHead)
    kind = CascadeRoIHead if cascade else StandardRoIHead
    same(roi_head, kind, 'predict', 'predict_bbox', '_bbox_forward',
         *(['_refine_roi'] if cascade else []), *(['predict_mask', '_mask_forward']
                                                  if roi_head.with_mask else []))
    if roi_head.with_shared_head:
        refuse(roi_head.shared_head, 'a shared head')
    for head in listed(roi_head.bbox_head):
        same(head, BBoxHead, '_predict_by_feat_single', 'regress_by_class')
        if not head.with_reg:
            refuse(head, 'it has no regression')
    for head in listed(roi_head.mask_head) if roi_head.with_mask else []:
        same(head, FCNMaskHead, '_predict_by_feat_single')
    for extractor in [*listed(roi_head.bbox_roi_extractor),
                      *(listed(roi_head.mask_roi_extractor) if roi_head.with_mask else [])]:
        same(extractor, SingleRoIExtractor, 'forward', 'map_roi_levels')
    nms_threshold(roi_head.test_cfg, roi_head)


def listed(heads: Any) -> List[Any]:
    """One head, or those of all stages of a cascade."""
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def nms_threshold(test_cfg: Any, head: Any) -> float:
    """The IoU above which a box is suppressed.

    Raises:
        UserError: If it is not greedy NMS by class.
    """
    config = dict(test_cfg.get('nms') or {})
    kind = config.get('type', 'nms')
    if kind != 'nms' or config.get('class_agnostic'):
        refuse(head, f'test_cfg.nms is {kind}, not greedy NMS by class' if kind != 'nms' else
               'its NMS knows no classes')
    others = set(config) - {'type', 'iou_threshold', 'iou_thr', 'split_thr', 'class_agnostic'}
    if others:
        refuse(head, f'test_cfg.nms has {", ".join(sorted(others))}')
    threshold: Any = config.get('iou_threshold', config.get('iou_thr', 0.5))
    return float(threshold)


def has_masks(model: Any) -> bool:
    """Whether a detector has a mask head."""
    return bool(getattr(getattr(model, 'roi_head', None), 'with_mask', False))
