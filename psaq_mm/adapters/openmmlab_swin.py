# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What mmdet's and mmseg's Swin Transformers share.

The two are classes of their own with the same submodules and the same code;
``mmdet_swin.py`` and ``mmseg_swin.py`` bind what is here to each.
"""
import logging
import math
from contextlib import ExitStack
from typing import (
    Any,
    ClassVar,
    Collection,
    Dict,
    FrozenSet,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)
from weakref import WeakKeyDictionary

from mmengine.logging import print_log
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.prior import AttentionRecord

from . import (
    mmcv_layers,  # noqa: F401 (registers the ops of the heads' layers)
    openmmlab_taps,
)
from .adapter import Adapter, shown_size
from .neck_sizes import first_taken
from .openmmlab_taps import fewer_regions, samples_for
from .pixel_range import pixel_range
from .predictors import last_layers
from .recorder import AttentionRecorder
from .seen_pixels import SeenPixels, seen_pixels, turns_channels
from .swin_layouts import OPENMMLAB, SWIN_AUTHORS, convert_openmmlab_swin
from .tap_record import TapRecord
from .tested_size import test_dataset
from .window_grid import WindowGrid
from .window_tokens import valid_tokens


def _config_of(model: nn.Module) -> Any:
    """The config of a model that a host or we built; None if it is not known."""
    return getattr(model, 'cfg', getattr(model, 'built_from', None))


REGIONS = 256, 32
"""How many proposals of an image box heads are given, and how many detections mask heads
[choice]."""

_SEEN: 'WeakKeyDictionary[nn.Module, SeenPixels]' = WeakKeyDictionary()

NORMS_OF_BLOCK = {'norm1': 'attn.w_msa.qkv', 'norm2': 'ffn.layers.0.0'}
NORMS_OF_MERGING = {'norm': 'reduction'}
"""Names within both hosts' blocks, as of :attr:`Adapter.norm_readers_of`."""


