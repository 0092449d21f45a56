# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What of a model becomes one graph, and how the graph takes its place."""
from typing import Any, Callable, Optional, Tuple

from torch import Tensor, nn

Size = Tuple[int, int]

Run = Callable[[Tensor], Tuple[Tensor, ...]]
"""Normalized images of shape (B, C, H, W) to the outputs of the graph."""


class GraphPart:
    """The part of a host's model that becomes one graph.

    Args:
        model (nn.Module): The model, float or quantized; not changed.
    """

    input_name = 'images'

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def name(self) -> str:
        """str: Which modules they are, for people."""
        raise NotImplementedError

    @property
    def output_names(self) -> Tuple[str, ...]:
        """tuple[str]: One for each output."""
        raise NotImplementedError

    @property
    def fixed_size(self) -> Optional[Size]:
        """tuple[int, int], optional: The only size of images that the model
        takes, if there is but one."""
        return None

    @property
    def channels(self) -> int:
        """int: Channels of an image."""
        raise NotImplementedError

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        """What the graph computes, by the model itself."""
        raise NotImplementedError

    def export_form(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        """A copy of the part that can be traced, its quantizers still simulated.

        Args:
            size (tuple[int, int], optional): Height and width of the images;
                None if they vary.
            batch (int): Images at once. Defaults to 1.

        Returns:
            nn.Module: Maps images to a tuple of outputs.
        """
        raise NotImplementedError

    def install(self, run: Run) -> None:
        """Let the model call ``run`` in the place of these modules."""
        raise NotImplementedError


class StandIn(nn.Module):
    """Stands in a model for the modules that a graph replaces."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.run(*inputs, **kwargs)
