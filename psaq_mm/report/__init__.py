# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run did, as one page for people: pictures of what ``report.json`` holds."""
from .comparison import compare_page, differences
from .page import report_page
from .reading import Run, read_run

__all__ = ['Run', 'compare_page', 'differences', 'read_run', 'report_page']
