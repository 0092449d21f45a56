# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the rest of the project asks of a host library."""
import logging
import math
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import (
    Any,
    ClassVar,
    Collection,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)
from weakref import WeakKeyDictionary

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psaq_mm.devices import module_device
from psaq_mm.errors import UserError
from psaq_mm.prior import BatchNormRecord, channel_statistics

from .predictors import last_layers, layers_of, layers_of_own_width, layers_that_run
from .recorder import AttentionRecorder, BatchNormRecorder
from .tap_record import TapRecord
from .window_grid import WindowGrid, real_tokens, window_period

_LAYERS: 'WeakKeyDictionary[nn.Module, Tuple[FrozenSet[str], FrozenSet[str], str]]' = \
    WeakKeyDictionary()


class Adapter:
    """Everything that differs between host libraries.

    One subclass for each, registered with ``@ADAPTERS.register_module()``;
    it holds no state, the model comes with each call. The quantized
    counterparts of the host's own modules live beside it.
    """

    norm_readers_of: ClassVar[Mapping[type, Mapping[str, str]]] = {}
    """Class of a block to names within it: a LayerNorm's to that of the Linear that alone
    reads its output."""

    layouts: ClassVar[Mapping[str, str]] = {}
    """Name of each layout of weights that :meth:`convert_state` recognises,
    to how its keys look."""

    V1_OUTPUTS: ClassVar[Tuple[str, ...]]
    """Ends of the names of modules whose output V1 quantizes [v1]."""

    recompute_flag: ClassVar[str]
    """Attribute of modules that says whether they recompute activations for gradients."""

    patch_projection: ClassVar[str]
    """Name within the backbone of the projection of the patch embedding."""

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        """Whether this adapter serves the model."""
        raise NotImplementedError

    def backbone_name(self, model: nn.Module) -> str:
        """Name of the backbone within the model; empty if it is the model."""
        raise NotImplementedError

    def _prefix(self, model: nn.Module) -> str:
        """What the names of modules of the backbone begin with."""
        name = self.backbone_name(model)
        return name + '.' if name else ''

    def in_scope(self, model: nn.Module, name: str, scope: str) -> bool:
        """Whether a module belongs to ``scope``, ``backbone`` or ``model``."""
        prefix = self.backbone_name(model)
        return scope == 'model' or not prefix or name == prefix \
            or name.startswith(prefix + '.')

    def is_output_point(self, model: nn.Module, name: str) -> bool:
        """Whether V1 quantizes the output of this module."""
        return self.in_scope(model, name, 'backbone') and any(
            name == end or name.endswith('.' + end) for end in self.V1_OUTPUTS)

    def is_patch_embed(self, model: nn.Module, name: str) -> bool:
        """Whether this module is the projection of the patch embedding."""
        return name == self._prefix(model) + self.patch_projection

    def predictors(self, model: nn.Module) -> FrozenSet[str]:
        """Names of the layers whose output is the float model's: scores, boxes, logits.

        A small image goes through the model once. If that fails, layers are taken
        by their widths, and a warning says so. The answer is kept for the model.
        """
        return self._examined(model)[0]

    def idle(self, model: nn.Module) -> FrozenSet[str]:
        """Names of the layers outside of the backbone that have no part in a test, such as
        those of a branch that only trains; none if the model cannot be run."""
        return self._examined(model)[1]

    def check_forward(self, model: nn.Module) -> None:
        """Raise if a model cannot be run on an image alone.

        Raises:
            UserError: If so.
        """
        reason = self._examined(model)[2]
        if reason:
            raise UserError("quantization.scope='model': the model cannot be run on an image "
                            f"alone ({reason}); quantize its backbone: "
                            "quantization.scope='backbone'")

    def _examined(self, model: nn.Module) -> Tuple[FrozenSet[str], FrozenSet[str], str]:
        if model not in _LAYERS:
            _LAYERS[model] = self._examine(model)
        return _LAYERS[model]

    def _examine(self, model: nn.Module) -> Tuple[FrozenSet[str], FrozenSet[str], str]:
        """Last layers, idle layers, and why the model cannot be run, if so."""
        sizes = [self.image_size(model)]
        if self.fixed_size(model) is None:  # a small one will do, but for many queries
            side = 2 * max(math.prod(steps) for steps in zip(*(
                step for step, _ in self.attention_windows(model))))
            sizes.insert(0, (side, side))
        for size in sizes:
            images = torch.rand(1, self.valid_range(model)[0].shape[1], *size,
                                generator=torch.Generator().manual_seed(0)).to(
                                    module_device(model))
            try:
                run = layers_that_run(model, partial(self.forward, model, images, 'model'))
                found = self._last_layers(model, images)
                reason = ''
                break
            except Exception as error:  # heads are anyone's code
                reason = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
        else:
            print_log('the model cannot be run on an image alone to find its last layers '
                      f'({reason}): those whose output is as wide as no input of their head are '
                      'taken', logger='current', level=logging.WARNING)
            found = layers_of_own_width(model, lambda name: self.head_of(model, name))
            run = frozenset(layers_of(model))
        outside = {name for name in layers_of(model) if not self.in_scope(model, name, 'backbone')}
        return frozenset(found & outside), frozenset(outside - run), reason

    def _last_layers(self, model: nn.Module, images: Tensor) -> FrozenSet[str]:
        """The last layers of a model, by a forward pass of it."""
        return last_layers(model, lambda: self.forward_model(model, images),
                           lambda name: not self.head_of(model, name))

    def head_of(self, model: nn.Module, name: str) -> str:
        """Name of the head that a module is in; empty if it is in none."""
        raise NotImplementedError

    def runs_on_proposals(self, model: nn.Module, name: str) -> bool:
        """Whether a module runs on regions that the model itself proposes, so
        that quantization changes its input and not only its values."""
        return False

    def is_segmentor(self, model: nn.Module) -> bool:
        """Whether the model labels every pixel."""
        return False

    def kinds(self, model: nn.Module, name: str, predictors: Collection[str]) -> Tuple[str, ...]:
        """What a module is, of ``psaq_mm.recipe.quantization.KINDS``; predictors are those of
        :meth:`predictors`.
        """
        found = dict(patch_embed=self.is_patch_embed(model, name),
                     predictor=name in predictors,
                     roi_head=self.runs_on_proposals(model, name),
                     segmentor=self.is_segmentor(model))
        return tuple(kind for kind, holds in found.items() if holds)

    def norm_readers(self, model: nn.Module) -> Dict[str, str]:
        """Name of each LayerNorm of the backbone whose output one Linear alone reads,
        to the name of that one. Neither has another name or shares its weight."""
        uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        found = {}
        for name, block in model.named_modules():
            # A subclass may use its norms otherwise.
            for norm, reader in self.norm_readers_of.get(type(block), {}).items():
                parts = dict(block.named_modules())
                if isinstance(parts.get(norm), nn.LayerNorm) \
                        and parts[norm].elementwise_affine \
                        and isinstance(parts.get(reader), nn.Linear) \
                        and all(uses[id(p)] == 1 for part in (parts[norm], parts[reader])
                                for p in part.parameters()):
                    prefix = f'{name}.' if name else ''
                    found[prefix + norm] = prefix + reader
        return found

    def blocks(self, model: nn.Module) -> List[str]:
        """Names of the transformer blocks of the backbone, in their order. Of each, the first
        argument and the output are tensors with the images first."""
        classes = tuple(cls for cls, norms in self.norm_readers_of.items() if 'norm1' in norms)
        return [name for name, module in model.named_modules() if isinstance(module, classes)]

    def is_rgb(self, model: nn.Module) -> bool:
        """Whether the model sees RGB images; else BGR."""
        raise NotImplementedError

    def attention_windows(self, model: nn.Module) -> List[WindowGrid]:
        """What each stage does before it attends, and its windows; none if every
        token attends to all."""
        return []

    def fixed_size(self, model: nn.Module) -> Optional[Tuple[int, int]]:
        """Height and width that the model was built for, if it was for one size."""
        return None

    def image_size(self, model: nn.Module) -> Tuple[int, int]:
        """Height and width of the images that are made for a model: the one that it
        was built for, else the smallest that fills all attention windows."""
        fixed = self.fixed_size(model)
        return fixed if fixed is not None else window_period(self.attention_windows(model))

    def taken_size(self, model: nn.Module, size: Tuple[int, int]) -> Tuple[int, int]:
        """The smallest height and width, in pixels, from these on that the model can be run at,
        as far as padding to its strides helps; by default any size will do."""
        return size

    def check_image_size(self, model: nn.Module, size: Tuple[int, int],
                         key: str = 'synthesis.image_size') -> None:
        """Raise if the float model cannot take images of this height and width, in pixels.

        All of it has to, whatever is quantized: losses and BatchNorm statistics are those of
        neck and heads too, and a test runs them at its size.

        Args:
            key (str): What the message calls the size.

        Raises:
            UserError: If so; by default any size will do.
        """

    def warn_of_padding(self, model: nn.Module, size: Tuple[int, int]) -> None:
        """Log a warning if images of this height and width, in pixels, leave attention windows
        partly empty: what padding attends to says nothing about a model.
        """
        windows = self.attention_windows(model)
        stages = list(real_tokens(windows, size))
        if not stages or min(stages) == 1:
            return
        height, width = (max(1, round(side / period)) * period
                         for side, period in zip(size, window_period(windows)))
        try:
            self.check_image_size(model, (height, width))
        except UserError:  # it takes no other
            return
        print_log(f'at image_size {size[0]}x{size[1]} only {100 * min(stages):.0f} % of the '
                  f'tokens in the windows of stage {stages.index(min(stages)) + 1} are real, the '
                  f'rest is padding; {height}x{width} leaves none', logger='current',
                  level=logging.WARNING)

    def convert_state(self, model: nn.Module,
                      state: Mapping[str, Tensor]) -> Tuple[Dict[str, Tensor], str]:
        """Bring published weights into the keys and channel order of the float model.

        Returns:
            tuple: The weights, and the name of the layout they came in;
            unchanged and an empty name if it is not recognised.
        """
        raise NotImplementedError

    def valid_range(self, model: nn.Module) -> Tuple[Tensor, Tensor]:
        """Smallest and largest pixel after the model's own normalization.

        Returns:
            tuple[Tensor, Tensor]: Shape (1, C, 1, 1) each.
        """
        raise NotImplementedError

    def extreme_pixels(self, model: nn.Module) -> Optional[Tensor]:
        """The darkest and the brightest pixel of each channel, as the model sees them, shape
        (2, C, 1, 1); None if it is not known how its images are normalized."""
        return torch.cat(self.valid_range(model))

    def check_pixels(self, model: nn.Module) -> None:
        """Raise if it is not known what pixels a model sees, and warn if they are not
        normalized.

        Args:
            model (nn.Module): The float model.

        Raises:
            UserError: If so.
        """

    def forward_backbone(self, model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
        """Feature maps of normalized images of shape (B, C, H, W)."""
        raise NotImplementedError

    def forward_model(self, model: nn.Module, images: Tensor) -> Any:
        """Run all of the model, heads included, on normalized images.

        Returns:
            Any: What it computes, nested as it likes.
        """
        raise NotImplementedError

    def tap_groups(self, model: nn.Module) -> Tuple[str, ...]:
        """Groups of taps that teacher and student can be compared at, of
        ``backbone``, ``neck``, ``scores``, ``deltas``, ``rois`` and ``logits``."""
        raise NotImplementedError

    def forward_taps(self, model: nn.Module, images: Tensor, groups: Collection[str],
                     regions: Optional[List[Tensor]] = None) -> TapRecord:
        """Run a model as far as the taps need.

        Args:
            model (nn.Module): Teacher or student.
            images (Tensor): Normalized images of shape (B, C, H, W).
            groups (Collection[str]): Wanted ones, of :meth:`tap_groups`.
            regions (list[Tensor], optional): The teacher's, so that RoI heads
                of the student see the same. Defaults to None: the model's own.

        Returns:
            TapRecord: The taps, called ``<group>.<number>``.
        """
        raise NotImplementedError

    def forward(self, model: nn.Module, images: Tensor, scope: str) -> None:
        """Run what ``scope`` needs."""
        if scope == 'backbone':
            self.forward_backbone(model, images)
        else:
            self.forward_model(model, images)

    @contextmanager
    def record_attention(self, model: nn.Module) -> Iterator[AttentionRecorder]:
        """Within the block, record what each attention block computes."""
        recorder = AttentionRecorder()
        backbone = model.get_submodule(self.backbone_name(model))
        # Recomputed activations would not be the recorded ones.
        recomputing = [module for module in backbone.modules()
                       if getattr(module, self.recompute_flag, False)]
        try:
            for module in recomputing:
                setattr(module, self.recompute_flag, False)
            with ExitStack() as hooks:
                self._record(backbone, recorder, hooks)
                yield recorder
        finally:
            for module in recomputing:
                setattr(module, self.recompute_flag, True)

    def _record(self, backbone: Any, recorder: AttentionRecorder, hooks: ExitStack) -> None:
        """Add hooks that record the attention of a backbone."""
        raise NotImplementedError

    def forward_norms(self, model: nn.Module, images: Tensor) -> None:
        """Run everything that carries BatchNorm statistics, heads that only
        train included, on normalized images."""
        self.forward_model(model, images)

    def batch_norms(self, model: nn.Module) -> List[nn.Module]:
        """The BatchNorm layers of a model that store statistics."""
        return [module for module in model.modules()
                if isinstance(module, _BatchNorm) and module.running_mean is not None]

    @contextmanager
    def record_batch_norm(self, model: nn.Module,
                          enabled: bool = True) -> Iterator[BatchNormRecorder]:
        """Within the block, record the input's statistics of each BatchNorm."""
        recorder = BatchNormRecorder()

        def note(module: nn.Module, args: Any) -> None:
            if args[0].numel() == 0:  # no regions were proposed
                return
            mean, var = channel_statistics(args[0])
            recorder.records.append(BatchNormRecord(
                mean, var, module.running_mean, module.running_var,  # type: ignore[arg-type]
                module.eps))  # type: ignore[arg-type]

        with ExitStack() as hooks:
            for norm in self.batch_norms(model) if enabled else []:
                hooks.enter_context(norm.register_forward_pre_hook(note))
            yield recorder


def shown_size(size: Sequence[int]) -> str:
    """A size as it stands in a config: one number for a square."""
    return str(size[0]) if len(set(size)) == 1 else str(list(size))
