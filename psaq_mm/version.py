# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The version of psaq_mm, alone in a file so that setup.py can read it."""
__version__ = '0.3.0'
