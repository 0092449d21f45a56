# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What images made without data should be like: terms of the synthesis loss."""
from psaq_mm.prior.augmentation import random_flip, random_roll
from psaq_mm.prior.batch_norm import channel_statistics, gaussian_divergence
from psaq_mm.prior.batch_norm_term import BatchNormPrior
from psaq_mm.prior.density import binned_density, entropy, exact_density
from psaq_mm.prior.patch_similarity import (
    cosine_similarity_matrix,
    patch_similarity_entropy,
    patch_similarity_entropy_v1,
)
from psaq_mm.prior.patch_similarity_term import PatchSimilarityPrior
from psaq_mm.prior.randomness import derived_seed, uniform
from psaq_mm.prior.term import (
    AttentionRecord,
    BatchNormRecord,
    PriorState,
    PriorTerm,
    TeacherRecord,
)
from psaq_mm.prior.total_variation import total_variation, total_variation_loss
from psaq_mm.prior.total_variation_term import TotalVariationPrior

__all__ = [
    'AttentionRecord', 'BatchNormPrior', 'BatchNormRecord', 'PatchSimilarityPrior', 'PriorState',
    'PriorTerm', 'TeacherRecord', 'TotalVariationPrior', 'binned_density', 'channel_statistics',
    'cosine_similarity_matrix', 'derived_seed', 'entropy', 'exact_density',
    'gaussian_divergence', 'patch_similarity_entropy', 'patch_similarity_entropy_v1',
    'random_flip', 'random_roll', 'total_variation', 'total_variation_loss', 'uniform'
]
