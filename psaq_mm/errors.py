# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input: a file, a config key or a model that cannot be used.

    The message is one or two lines that name the file or key, say what was
    expected and what to do. The command-line tools print it without a
    traceback and exit with status 2; from Python it is an ordinary
    ``ValueError``.
    """
