# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Detectors of mmdet and segmentors of mmseg with a Swin backbone.

The graph holds the backbone, the neck and the convolutional head behind them:
the dense head of a detector (RPN, or head of a single-stage detector), the
decode head of a segmentor, or for images of one size the pixel decoder of a
MaskFormer or Mask2Former. What follows (proposals, RoIAlign, RoI heads, NMS,
resizing) is left to the host.
"""
import copy
from functools import cached_property
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.adapters.openmmlab_taps import dense_head, takes_features_alone
from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating

from ..adaptive_pool import replace_adaptive_pools
from ..subgraph import FunctionModule, Run, Size, Subgraph
from .detection_checks import known_to_engines
from .openmmlab_swin import exportable_swin

KINDS = ('scores', 'deltas', 'centerness')
"""What a dense head computes for each level."""


class ExportableModel(nn.Module):
    """Backbone, neck and head.

    Args:
        backbone (ExportableSwin): The backbone.
        neck (nn.Module, optional): The host's neck.
        decode_head (nn.Module, optional): That of a segmentor.
        dense_head (nn.Module, optional): That of a detector.
        with_features (bool): Whether the features are outputs beside those of
            the dense head.
        pixel_decoder (nn.Module, optional): That of a MaskFormer or Mask2Former. Defaults
            to None.
    """

    def __init__(self, backbone: nn.Module, neck: Optional[nn.Module],
                 decode_head: Optional[nn.Module], dense_head: Optional[nn.Module],
                 with_features: bool, pixel_decoder: Optional[nn.Module] = None) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.backbone, self.neck = backbone, neck
        self.decode_head, self.dense_head = decode_head, dense_head
        self.with_features = with_features

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        features: Any = []
        for tokens, height, width in self.backbone(images):
            channels = tokens.shape[-1]
            features.append(tokens.reshape(-1, height, width, channels).permute(0, 3, 1, 2))
        if self.neck is not None:
            features = self.neck(tuple(features))
        if self.pixel_decoder is not None:
            return _decoded(self.pixel_decoder, tuple(features))
        return _outputs(tuple(features), self.decode_head, self.dense_head, self.with_features)


def _outputs(features: Tuple[Tensor, ...], decode_head: Any, dense_head: Any,
             with_features: bool) -> Tuple[Tensor, ...]:
    """The outputs of a graph: those of a dense head kind by kind, level by level."""
    if decode_head is not None:
        return (decode_head.forward(features), )
    if dense_head is None:
        return features
    dense = tuple(level for kind in dense_head.forward(features) for level in kind)
    return features + dense if with_features else dense


def _decoded(pixel_decoder: Any, features: Tuple[Tensor, ...]) -> Tuple[Tensor, ...]:
    """Mask features, and the memory of one level or several."""
    samples = () if takes_features_alone(pixel_decoder) else (None, )  # not used
    masks, memory = pixel_decoder.forward(list(features), *samples)
    return (masks, *(memory if isinstance(memory, (list, tuple)) else [memory]))


def _dense_names(head: Any, features: Sequence[Tensor]) -> Tuple[str, ...]:
    """Names of a dense head's outputs, one for each kind and level.

    Args:
        head (nn.Module): The head.
        features (Sequence[Tensor]): What the model gives it.

    Returns:
        tuple[str, ...]: Empty if the head does not score every position.
    """
    if not known_to_engines(head):
        return ()
    try:
        found = head.forward(list(features))
    except Exception:  # a head is a program: it may need more than features
        return ()
    if not isinstance(found, tuple) or len(found) not in (2, 3) or any(
            not isinstance(kind, (list, tuple)) or len(kind) != len(found[0]) or any(
                not isinstance(x, Tensor) or x.dim() != 4 for x in kind) for kind in found):
        return ()
    return tuple(f'{kind}_{level}' for kind, levels in zip(KINDS, found)
                 for level in range(len(levels)))


class OpenMMLabSubgraph(Subgraph):
    """Backbone, neck and the head behind them; or a bare backbone."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._bare = not hasattr(model, 'backbone')
        self._backbone = model if self._bare else model.backbone
        self._neck: Any = getattr(model, 'neck', None)
        self._alone = not known_to_engines(self._neck)
        if self._alone:
            self._neck = None  # what is behind it stays with it
        decode_head = None if self._alone else getattr(model, 'decode_head', None)
        # A cascade of decode heads, or one that needs queries, is left to the host.
        alone = decode_head is not None and not isinstance(decode_head, nn.ModuleList) \
            and takes_features_alone(decode_head)
        self._decode_head: Any = decode_head if alone else None
        self._pixel_decoder: Any = self._find_pixel_decoder()
        self._with_features = getattr(model, 'roi_head', None) is not None  # RoI heads need them

    def _find_pixel_decoder(self) -> Optional[nn.Module]:
        """That of a MaskFormer or Mask2Former, if it needs features alone."""
        found = getattr(self._mask_head, 'pixel_decoder', None)
        if found is None or self._alone:
            return None
        from mmdet.models.layers import MSDeformAttnPixelDecoder, PixelDecoder
        alone = type(found) in (MSDeformAttnPixelDecoder, PixelDecoder)
        return found if alone else None

    @property
    def _mask_head(self) -> Any:
        return getattr(self.model, 'panoptic_head', getattr(self.model, 'decode_head', None))

    def for_sizes(self, sizes: Sequence[Optional[Size]]) -> None:
        if None in sizes:  # its positions are constants in a graph
            self._pixel_decoder = None

    @property
    def in_torch(self) -> Tuple[str, ...]:
        if self._bare:
            return ()
        names = self.modules.split(' + ')
        found = [name for name, part in self.model.named_children()
                 if name not in names and name != 'auxiliary_head' and any(
                     True for _ in part.parameters())]
        if self._pixel_decoder is None:
            return tuple(found)
        return tuple(f'{name} without its pixel_decoder' if getattr(self.model, name)
                     is self._mask_head else name for name in found)

    @cached_property
    def _counted(self) -> Tuple[int, Tuple[str, ...]]:
        """Number of features, and names of the dense head's outputs: run the
        model to see, as necks and heads do not tell."""
        weight = self._backbone.patch_embed.projection.weight
        images = weight.new_zeros(1, self.channels, *(self.fixed_size or self.probe_size))
        head = None if hasattr(self.model, 'decode_head') or self._alone \
            else dense_head(self.model)
        with evaluating(self.model), torch.no_grad():
            features = self._features(images)
            return len(features), () if head is None else _dense_names(head, features)

    @property
    def _dense_head(self) -> Any:
        return dense_head(self.model) if self._counted[1] else None

    def _features(self, images: Tensor) -> Tuple[Tensor, ...]:
        features = self._backbone(images)
        return tuple(features if self._neck is None else self._neck(features))

    @property
    def modules(self) -> str:
        names = ['backbone']
        if self._neck is not None:
            names.append('neck')
        if self._decode_head is not None:
            names.append('decode_head')
        if self._pixel_decoder is not None:
            names.append('pixel_decoder')
        if self._dense_head is not None:
            names.append('rpn_head' if self._with_features else 'bbox_head')
        return ' + '.join(names)

    @property
    def output_names(self) -> Tuple[str, ...]:
        if self._decode_head is not None:
            return ('logits', )
        if self._pixel_decoder is not None:
            several = takes_features_alone(self._pixel_decoder)
            levels = self._pixel_decoder.num_outs if several else 1
            return ('mask_features', *(f'memory_{level}' for level in range(levels)))
        count, dense = self._counted
        features = tuple(f'feature_{index}' for index in range(count))
        return features + dense if self._with_features or not dense else dense

    @property
    def fixed_size(self) -> Optional[Size]:
        size = super().fixed_size
        if size is None and self._backbone.use_abs_pos_embed:
            count = self._backbone.absolute_pos_embed.shape[1]
            raise UserError(f'backbone: position embeddings of {count} patches, which are no '
                            'square, cannot be exported')
        return size

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        if self._pixel_decoder is not None:
            return _decoded(self._pixel_decoder, self._features(images))
        return _outputs(self._features(images), self._decode_head, self._dense_head,
                        self._with_features)

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        backbone, neck, decode_head, dense, pixels = copy.deepcopy(
            (self._backbone, self._neck, self._decode_head, self._dense_head,
             self._pixel_decoder))
        model = ExportableModel(exportable_swin(backbone, size, batch), neck, decode_head, dense,
                                self._with_features, pixels)
        replace_adaptive_pools(model)
        return model.eval()

    def install(self, run: Run) -> None:
        if self._bare:
            self.model.forward = run
            return
        if self._pixel_decoder is not None:
            self.model.backbone = FunctionModule(run)
            several = takes_features_alone(self._pixel_decoder)
            self._pixel_decoder.forward = lambda outputs, *samples: (
                outputs[0], list(outputs[1:]) if several else outputs[1])
            return
        dense, count = self._dense_head, self._counted[0]
        if self._neck is not None:
            self.model.neck = nn.Identity()  # the graph gives the features that a neck would
        if self._decode_head is not None:  # its predict() resizes what forward() returns
            self._decode_head.forward = lambda features: features[0]
        if dense is None:
            self.model.backbone = FunctionModule(run)
            return
        levels = sum(name.startswith(f'{KINDS[0]}_') for name in self._counted[1])
        outputs = SplitOutputs(run, count if self._with_features else 0, levels)
        self.model.backbone = FunctionModule(outputs.features)
        dense.forward = outputs.dense


class SplitOutputs:
    """Splits the outputs of a graph between a backbone and a dense head.

    Args:
        run (Callable): The graph.
        count (int): Number of features among its outputs, which come first.
        levels (int): Levels of the head.
    """

    def __init__(self, run: Run, count: int, levels: int) -> None:
        self.run, self.count, self.levels = run, count, levels
        self._features: Tuple[Tensor, ...] = ()
        self._dense: Tuple[Tensor, ...] = ()

    def features(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Run the graph and return the features, or all outputs if it gives none."""
        outputs = self.run(images)
        self._dense = outputs[self.count:]
        self._features = outputs[:self.count] or outputs
        return self._features

    def dense(self, features: Tuple[Tensor, ...]) -> Tuple[List[Tensor], ...]:
        """Return what the head computes for the features of the last images.

        Raises:
            RuntimeError: If these are other features.
        """
        if features is not self._features:
            raise RuntimeError('the graph holds the dense head too: it has results for the '
                               'features of the last images only')
        return tuple(list(self._dense[i:i + self.levels])
                     for i in range(0, len(self._dense), self.levels))
