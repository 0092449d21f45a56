# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What images made without data should be like: terms of the synthesis loss."""
from psaq_mm.prior.augmentation import random_flip, random_roll
from psaq_mm.prior.density import binned_density, entropy, exact_density
from psaq_mm.prior.patch_similarity import (
    cosine_similarity_matrix,
    patch_similarity_entropy,
    patch_similarity_entropy_v1,
)
from psaq_mm.prior.patch_similarity_term import PatchSimilarityPrior
from psaq_mm.prior.term import AttentionRecord, PriorState, PriorTerm
from psaq_mm.prior.total_variation import (
    total_variation,
    total_variation_loss,
    total_variation_target,
)
from psaq_mm.prior.total_variation_term import TotalVariationPrior

__all__ = [
    'AttentionRecord', 'PatchSimilarityPrior', 'PriorState', 'PriorTerm', 'TotalVariationPrior',
    'binned_density', 'cosine_similarity_matrix', 'entropy', 'exact_density',
    'patch_similarity_entropy', 'patch_similarity_entropy_v1', 'random_flip', 'random_roll',
    'total_variation', 'total_variation_loss', 'total_variation_target'
]