class OpenMMLabSwinAdapter(Adapter):
    """Models whose ``backbone`` is a Swin Transformer, or that alone.

    Subclasses name the host's classes.
    """

    backbone_class: ClassVar[Any]
    shift_window_class: ClassVar[Any]

    layouts = {OPENMMLAB: 'backbone.stages.0.blocks.0.attn.w_msa.qkv.weight',
               SWIN_AUTHORS: 'backbone.layers.0.blocks.0.attn.qkv.weight'}

    V1_OUTPUTS = ('patch_embed', 'attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.1',
                  'downsample.reduction')
    patch_projection = 'patch_embed.projection'
    recompute_flag = 'with_cp'

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(getattr(model, 'backbone', model), cls.backbone_class)

    def backbone_name(self, model: nn.Module) -> str:
        return '' if isinstance(model, self.backbone_class) else 'backbone'

    def in_scope(self, model: nn.Module, name: str, scope: str) -> bool:
        # An auxiliary head of mmseg has no part in inference: it stays float.
        return super().in_scope(model, name, scope) and not (
            name == 'auxiliary_head' or name.startswith('auxiliary_head.'))

    def _examine(self, model: nn.Module) -> Tuple[FrozenSet[str], FrozenSet[str], str]:
        if isinstance(model, self.backbone_class):
            return frozenset(), frozenset(), ''
        with fewer_regions(model, 2, 2):
            return super()._examine(model)

    def head_of(self, model: nn.Module, name: str) -> str:
        # As the hosts' configs call them: rpn_head, roi_head.bbox_head, decode_head, ...
        parts = name.split('.')
        heads = [i for i, part in enumerate(parts) if part.endswith('head')]
        return '.'.join(parts[:heads[-1] + 1]) if heads and heads[0] == 0 else ''

    def runs_on_proposals(self, model: nn.Module, name: str) -> bool:
        return name.startswith('roi_head.')

    def is_segmentor(self, model: nn.Module) -> bool:
        return hasattr(model, 'encode_decode')

    def attention_windows(self, model: nn.Module) -> List[WindowGrid]:
        backbone = self._backbone(model)
        # A stage merges patches at its end, for the next.
        steps = [backbone.patch_embed.projection.stride,
                 *(stage.downsample.sampler.stride for stage in backbone.stages[:-1])]
        return [(step, (window, window)) for step, window in zip(
            steps, (stage.blocks[0].attn.window_size for stage in backbone.stages))]

    def fixed_size(self, model: nn.Module) -> Optional[Tuple[int, int]]:
        backbone = self._backbone(model)
        if not backbone.use_abs_pos_embed:
            return None
        # The size is not stored, only how many patches it has: a square, or the user's.
        side = math.isqrt(backbone.absolute_pos_embed.shape[1])
        height, width = backbone.patch_embed.projection.stride
        return (side * height, side * width) \
            if side ** 2 == backbone.absolute_pos_embed.shape[1] else None

    def image_size(self, model: nn.Module) -> Tuple[int, int]:
        height, width = super().image_size(model)
        factors = (1, 2, 4) if self.fixed_size(model) is None else ()
        return self._first_taken(model, [(n * height, n * width) for n in factors]) \
            or (height, width)

    def taken_size(self, model: nn.Module, size: Tuple[int, int]) -> Tuple[int, int]:
        return self._first_taken(model, [
            (-(-size[0] // step) * step, -(-size[1] // step) * step)
            for step in (1, 32, 64, 128, 256, 512)]) or size

    def _first_taken(self, model: nn.Module, sizes: Sequence[Tuple[int, int]]) \
            -> Optional[Tuple[int, int]]:
        plain = getattr(model, 'neck', None) is None or self.is_segmentor(model)
        head = None if plain else openmmlab_taps.dense_head(model)
        return first_taken(model, head, self.attention_windows(model), sizes)

    def check_image_size(self, model: nn.Module, size: Tuple[int, int],
                         key: str = 'synthesis.image_size') -> None:
        taken = self.taken_size(model, size)
        if taken != size:
            raise UserError(f'{key} must be a size at which neck and head of the model can be '
                            f'run, such as {shown_size(taken)}; at {shown_size(size)} they cannot')
        backbone = self._backbone(model)
        if not backbone.use_abs_pos_embed:
            return
        rows, columns = (-(-side // step) for side, step in zip(
            size, backbone.patch_embed.projection.stride))
        needed, fixed = backbone.absolute_pos_embed.shape[1], self.fixed_size(model)
        if rows * columns != needed:
            such = f', such as {shown_size(fixed)}' if fixed is not None else ''
            raise UserError(f'{key} must make {needed} patches{such}, since the '
                            f'backbone has use_abs_pos_embed; {shown_size(size)} makes '
                            f'{rows * columns}')

    def valid_range(self, model: nn.Module) -> Tuple[Tensor, Tensor]:
        seen = self._seen(model)
        if seen is not None:
            return seen.low, seen.high
        channels = self._backbone(model).patch_embed.projection.in_channels
        preprocessor = getattr(model, 'data_preprocessor', None)
        mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
        return pixel_range(channels, mean, std)

    def extreme_pixels(self, model: nn.Module) -> Optional[Tensor]:
        preprocessor = getattr(model, 'data_preprocessor', None)
        if self._seen(model) is None and getattr(preprocessor, 'mean', None) is None:
            return None
        return super().extreme_pixels(model)

    def is_rgb(self, model: nn.Module) -> bool:
        seen = self._seen(model)
        if seen is not None:
            return seen.rgb
        # The preprocessors turn OpenCV's BGR around, or not.
        return turns_channels(getattr(model, 'data_preprocessor', None))

    def _seen(self, model: nn.Module) -> Optional[SeenPixels]:
        """The pixels of test images; None if the model has no config with a test pipeline."""
        config = _config_of(model)
        if config is None or not test_dataset(config)[1]:
            return None
        if model not in _SEEN:
            _SEEN[model] = seen_pixels(config, getattr(model, 'data_preprocessor', None),
                                       self._backbone(model).patch_embed.projection.in_channels)
        return _SEEN[model]

    def check_pixels(self, model: nn.Module) -> None:
        preprocessor = getattr(model, 'data_preprocessor', None)
        seen = self._seen(model)
        if getattr(preprocessor, 'mean', None) is not None or seen and not seen.plain:
            return
        if seen is not None and seen.failed:
            raise UserError('model.data_preprocessor does not normalize images, and steps of the '
                            f'test pipeline could not be run to see whether they do: {seen.failed}'
                            '; set mean and std of model.data_preprocessor')
        if seen is None and preprocessor is not None:
            raise UserError('model.data_preprocessor does not normalize images, and there is no '
                            'test pipeline that would: set its mean and std (0 and 1 if the '
                            'model takes pixels from 0 to 255), or model.cfg')
        print_log('nothing normalizes the images of this model: they are made of pixels from 0 to '
                  '255', logger='current', level=logging.WARNING)

    def convert_state(self, model: nn.Module,
                      state: Mapping[str, Tensor]) -> Tuple[Dict[str, Tensor], str]:
        return convert_openmmlab_swin(state, self.backbone_name(model))

    def forward_backbone(self, model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
        return tuple(self._backbone(model)(images))

    def forward_model(self, model: Any, images: Tensor) -> Any:
        if isinstance(model, self.backbone_class):
            return self.forward_backbone(model, images)  # it is the whole of it
        size = (images.shape[2], images.shape[3])
        if self.is_segmentor(model):
            meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
                        scale_factor=(1.0, 1.0), padding_size=[0, 0, 0, 0])
            return model.encode_decode(images, [dict(meta) for _ in images])
        return model(images, samples_for(images, size, self._words(model)), mode='tensor')

    def forward(self, model: Any, images: Tensor, scope: str) -> None:
        # By 'tensor' mode mask heads would see proposals, and some of one image alone; others
        # ask for annotations there, or for words.
        if scope == 'backbone' or all(getattr(model, part, None) is None for part in (
                'roi_head', 'mask_head', 'language_model')):
            super().forward(model, images, scope)
            return
        # Asked for a long list of classes in parts, a host takes one image at a time.
        alone = getattr(model, 'language_model', None) is not None
        with fewer_regions(model, *REGIONS):
            for batch in images.split(1 if alone else len(images)):
                self._predict(model, batch)

    def _predict(self, model: Any, images: Tensor) -> Any:
        size = (images.shape[2], images.shape[3])
        return model.predict(images, samples_for(images, size, self._words(model)), rescale=False)

    def _last_layers(self, model: nn.Module, images: Tensor) -> FrozenSet[str]:
        try:
            return super()._last_layers(model, images)
        except Exception:  # what forward() says of 'tensor' mode
            return last_layers(model, lambda: self._predict(model, images),
                               lambda name: not self.head_of(model, name))

    def _words(self, model: nn.Module) -> Sequence[str]:
        """What a model that is asked by words is asked for: the classes of its test set."""
        config = _config_of(model)
        dataset = {} if config is None else test_dataset(config)[0]
        return (dataset.get('metainfo') or {}).get('classes') or ('object', )

    def forward_norms(self, model: Any, images: Tensor) -> None:
        if self.is_segmentor(model):
            features: List[Any] = []
            source = model.neck if model.with_neck else model.backbone
            with source.register_forward_hook(lambda m, args, out: features.append(out)):
                self.forward_model(model, images)
            head = getattr(model, 'auxiliary_head', None)
            for part in head if isinstance(head, nn.ModuleList) else [head]:
                if part is not None:
                    part(features[-1])
        else:
            with fewer_regions(model):
                self.forward(model, images, 'model')

    def tap_groups(self, model: nn.Module) -> Tuple[str, ...]:
        return ('backbone', ) if isinstance(model, self.backbone_class) \
            else openmmlab_taps.tap_groups(model)

    def forward_taps(self, model: nn.Module, images: Tensor, groups: Collection[str],
                     regions: Optional[List[Tensor]] = None) -> TapRecord:
        return openmmlab_taps.forward_taps(
            model, self.forward_backbone(model, images), (images.shape[2], images.shape[3]),
            groups, regions)

    def _record(self, backbone: Any, recorder: AttentionRecorder, hooks: ExitStack) -> None:
        for module in backbone.modules():
            if isinstance(module, self.shift_window_class):
                self._record_block(module, recorder, hooks)

    @staticmethod
    def _record_block(block: Any, recorder: AttentionRecorder, hooks: ExitStack) -> None:
        shape: Dict[str, Tuple[int, int]] = {}

        def note_shape(module: nn.Module, args: Any, kwargs: Any) -> None:
            shape['hw'] = kwargs['hw_shape'] if 'hw_shape' in kwargs else args[1]

        def note_output(module: nn.Module, args: Any) -> None:
            # The input of `proj` is attn @ v with the heads side by side.
            heads = block.w_msa.num_heads
            height, width = shape['hw']
            valid = valid_tokens(int(height), int(width), block.window_size, block.shift_size)
            recorder.records.append(AttentionRecord(
                output=args[0].unflatten(-1, (heads, -1)),
                valid=None if valid is None else valid.to(args[0].device)))

        hooks.enter_context(block.register_forward_pre_hook(note_shape, with_kwargs=True))
        hooks.enter_context(block.w_msa.proj.register_forward_pre_hook(note_output))

    def _backbone(self, model: nn.Module) -> Any:
        return model if isinstance(model, self.backbone_class) else model.backbone
