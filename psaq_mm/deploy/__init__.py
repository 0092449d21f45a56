# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export to formats that engines run, and run models with these engines."""
from psaq_mm.runtime.engines import ENGINES, FORMATS, Engine
from psaq_mm.runtime.export_manifest import read_export

from .agreement import ExportError
from .export import export_graphs
from .graphs import Graphs

__all__ = ['ENGINES', 'FORMATS', 'Engine', 'ExportError', 'Graphs', 'export_graphs', 'read_export']
