# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How blocks learn, one after the other: the ``reconstruction`` section of a recipe."""
from dataclasses import dataclass
from typing import Any, Mapping, Optional

from psaq_mm.errors import UserError
from psaq_mm.sections import build_section, is_integer

from .checks import check_number, check_positive_int


@dataclass(frozen=True)
class ReconstructionSettings:
    """How each transformer block learns to give what the float model's block gives. The
    defaults are those of the preset ``default``, in which none learns.

    Args:
        steps (int): Adam steps of each block; 0 for none. Defaults to 0: on synthetic images
            60 earned no accuracy, on a user's own ones they do [measured].
        batch_size (int): Images in a step. Defaults to 2.
        weight_lr (float): Peak learning rate of weights and biases, as a fraction of the step
            between two integers of the layer's weight. Defaults to 0.003.
        norm_lr (float): Peak learning rate of LayerNorm's scale and bias. Defaults to 1e-3.
        range_lr (float): Peak learning rate of the ranges of activations, as a fraction of the
            scale. Defaults to 5e-3.
        drop (float): Probability with which an element is left float: of the block's input,
            and of each activation in it [QDrop, arXiv 2203.05740]. Defaults to 0.5.

    Raises:
        UserError: If a value is outside of what is described here.
    """
    steps: int = 0
    batch_size: int = 2
    weight_lr: float = 0.003
    norm_lr: float = 1e-3
    range_lr: float = 5e-3
    drop: float = 0.5

    def __post_init__(self) -> None:
        check_positive_int(self.batch_size, 'batch_size')
        if not is_integer(self.steps) or self.steps < 0:
            raise UserError(f'steps must be an integer of at least 0, got {self.steps!r}')
        for key in ('weight_lr', 'norm_lr', 'range_lr', 'drop'):
            check_number(getattr(self, key), key, 0, 1)
        if self.steps and not self.weight_lr + self.norm_lr + self.range_lr:
            raise UserError('weight_lr, norm_lr and range_lr are all 0: nothing would learn; set '
                            'one, or steps=0')

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'ReconstructionSettings':
        """Build from the ``reconstruction`` section of a config."""
        return build_section(cls, values, 'reconstruction')
