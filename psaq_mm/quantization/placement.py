# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Where quantizers stand: named sets of roles.

A *role* is a tensor of a float module that may be quantized:

======================  ======================================================
role                    tensor
======================  ======================================================
``weight``              weight of Linear or Conv2d
``input``               input of Linear or Conv2d
``output``              output of modules that an adapter lists
``query``               left operand of the first attention matmul (scaled)
``key``                 right operand of the first attention matmul
``attention``           left operand of the second one (softmax output)
``value``               right operand of the second attention matmul
``logits``              result of the first attention matmul
``bias_table``          relative position bias of an attention block
``attention_residual``  residual stream after the attention is added
``ffn_residual``        residual stream after the FFN is added
======================  ======================================================
"""
from typing import FrozenSet, Sequence, Union

from psaq_mm.errors import UserError
from psaq_mm.sections import nearest

ROLES = ('weight', 'input', 'output', 'query', 'key', 'attention', 'value', 'logits',
         'bias_table', 'attention_residual', 'ffn_residual')

PLACEMENTS = dict(
    # [choice] Where int8 kernels take their operands, and nowhere else: the
    # residual stream, softmax, LayerNorm and GELU stay float.
    operands=('weight', 'input', 'query', 'key', 'attention', 'value'),
    # [v1] Image, patch embedding, norms, qkv, logits, bias table, attn @ v,
    # projections, residual stream, GELU; the softmax output stays float.
    v1=('weight', 'input', 'output', 'logits', 'bias_table', 'attention_residual',
        'ffn_residual'),
)


def resolve_placement(placement: Union[str, Sequence[str]]) -> FrozenSet[str]:
    """The roles behind a name or a list of roles.

    Raises:
        UserError: If a name is unknown or the list is empty.
    """
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise UserError(f'placement must be one of {", ".join(PLACEMENTS)} or a list of '
                            f'roles, got {placement!r}.{nearest(placement, PLACEMENTS)}')
        return frozenset(PLACEMENTS[placement])
    if not isinstance(placement, (list, tuple)):
        raise UserError(f'placement must be a name or a list of roles, got {placement!r}')
    if not placement:
        raise UserError('placement is an empty list: nothing would be quantized')
    for role in placement:
        if role not in ROLES:
            raise UserError(f'placement names the unknown role {role!r}.'
                            f'{nearest(str(role), ROLES)} Known roles: {", ".join(ROLES)}')
    return frozenset(placement)
