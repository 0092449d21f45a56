# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The term that keeps images as smooth as natural ones."""
import torch
from torch import Tensor

from psaq_mm.prior.randomness import uniform
from psaq_mm.prior.term import PriorState, PriorTerm, require
from psaq_mm.prior.total_variation import total_variation_loss
from psaq_mm.registry import PRIORS
from psaq_mm.sections import is_number


@PRIORS.register_module()
class TotalVariationPrior(PriorTerm):
    """Distance of the total variation from a target drawn in each step [v1].

    Args:
        weight (float): Factor of the term. Defaults to 0.025 [choice: half of
            V1's; its images are the ones that were measured].
        low (float): Smallest target, for 32 images of 224x224, whatever the
            number and size of the images (:func:`total_variation_loss`).
            Defaults to 2500 [v1].
        high (float): Largest target, likewise. Defaults to 3000 [v1].

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
        """The weighted loss of each image, shape (B, )."""
        draws = uniform(state.generators, 1)[:, 0]
        target = self.low + (self.high - self.low) * draws
        dtype = torch.promote_types(state.images.dtype, torch.float32)
        return self.weight * total_variation_loss(
            state.images, target.to(state.images.device, dtype))
