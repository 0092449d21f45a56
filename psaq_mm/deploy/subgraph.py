# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The part of a model that is exported as one graph."""
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from torch import Tensor, nn

from psaq_mm.adapters import find_adapter

Size = Tuple[int, int]

Run = Callable[[Tensor], Tuple[Tensor, ...]]
"""Maps normalized images of shape (B, C, H, W) to the outputs of the graph."""


class Subgraph:
    """The part of a host's model that is exported as one graph.

    Args:
        model (nn.Module): The model, float or quantized. Only :meth:`install`
            changes it.
    """

    input_name = 'images'

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def modules(self) -> str:
        """str: Names of the modules in the graph, for messages."""
        raise NotImplementedError

    @property
    def output_names(self) -> Tuple[str, ...]:
        """tuple[str]: One name for each output."""
        raise NotImplementedError

    @property
    def in_torch(self) -> Tuple[str, ...]:
        """tuple[str]: What of the model is not in the graph, for messages."""
        return ()

    def for_sizes(self, sizes: Sequence[Optional[Size]]) -> None:
        """Leave out of the graph what cannot be exported for these sizes of images.

        Args:
            sizes (Sequence[tuple[int, int], optional]): None for any size.
        """

    @property
    def fixed_size(self) -> Optional[Size]:
        """tuple[int, int], optional: Height and width of images, if the model
        accepts one size only."""
        return find_adapter(self.model).fixed_size(self.model)

    @property
    def probe_size(self) -> Size:
        """tuple[int, int]: Height and width of images that the model takes."""
        return find_adapter(self.model).taken_size(self.model, (224, 224))

    @property
    def channels(self) -> int:
        """int: Channels of an image."""
        return find_adapter(self.model).valid_range(self.model)[0].shape[1]

    def dynamic_axes(self, size: Optional[Size]) -> Dict[str, Dict[int, str]]:
        """Names of the axes that vary, of input and outputs.

        Args:
            size (tuple[int, int], optional): Height and width of the images; None if they vary.
        """
        if size is not None:
            return {}
        return {name: {2: f'{name}_height', 3: f'{name}_width'}
                for name in [self.input_name, *self.output_names]}

    def info(self) -> Dict[str, Any]:
        """Task and thresholds of a whole model, for its file."""
        raise NotImplementedError

    def run(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Compute the outputs of the graph with the model itself."""
        raise NotImplementedError

    def exportable(self, size: Optional[Size], batch: int = 1) -> nn.Module:
        """Copy the modules into a form that can be traced.

        Quantizers still simulate: :func:`make_exportable` replaces them.

        Args:
            size (tuple[int, int], optional): Height and width of the images;
                None if they vary.
            batch (int): Number of images at once. Defaults to 1.

        Returns:
            nn.Module: Maps images to a tuple of outputs; in evaluation mode.
        """
        raise NotImplementedError

    def install(self, run: Run) -> None:
        """Make the model call ``run`` instead of its modules, in place."""
        raise NotImplementedError


class FunctionModule(nn.Module):
    """A module that calls a function, to be put into a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
