# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Import the optional packages of deployment when they are used."""
import importlib
from typing import Any

from psaq_mm.errors import UserError


def require_package(name: str) -> Any:
    """Import a package that only deployment needs.

    Args:
        name (str): ``onnx``, ``onnxruntime`` or ``openvino``.

    Returns:
        module: The package.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f'{name} is not installed ({error}); export and engines need it: '
                        "in psaq_mm's folder, pip install --no-build-isolation '.[deploy]'") \
            from error
