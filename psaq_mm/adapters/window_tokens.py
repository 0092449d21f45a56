# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which tokens of Swin's attention windows are padding."""
from functools import lru_cache
from typing import Optional

import torch
from torch import Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve where gradients are taken
def valid_tokens(height: int, width: int, window: int, shift: int) -> Optional[Tensor]:
    """Mark the real tokens of each window.

    mmdet's and mmseg's Swin zero-pads a feature map at the right and bottom
    to multiples of the window, rolls it by ``-shift`` and cuts it in
    windows, row by row.

    Args:
        height (int): Height of the feature map.
        width (int): Width of the feature map.
        window (int): Side of a window.
        shift (int): Cyclic shift of the block.

    Returns:
        Tensor, optional: Boolean of shape (num_windows, window^2), True for
        real tokens; None if there is no padding.
    """
    pad_h, pad_w = -height % window, -width % window
    if not pad_h and not pad_w:
        return None
    valid = torch.zeros(height + pad_h, width + pad_w, dtype=torch.bool)
    valid[:height, :width] = True
    if shift:
        valid = torch.roll(valid, (-shift, -shift), (0, 1))
    rows, columns = valid.shape[0] // window, valid.shape[1] // window
    valid = valid.view(rows, window, columns, window).transpose(1, 2)
    return valid.reshape(rows * columns, window * window)
