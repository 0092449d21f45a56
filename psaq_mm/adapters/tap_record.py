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
        regions (list[Tensor], optional): What RoI heads ran on: of each stage's box head,
            then of all mask heads if there are any, shape (n, 5), the number of the image
            and a box in pixels; none if nothing was proposed. Defaults to None.
    """

    taps: Dict[str, Tensor]
    regions: Optional[List[Tensor]] = None
