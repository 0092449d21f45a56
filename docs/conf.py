# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Settings of the site: ``make docs`` builds it into docs/_build."""
from typing import Any, List

import psaq_mm

project = 'psaq_mm'
author = 'psaq_mm contributors'
copyright = author
version = release = psaq_mm.__version__

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode',
              'sphinx_copybutton']
exclude_patterns = ['_build']

# Pages are read on GitHub too: anchors are made as there, and commands stay comments.
myst_heading_anchors = 4
myst_links_external_new_tab = False

highlight_language = 'text'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # docstrings have them
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = 'furo'
html_title = f'psaq_mm {release}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_show_copyright = False
html_theme_options = dict(sidebar_hide_name=False)


def literal_examples(app: Any, what: str, name: str, obj: Any, options: Any,
                     lines: List[str]) -> None:
    """Show indented examples of docstrings as code, not as quotations."""
    for i in range(len(lines) - 1, 1, -1):
        if lines[i].startswith('    ') and not lines[i - 1] and lines[i - 2] \
                and not lines[i - 2].startswith(' '):
            lines[i:i] = ['::', '']


def setup(app: Any) -> None:
    """Before napoleon reads the sections."""
    app.connect('autodoc-process-docstring', literal_examples, priority=400)
