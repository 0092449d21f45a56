# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The exported part of each host's models, one file for each host library."""
import importlib

from torch import nn

from psaq_mm.adapters import find_adapter
from psaq_mm.errors import UserError

from ..subgraph import Subgraph

SUBGRAPHS = dict(
    OpenMMLabSwinAdapter=dict(features=('openmmlab', 'OpenMMLabSubgraph'),
                              model=('whole', 'whole_openmmlab')),
    TimmSwinAdapter=dict(features=('timm_models', 'TimmSwinSubgraph'),
                         model=('whole', 'WholeTimmSwin')),
    TimmViTAdapter=dict(features=('timm_models', 'TimmSubgraph'), model=('whole', 'WholeTimm')))
"""Name of an adapter, or of a base of it -> part -> file and class in this folder."""

PARTS = ('model', 'features')
"""What can be exported: all of a model, from pixels to results; or what computes features and
scores of normalized images, while the host does the rest."""


def find_subgraph(model: nn.Module, part: str = 'features') -> Subgraph:
    """Find the part of a model that is exported as one graph.

    Args:
        model (nn.Module): A float or quantized model; not changed.
        part (str): One of :data:`PARTS`. Defaults to ``features``.

    Returns:
        Subgraph: The part.

    Raises:
        UserError: If no adapter serves the model, or a part of it cannot be exported.
    """
    if part not in PARTS:
        raise UserError(f'--part must be one of {", ".join(PARTS)}, got {part!r}')
    file, name = next(SUBGRAPHS[cls.__name__][part] for cls in type(find_adapter(model)).__mro__
                      if cls.__name__ in SUBGRAPHS)
    found: Subgraph = getattr(importlib.import_module(f'{__name__}.{file}'), name)(model)
    return found
