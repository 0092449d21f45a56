# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Quantized counterparts of float modules, registered by what they replace."""
from .conv import QuantConv2d, QuantConvTranspose2d
from .convert import (
    apply_plan,
    named_quant_ops,
    named_quantizers,
    named_rotations,
    ops_to_round,
    quantization_enabled,
    set_quantization,
    unwrap,
)
from .linear import QuantLinear
from .op import QuantOp, op_for, register_op, without_notes
from .plan import Plan, kinds_in, plan_quantization, unquantized_weights

__all__ = [
    'Plan', 'QuantConv2d', 'QuantConvTranspose2d', 'QuantLinear', 'QuantOp', 'apply_plan',
    'kinds_in', 'named_quant_ops', 'named_quantizers', 'named_rotations', 'op_for',
    'ops_to_round', 'plan_quantization', 'quantization_enabled', 'register_op',
    'set_quantization', 'unquantized_weights', 'unwrap', 'without_notes'
]
