# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Patch similarity entropy: how diverse an attention block finds an image's patches.

For one attention block [v1]: u is the mean over heads of attention @ value, G
the cosine similarity of every two tokens of a window, and the entropy is that
of the density of all entries of G which belong to one image. Noise makes all
patches alike, real images do not, so a high entropy is asked of an image.

V1 drops token 0, a class token in ViT. Swin has none: every token stays [choice].
"""
from typing import Optional

import torch
from torch import Tensor

from psaq_mm.prior.density import binned_density, entropy, exact_density

# A token below this norm has no direction; its similarities fade to 0 [choice].
_MIN_NORM = 1e-6


def cosine_similarity_matrix(u: Tensor) -> Tensor:
    """Cosine similarity of every two tokens of a window: shape (n, N, D) to (n, N, N).

    Normalising once and multiplying costs a fraction of broadcasting
    ``torch.cosine_similarity`` as V1 does. Half-precision input is computed in
    float32, under autocast too: the kernel's bandwidth is near bfloat16's step.
    """
    with torch.autocast(device_type=u.device.type, enabled=False):
        if u.dtype in (torch.float16, torch.bfloat16):
            u = u.float()
        unit = torch.nn.functional.normalize(u, dim=-1, eps=_MIN_NORM)
        return torch.bmm(unit, unit.transpose(1, 2))


def _similarities_by_image(u: Tensor, batch_size: int) -> Tensor:
    """Similarities grouped by image: (num_windows*B, N, D) to (B, num_windows, N*N).

    Raises:
        ValueError: If the windows do not divide evenly among the images.
    """
    if batch_size < 1 or u.shape[0] % batch_size:
        raise ValueError(
            f'{u.shape[0]} windows cannot be shared out evenly among {batch_size} images')
    return cosine_similarity_matrix(u).reshape(
        batch_size, u.shape[0] // batch_size, u.shape[1] * u.shape[1])


def _valid_pairs(valid: Optional[Tensor], similarities: Tensor) -> Optional[Tensor]:
    """Pairs of which both tokens are real: (num_windows, N) to (num_windows, N*N).

    Raises:
        ValueError: If ``valid`` is of another number of windows or tokens.
    """
    if valid is None:
        return None
    num_windows, entries = similarities.shape[1:]
    if valid.dim() != 2 or valid.shape[0] != num_windows or valid.shape[1]**2 != entries:
        raise ValueError(f'valid must have the shape of (num_windows, N), here {num_windows} '
                         f'windows with {entries} pairs each, got {tuple(valid.shape)}')
    valid = valid.to(device=similarities.device, dtype=torch.bool)
    return (valid[:, :, None] & valid[:, None, :]).flatten(1)


def patch_similarity_entropy(u: Tensor, batch_size: int, valid: Optional[Tensor] = None,
                             bins: int = 256, bandwidth: float = 0.01) -> Tensor:
    """Patch similarity entropy of one block, on a dense fixed grid [choice].

    V1's entropy with :func:`binned_density` in place of a kernel density
    estimate on ten points, whose gradient hardly spreads the similarities.

    Args:
        u (Tensor): Mean over heads of attention @ value, with shape of
            (num_windows*B, N, head_dim). Window w of image b has the index
            b * num_windows + w.
        batch_size (int): Number of images B.
        valid (Tensor, optional): Boolean with shape of (num_windows, N): False
            for tokens that only pad the feature map. A pair counts if both of
            its tokens do. Defaults to None, which counts all.
        bins (int): Number of grid points over [-1, 1]. Defaults to 256.
        bandwidth (float): Standard deviation h of the kernel. Defaults to 0.01.

    Returns:
        Tensor: Entropy of each image, with shape of (B, ).

    Raises:
        ValueError: If the windows do not divide evenly among the images, or
            ``valid`` does not fit them.
    """
    similarities = _similarities_by_image(u, batch_size)
    pairs = _valid_pairs(valid, similarities)
    density = binned_density(similarities, bins=bins, bandwidth=bandwidth, valid=pairs)
    return entropy(density, 2 / (bins - 1))


def patch_similarity_entropy_v1(u: Tensor, batch_size: int, valid: Optional[Tensor] = None,
                                points: int = 10, bandwidth: float = 0.01) -> Tensor:
    """Patch similarity entropy of one block as V1 computes it [v1].

    An exact kernel density estimate on a few points from the smallest to the
    largest similarity of the image; V1 takes the extremes of the whole batch, but
    an image must not depend on its neighbours [choice]. V1 knows no padding:
    ``valid`` is ours [choice]. All but ``points`` is as of :func:`patch_similarity_entropy`.
    """
    similarities = _similarities_by_image(u, batch_size)
    pairs = _valid_pairs(valid, similarities)
    seen = similarities.detach()
    inf = float('inf')
    low = (seen if pairs is None else seen.masked_fill(~pairs, inf)).amin((1, 2))
    high = (seen if pairs is None else seen.masked_fill(~pairs, -inf)).amax((1, 2))
    none = low > high  # no pair counts at all: a grid without width has the entropy 0
    low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
    unit = torch.linspace(0, 1, points, dtype=seen.dtype, device=seen.device)
    grid = torch.lerp(low[:, None], high[:, None], unit)
    density = exact_density(similarities, grid, bandwidth=bandwidth, valid=pairs)
    return entropy(density, grid)
