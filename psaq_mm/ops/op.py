# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What every quantized op has in common, and the registry by float class."""
from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Tuple, Type, TypeVar

import torch
from torch import Tensor, nn

from psaq_mm.quantization import Quantizer, QuantSpec
from psaq_mm.quantization.quantizer import INTEGERS, LEARNED
from psaq_mm.quantization.spec import GPTQ
from psaq_mm.registry import QUANT_OPS

_OP_OF_CLASS: Dict[type, Type['QuantOp']] = {}
OpT = TypeVar('OpT', bound=Type['QuantOp'])


SETTLED = 'psaq_mm_settled'
"""Key in a state dict that says that a weight keeps its integers; there only if it does."""


def without_notes(state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """A state dict without what it says of how weights and ranges came about."""
    return {k: v for k, v in state.items()
            if k.rpartition('.')[2] not in (SETTLED, LEARNED, INTEGERS)}


class QuantOp(nn.Module):
    """Mixin of a quantized op: ``class QuantLinear(QuantOp, nn.Linear)``.

    An op *is* its float module (same class, same parameters and children,
    by reference) with one :class:`Quantizer` for each placed role. A
    subclass names its roles and overrides ``forward``.
    """

    roles: ClassVar[Mapping[str, int]] = {}
    """Role name -> channel axis of that tensor, for per-channel ranges."""

    quantizers: Dict[str, Any]
    """A ModuleDict: role to :class:`Quantizer`, or to what stands for one in an export."""
    weight: Tensor
    weight_settled: bool
    """Whether the weight was learned or rounded by GPTQ: it then keeps its integers."""

    @classmethod
    def from_float(cls, module: nn.Module, specs: Mapping[str, QuantSpec]) -> 'QuantOp':
        """Make the quantized counterpart of a float module.

        Returns:
            QuantOp: Shares parameters, buffers and children with ``module``, but for those
            of a layer whose input is to be rotated; no quantizer has a range yet, so it
            computes what the module does.
        """
        op = cls.__new__(cls)
        op.__dict__.update({
            # the containers are copied, so that adding quantizers leaves the
            # float module as it was; what they hold is shared
            k: v.copy() if k.startswith('_') and isinstance(v, dict) else v
            for k, v in module.__dict__.items()
        })
        op.__dict__['_origin'] = (module, )  # in a tuple: not a child module
        op.__dict__['_weight_cache'] = None
        op.weight_settled = False
        op.quantizers = nn.ModuleDict({  # type: ignore[assignment]
            role: Quantizer(spec, cls.roles[role], role == 'attention')
            for role, spec in specs.items()})
        return op

    def set_weight_range(self) -> None:
        """Set the range of the weight's quantizer, if there is one, on the weight.

        Raises:
            ValueError: If the weight holds NaN or infinite values.
        """
        quantizer = self.weight_quantizer
        if quantizer is not None:
            quantizer.start_observing()
            assert quantizer.observer is not None
            try:
                quantizer.observer.observe(self.weight, quantizer.axis)
                quantizer.finish_observing()
            finally:
                quantizer.observer = None

    def in_own_basis(self, weight: Tensor) -> Tensor:
        """A weight of the float module as this op has it; most have it as it is."""
        return weight

    def undo_rotation(self) -> None:
        """Bring parameters back to the basis of the float module; most ops never leave it."""

    @property
    def float_module(self) -> nn.Module:
        """nn.Module: The module that this op stands in for."""
        return self._origin[0]  # type: ignore[index, return-value]

    @property
    def weight_quantizer(self) -> Optional[Quantizer]:
        """Quantizer, optional: That of the weight, if it is quantized."""
        quantizer = self.quantizers['weight'] if 'weight' in self.quantizers else None
        return quantizer if isinstance(quantizer, Quantizer) else None

    @property
    def awaits_gptq(self) -> bool:
        """bool: Whether the weight is to be rounded by GPTQ and was not yet, or learned."""
        quantizer = self.weight_quantizer
        return quantizer is not None and quantizer.spec.rounding == GPTQ \
            and not self.weight_settled

    def quantize(self, role: str, x: Tensor) -> Tensor:
        """Pass a tensor through the quantizer of a role, if it has one."""
        return self.quantizers[role](x) if role in self.quantizers else x

    def weight_rows(self, weight: Tensor) -> Optional[Tensor]:
        """A tensor of the weight's shape as a matrix (O, I), each row of one scale.

        Returns:
            Tensor, optional: What :meth:`input_rows` (N, I) are multiplied by;
            None if the op is no such product, as a base op is not.
        """
        return None

    def input_rows(self, x: Tensor) -> Tensor:
        """What the rows of :meth:`weight_rows` are multiplied by, shape (N, I)."""
        raise NotImplementedError

    def weight_of_rows(self, rows: Tensor) -> Tensor:
        """Back from :meth:`weight_rows` to the weight's shape."""
        raise NotImplementedError

    def quantized_weight(self) -> Tensor:
        """The weight after quantization, kept while nothing changes it.

        Changes through ``weight.data`` go unnoticed, as torch does not count
        them: use ``torch.no_grad()`` and an in-place method.
        """
        weight, quantizer = self.weight, self.weight_quantizer
        if quantizer is None or not quantizer.active:
            return weight
        sources = (weight, quantizer.scale, quantizer.zero_point)
        if torch.is_grad_enabled() and any(s.requires_grad for s in sources) \
                or any(s.is_inference() for s in sources):  # those have no version
            return quantizer(weight)
        # In-place changes raise a tensor's version; moves change its address.
        key = (weight.dtype, *((s.data_ptr(), s._version) for s in sources))
        cache: Optional[Tuple[Any, Tensor, Any]] = self.__dict__['_weight_cache']
        if cache is None or cache[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                # The sources stay alive, so that no other tensor takes their address.
                cache = (key, quantizer(weight), [s.detach() for s in sources])
            self.__dict__['_weight_cache'] = cache
        return cache[1]

    def _save_to_state_dict(self, destination: Dict[str, Tensor], prefix: str,
                            keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_settled:
            destination[prefix + SETTLED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any,
                              **kwargs: Any) -> None:
        own = dict(state_dict)
        self.weight_settled = bool(own.pop(prefix + SETTLED, False))
        super()._load_from_state_dict(own, prefix, *args, **kwargs)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, '_weight_cache': None}  # neither pickled nor deep-copied


def register_op(*float_classes: type) -> Callable[[OpT], OpT]:
    """Class decorator: this op replaces modules of exactly these classes.

    Subclasses are not matched: they may compute something else (mmdet's
    ``NormedLinear`` is an ``nn.Linear``).
    """

    def register(op: OpT) -> OpT:
        if op.__name__ not in QUANT_OPS.module_dict:
            QUANT_OPS.register_module(module=op)
        for float_class in float_classes:
            _OP_OF_CLASS[float_class] = op
        return op

    return register


def op_for(module: nn.Module) -> Optional[Type[QuantOp]]:
    """The op class that replaces a module, or None."""
    return _OP_OF_CLASS.get(type(module))
