# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How one tensor is quantized, as data."""
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.registry import OBSERVERS
from psaq_mm.sections import build_section, is_integer

PER_TENSOR = 'per_tensor'
PER_CHANNEL = 'per_channel'
PER_TOKEN = 'per_token'

NEAREST = 'nearest'
GPTQ = 'gptq'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _min_max() -> Dict[str, Any]:
    return dict(type='MinMaxObserver')


@dataclass(frozen=True)
class QuantSpec:
    """Uniform affine quantization of one tensor.

    Args:
        bits (int): Bit width, 2 to 8. Defaults to 8.
        symmetric (bool): If True, integers are signed in the narrow range
            ``[-(2^(bits-1)-1), 2^(bits-1)-1]`` and the zero point is 0. If
            False, they are unsigned in ``[0, 2^bits-1]``. Both fit int8 and
            uint8 of QuantizeLinear. Defaults to True.
        granularity (str): ``per_tensor``: one scale. ``per_channel``: one
            scale for each index of the channel axis, e.g. a weight of shape
            (out, in) has scales of shape (out,). ``per_token``: one scale, of what is left
            after each token was divided by its size, by
            :func:`psaq_mm.quantization.token_sizes`. Inputs of linear layers and softmax
            outputs alone may have it. Defaults to ``per_tensor``.
        observer (dict): Config of the range rule in the OBSERVERS registry.
            Defaults to ``dict(type='MinMaxObserver')``.
        margin (float): How far the range is widened beyond what was observed, for
            values that the images at hand do not show: by the factor
            ``1 + margin * 2^(bits - 8)``, so it costs the same absolute
            step at any width [choice]. 1 doubles an 8-bit range and widens a
            4-bit one by 6 %. Defaults to 0.
        bounds (tuple[float, float], optional): Values that the tensor cannot
            leave, such as (0, 1) of a softmax output; the margin ends there.
            Defaults to None.
        rounding (str): ``nearest``, or ``gptq``: weights that the student has
            not learned end on the integers that keep the outputs of their layer
            (:mod:`psaq_mm.quantization.gptq`). Activations have ``nearest``.
            Defaults to ``nearest``.
        rotate (bool): Whether the input of a linear layer is quantized after
            :class:`psaq_mm.quantization.Rotation`; layers of another class quantize theirs as
            it is. Role ``input`` alone may have it. Defaults to False.

    Raises:
        UserError: If a value is outside of what is described here.
    """
    bits: int = 8
    symmetric: bool = True
    granularity: str = PER_TENSOR
    observer: Mapping[str, Any] = field(default_factory=_min_max)
    margin: float = 0.
    bounds: Optional[Tuple[float, float]] = None
    rounding: str = NEAREST
    rotate: bool = False

    def __post_init__(self) -> None:
        if not is_integer(self.bits) or not 2 <= self.bits <= 8:
            raise UserError(f'bits must be an integer from 2 to 8, got {self.bits!r}')
        if not isinstance(self.symmetric, bool):
            raise UserError(f'symmetric must be True or False, got {self.symmetric!r}')
        if self.granularity not in (PER_TENSOR, PER_CHANNEL, PER_TOKEN):
            raise UserError(f"granularity must be '{PER_TENSOR}', '{PER_CHANNEL}' or "
                            f"'{PER_TOKEN}', got {self.granularity!r}")
        if not isinstance(self.observer, Mapping) \
                or not isinstance(self.observer.get('type'), str):
            raise UserError("observer must be a dict with a 'type', such as "
                            f"dict(type='MinMaxObserver'), got {self.observer!r}")
        if not _is_number(self.margin) or not 0 <= self.margin <= 1024:
            raise UserError(f'margin must be a number from 0 to 1024, got {self.margin!r}')
        if self.bounds is not None:
            if not isinstance(self.bounds, (list, tuple)) or len(self.bounds) != 2 \
                    or not all(map(_is_number, self.bounds)) \
                    or not self.bounds[0] <= 0 <= self.bounds[1]:
                raise UserError('bounds must be None or two numbers that hold 0 between them, '
                                f'got {self.bounds!r}')
            object.__setattr__(self, 'bounds', (float(self.bounds[0]), float(self.bounds[1])))
        if self.rounding not in (NEAREST, GPTQ):
            raise UserError(f"rounding must be '{NEAREST}' or '{GPTQ}', got {self.rounding!r}")
        if not isinstance(self.rotate, bool):
            raise UserError(f'rotate must be True or False, got {self.rotate!r}')
        rule = {k: v for k, v in self.observer.items() if k != '_scope_'}
        object.__setattr__(self, 'observer', rule)  # a plain, frozen copy
        self.build_observer()  # a wrong type or argument fails here, early

    @property
    def integer_range(self) -> Tuple[int, int]:
        """tuple[int, int]: The smallest and the largest integer."""
        if self.symmetric:
            top = 2**(self.bits - 1) - 1
            return -top, top
        return 0, 2**self.bits - 1

    def widen(self, lower: Tensor, upper: Tensor) -> Tuple[Tensor, Tensor]:
        """Give a range that was observed its margin.

        Returns:
            tuple[Tensor, Tensor]: Ends at least as far from 0, within the
            bounds except where more was observed.
        """
        if not self.margin:
            return lower, upper
        factor = 1 + self.margin * 2.**(self.bits - 8)
        low, high = lower * factor, upper * factor
        if self.bounds is not None:
            low, high = low.clamp(min=self.bounds[0]), high.clamp(max=self.bounds[1])
        return torch.minimum(low, lower), torch.maximum(high, upper)

    def build_observer(self) -> Any:
        """Build a fresh observer of this spec's range rule."""
        rule = dict(self.observer)
        # OBSERVERS.get would import whatever a dotted name says, and checkpoints hold specs.
        OBSERVERS.import_from_location()
        cls = OBSERVERS.module_dict.get(re.sub(r'^psaq_mm\.', '', rule['type']))
        if cls is None:
            raise UserError(f"observer type {rule['type']!r} is not registered; "
                            f'known: {", ".join(sorted(OBSERVERS.module_dict))}')
        rule.pop('type')
        try:
            return cls(spec=self, **rule)
        except TypeError as error:
            raise UserError(f'observer {cls.__name__}: {error}') from error

    def to_dict(self) -> Dict[str, Any]:
        """The spec as a plain dict that :meth:`from_dict` reads back."""
        values = asdict(self)
        if self.bounds is not None:
            values['bounds'] = list(self.bounds)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = 'spec') -> 'QuantSpec':
        """Build from a dict; unknown keys are a :class:`UserError`."""
        return build_section(cls, values, where)
