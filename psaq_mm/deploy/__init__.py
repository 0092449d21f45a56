# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export to formats that engines run, and run models with these engines."""
from .engines import ENGINES, FORMATS, Engine
from .export import export_graphs
from .export_manifest import read_export
from .graphs import Graphs

__all__ = ['ENGINES', 'FORMATS', 'Engine', 'Graphs', 'export_graphs', 'read_export']
