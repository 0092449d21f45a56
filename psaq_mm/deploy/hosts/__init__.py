# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One file for each host library: what becomes a graph there."""
import importlib

from torch import nn

from psaq_mm.adapters import find_adapter

from ..graph_part import GraphPart

PARTS = dict(OpenMMLabSwinAdapter=('openmmlab', 'OpenMMLabPart'),
             TimmSwinAdapter=('timm_models', 'TimmSwinPart'),
             TimmViTAdapter=('timm_models', 'TimmViTPart'))
"""Name of an adapter, or of a base of it -> file and class of this folder."""


def graph_part(model: nn.Module) -> GraphPart:
    """The part of a model that becomes a graph.

    Raises:
        UserError: If no adapter serves the model.
    """
    adapter = find_adapter(model)
    file, name = next(PARTS[cls.__name__] for cls in type(adapter).__mro__
                      if cls.__name__ in PARTS)
    part: GraphPart = getattr(importlib.import_module(f'{__name__}.{file}'), name)(model)
    return part
