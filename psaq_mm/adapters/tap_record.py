# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What teacher and student are compared by after a forward pass."""
from dataclasses import dataclass
from typing import Dict, List, Optional

from torch import Tensor


@dataclass
class TapRecord:
    """The taps of one forward pass.

    Args:
        taps (dict[str, Tensor]): ``<group>.<number>`` to a tensor of shape
            (B, ...), in the order of the forward pass.
        regions (list[Tensor], optional): For each image the boxes that RoI
            heads ran on, shape (n, 4) in pixels. Defaults to None.
    """

    taps: Dict[str, Tensor]
    regions: Optional[List[Tensor]] = None
