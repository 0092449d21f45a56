# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The module that quantizes one tensor of a network."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError

from .fake_quantize import fake_quantize, quantize_to_integers
from .observers import NOTHING_OBSERVED, Observer
from .ranges import scale_and_zero_point
from .spec import PER_CHANNEL, PER_TOKEN, QuantSpec
from .token_sizes import token_sizes

LEARNED = 'psaq_mm_learned'
"""Key in a state dict that says that a range was learned; there only if it was."""

INTEGERS = 'psaq_mm_integers'
"""Key in a state dict of what integers a range is for: bits, 1 if it is symmetric, and a 1 if
it is of tokens over their sizes; on the CPU, wherever the model is."""


class Quantizer(nn.Module):
    """Simulates the quantization of one tensor.

    It quantizes as soon as it has a range, that is scale and zero point, which are
    buffers and so in the state dict: a model with the same ops that loads the state
    dict of a calibrated one quantizes too. Without a range, or while :attr:`enabled`
    is False, it passes its input through unchanged. It feeds :attr:`observer` while
    there is one.

    Args:
        spec (QuantSpec): Bits, symmetry, granularity and range rule.
        channel_axis (int, optional): The axis that per-channel scales run
            along; unused but for ``per_channel``. Defaults to None.
        softmax (bool): Whether it quantizes rows of softmax outputs, whose size is another one
            if tokens have scales of their own. Defaults to False.
    """

    def __init__(self, spec: QuantSpec, channel_axis: Optional[int] = None,
                 softmax: bool = False) -> None:
        super().__init__()
        if spec.granularity == PER_CHANNEL and channel_axis is None:
            raise ValueError('a per-channel quantizer needs its channel axis')
        self.spec, self.softmax = spec, softmax
        self.axis = channel_axis if spec.granularity == PER_CHANNEL else None
        self.enabled = True
        """bool: False while quantization is off for a moment, such as to observe."""
        self.learned = False
        """bool: Whether the range was learned, and not set by the range rule."""
        self.observer: Optional[Observer] = None
        self.scale: Tensor
        self.zero_point: Tensor
        self._store('scale', torch.empty(0))
        self._store('zero_point', torch.empty(0))

    def _store(self, name: str, value: Tensor) -> None:
        """Keep a tensor as a buffer of any shape."""
        if name in self._buffers:
            self._buffers[name] = value
        else:
            # The zero point of a symmetric range is 0 by definition: nothing to store.
            self.register_buffer(name, value,
                                 persistent=name == 'scale' or not self.spec.symmetric)

    @property
    def calibrated(self) -> bool:
        """bool: Whether the range has been set."""
        return self.scale.numel() > 0

    @property
    def active(self) -> bool:
        """bool: Whether it quantizes: it has a range, and is not switched off."""
        return self.enabled and self.calibrated

    def start_observing(self) -> None:
        """Watch what passes, with a fresh observer of the spec's rule."""
        self.observer = self.spec.build_observer()

    def finish_observing(self) -> None:
        """Set the range from what was observed.

        Raises:
            ValueError: If nothing passed.
        """
        if self.observer is None or self.observer.seen == 0:
            raise ValueError(NOTHING_OBSERVED)
        lower, upper = self.spec.widen(*self.observer.range())
        self.observer = None
        self.learned = False
        self.set_range(lower, upper)

    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """Set scale and zero point to cover a range with ends of shape (C,), or (1,)."""
        scale, zero_point = scale_and_zero_point(lower, upper, self.spec)
        with torch.inference_mode(False):  # else they could not be loaded over
            scale, zero_point = scale.clone(), zero_point.clone()
        if self.axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        self._store('scale', scale)
        self._store('zero_point', zero_point)

    def restore_range(self, scale: Tensor, zero_point: Tensor, learned: bool) -> None:
        """Go back to a range that the quantizer had."""
        self._store('scale', scale)
        self._store('zero_point', zero_point)
        self.learned = learned

    def range(self) -> Tuple[Tensor, Tensor]:
        """tuple[Tensor, Tensor]: The real values of the smallest and the
        largest integer, shape () or (C,)."""
        qmin, qmax = self.spec.integer_range
        return (qmin - self.zero_point) * self.scale, (qmax - self.zero_point) * self.scale

    def to_integers(self, x: Tensor) -> Tensor:
        """The integers of ``x``, as int32 of its shape."""
        return quantize_to_integers(x, self.scale, self.zero_point, self.spec.integer_range,
                                    self.axis)

    def simulate(self, x: Tensor) -> Tensor:
        """Round to the integers of the range and back, whether it is switched off or not."""
        sizes = self.sizes(x)
        if sizes is not None:
            x = x / sizes
        x = fake_quantize(x, self.scale, self.zero_point, self.spec.integer_range, self.axis)
        return x if sizes is None else x * sizes

    def sizes(self, x: Tensor) -> Optional[Tensor]:
        """Of its tokens, if they have scales of their own."""
        per_token = self.spec.granularity == PER_TOKEN
        return token_sizes(x, self.softmax) if per_token else None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            sizes = self.sizes(x.detach())
            self.observer.observe(x if sizes is None else x / sizes, self.axis)
        return self.simulate(x) if self.active else x

    def extra_repr(self) -> str:
        kind = 'symmetric' if self.spec.symmetric else 'asymmetric'
        return f'bits={self.spec.bits}, {kind}, {self.spec.granularity}'

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any,
               **kwargs: Any) -> 'Quantizer':
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        # model.half() must not round scales: a small one would become 0.
        return super()._apply(move_only, *args, **kwargs)

    def reshape_like(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Take the shapes that a state dict has for this range.

        An uncalibrated quantizer holds empty tensors; which shape they will
        have, only the checkpoint says.
        """
        for name in ('scale', 'zero_point'):
            value = state.get(prefix + name)
            if value is not None and value.shape != getattr(self, name).shape:
                self._store(name, torch.zeros_like(value, device=self.scale.device))
        if self.spec.symmetric and self.zero_point.shape != self.scale.shape:
            self._store('zero_point', torch.zeros_like(self.scale.detach()))

    def _save_to_state_dict(self, destination: Dict[str, Tensor], prefix: str,
                            keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.calibrated:
            destination[prefix + INTEGERS] = torch.tensor(self._integers)
        if self.learned:
            destination[prefix + LEARNED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any,
                              **kwargs: Any) -> None:
        own = dict(state_dict)
        self._require_own_integers(own.pop(prefix + INTEGERS, None), prefix)
        self.reshape_like(own, prefix)
        self.learned = bool(own.pop(prefix + LEARNED, False))
        super()._load_from_state_dict(own, prefix, *args, **kwargs)

    @property
    def _integers(self) -> List[int]:
        """What a state dict says of the integers."""
        per_token = [1] if self.spec.granularity == PER_TOKEN else []
        return [self.spec.bits, int(self.spec.symmetric), *per_token]

    def _require_own_integers(self, given: Optional[Tensor], prefix: str) -> None:
        """Raise if a state dict has its range for other integers; older ones do not say."""
        own = self._integers
        if given is not None and given.tolist() != own:
            theirs, ours = (f'{bits} bits ({"symmetric" if symmetric else "asymmetric"}'
                            f'{", per token" if per_token else ""})'
                            for bits, symmetric, *per_token in (given.tolist(), own))
            op, _, role = prefix[:-1].partition('.quantizers.')
            where = f'{op} ({role}): ' if role else ''
            raise UserError(f'{where}the state dict is quantized to {theirs}, the model to '
                            f'{ours}; prepare the model with the settings of the state dict')


@contextmanager
def restoring_ranges(quantizers: Iterable[Quantizer]) -> Iterator[None]:
    """Within the block ranges may change; if it fails, they are as before."""
    before = [(q, q.scale, q.zero_point, q.learned) for q in quantizers]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for quantizer, scale, zero_point, learned in before:
            quantizer.restore_range(scale, zero_point, learned)
        raise
