# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export to the formats that engines run, and the engines in a model's place."""
from .engines import ENGINES, Engine
from .export import export_graphs
from .graphs import Graphs, read_export

__all__ = ['ENGINES', 'Engine', 'Graphs', 'export_graphs', 'read_export']
