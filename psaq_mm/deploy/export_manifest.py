# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write the file that describes a folder of exported graphs."""
from pathlib import Path
from typing import Any, Mapping, Union

from psaq_mm.checkpoint import save_bytes
from psaq_mm.runtime.export_manifest import MANIFEST, sealed


def write_export(manifest: Mapping[str, Any], folder: Union[str, Path]) -> None:
    """Write ``export.json``.

    Args:
        manifest (Mapping): What it says; ``graphs`` is a list of dicts with
            ``file``, ``size``, and in ``sha256`` the digest of each file.
        folder (str or Path): The folder of the graphs.
    """
    save_bytes(sealed(manifest), Path(folder) / MANIFEST)
