# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The exported part of each host's models, one file for each host library."""
import importlib

from torch import nn

from psaq_mm.adapters import find_adapter

from ..subgraph import Subgraph

SUBGRAPHS = dict(OpenMMLabSwinAdapter=('openmmlab', 'OpenMMLabSubgraph'),
                 TimmSwinAdapter=('timm_models', 'TimmSwinSubgraph'),
                 TimmViTAdapter=('timm_models', 'TimmSubgraph'))
"""Name of an adapter, or of a base of it -> file and class in this folder."""


def find_subgraph(model: nn.Module) -> Subgraph:
    """Find the part of a model that is exported as one graph.

    Args:
        model (nn.Module): A float or quantized model; not changed.

    Returns:
        Subgraph: The part.

    Raises:
        UserError: If no adapter serves the model.
    """
    file, name = next(SUBGRAPHS[cls.__name__] for cls in type(find_adapter(model)).__mro__
                      if cls.__name__ in SUBGRAPHS)
    found: Subgraph = getattr(importlib.import_module(f'{__name__}.{file}'), name)(model)
    return found
