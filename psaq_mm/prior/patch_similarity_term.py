# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The term that asks images for diverse patches."""
import torch
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.prior.patch_similarity import patch_similarity_entropy, patch_similarity_entropy_v1
from psaq_mm.prior.term import AttentionRecord, PriorState, PriorTerm, require
from psaq_mm.registry import PRIORS
from psaq_mm.sections import is_integer, is_number


@PRIORS.register_module()
class PatchSimilarityPrior(PriorTerm):
    """Negative patch similarity entropy, summed over the attention blocks [v1].

    L_PSE = - sum over blocks l of H_l, of each image.

    Args:
        weight (float): Factor of the term. Defaults to 1.0 [v1].
        bins (int): Number of grid points over [-1, 1] of the form 'binned'.
            Defaults to 256 [choice].
        bandwidth (float): Standard deviation h of the kernel. Defaults to
            0.01 [v1].
        form (str): 'binned' for a dense fixed grid [choice], or 'v1' for V1's
            grid of a few points, which costs several times as much. Defaults to
            'binned'.
        points (int): Number of grid points of the form 'v1'. Defaults to
            10 [v1].

    Raises:
        UserError: If an argument is out of its range.
    """

    needs_attention = True

    def __init__(self, weight: float = 1.0, bins: int = 256, bandwidth: float = 0.01,
                 form: str = 'binned', points: int = 10) -> None:
        super().__init__(weight)
        require(is_integer(bins) and bins >= 8, 'bins', 'an integer of at least 8', bins)
        require(is_number(bandwidth) and bandwidth > 0, 'bandwidth', 'a number above 0', bandwidth)
        require(form in ('binned', 'v1'), 'form', "'binned' or 'v1'", form)
        require(is_integer(points) and points >= 2, 'points', 'an integer of at least 2', points)
        self.bins, self.bandwidth, self.form, self.points = bins, float(bandwidth), form, points

    def _block_entropy(self, record: AttentionRecord, batch_size: int) -> Tensor:
        """Entropy of one block, of each image: shape (B, )."""
        output = record.output
        dtype = torch.promote_types(output.dtype, torch.float32)
        u = output.mean(dim=2, dtype=dtype)  # (num_windows*B, N, head_dim)
        if self.form == 'v1':
            return patch_similarity_entropy_v1(
                u, batch_size, record.valid, points=self.points, bandwidth=self.bandwidth)
        return patch_similarity_entropy(
            u, batch_size, record.valid, bins=self.bins, bandwidth=self.bandwidth)

    def __call__(self, state: PriorState) -> Tensor:
        """The weighted loss of each image, shape (B, )."""
        if not state.attention:
            raise UserError(
                'synthesis.priors: PatchSimilarityPrior found no attention block in this model; '
                'remove it from the priors or choose a model with window attention')
        batch_size = state.images.shape[0]
        entropies = [self._block_entropy(record, batch_size) for record in state.attention]
        return -self.weight * torch.stack(entropies).sum(0)
