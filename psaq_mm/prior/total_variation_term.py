# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The term that keeps images as smooth as natural ones."""
from torch import Tensor

from psaq_mm.prior.term import PriorState, PriorTerm, require
from psaq_mm.prior.total_variation import total_variation_loss, total_variation_target
from psaq_mm.registry import PRIORS
from psaq_mm.sections import is_number


@PRIORS.register_module()
class TotalVariationPrior(PriorTerm):
    """Distance of the total variation from a target drawn in each step [v1].

    Args:
        weight (float): Factor of the term. Defaults to 0.05 [v1].
        low (float): Smallest target, for 32 images of 224x224; scaled for other
            shapes [choice]. Defaults to 2500 [v1].
        high (float): Largest target, for 32 images of 224x224. Defaults to
            3000 [v1].

    Raises:
        UserError: If an argument is out of its range.
    """

    def __init__(self, weight: float = 0.025, low: float = 2500., high: float = 3000.) -> None:
        super().__init__(weight)
        require(is_number(low) and low >= 0, 'low', 'a number of at least 0', low)
        require(is_number(high) and high >= low, 'high', f'a number of at least low ({low})', high)
        self.low = float(low)
        self.high = float(high)

    def __call__(self, state: PriorState) -> Tensor:
        """Compute the term.

        Args:
            state (PriorState): What the step's forward pass left behind.

        Returns:
            Tensor: The weighted loss, a scalar.
        """
        batch, _, height, width = state.images.shape
        target = total_variation_target(
            batch, height, width, state.generator, low=self.low, high=self.high)
        return self.weight * total_variation_loss(state.images, target)
