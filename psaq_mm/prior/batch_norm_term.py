# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The term that asks images for the statistics that BatchNorm layers remember."""
import torch
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.prior.batch_norm import gaussian_divergence
from psaq_mm.prior.term import PriorState, PriorTerm
from psaq_mm.registry import PRIORS


@PRIORS.register_module()
class BatchNormPrior(PriorTerm):
    """Divergence of the batch's statistics from those stored in BatchNorm.

    Swin itself has LayerNorm; heads may carry BatchNorm: UperNet and its
    auxiliary head, the box heads of Cascade Mask R-CNN. The statistics are
    the training set's, and need neither data nor labels. V2 does not mention
    them: this is off unless a config adds it [choice].

    The statistics are the batch's: with this term an image depends on what
    else is in its batch, and so on the number of processes.

    L_BN = mean over layers and channels of KL(N(m, v) || N(M, V)), with m, v
    of the batch and M, V as stored.

    Args:
        weight (float): Factor of the term. Defaults to 1.0 [choice].

    Raises:
        UserError: If the weight is not a finite number of at least 0.
    """

    needs_batch_norm = True
    couples_images = True

    def __call__(self, state: PriorState) -> Tensor:
        """The weighted loss, a scalar for the whole batch."""
        if not state.batch_norms:
            raise UserError(
                'synthesis.priors: BatchNormPrior found no BatchNorm statistics in this model; '
                'remove it from the priors')
        divergences = [gaussian_divergence(r.mean, r.var, r.running_mean, r.running_var,
                                           r.eps).mean() for r in state.batch_norms]
        return self.weight * torch.stack(divergences).mean()
