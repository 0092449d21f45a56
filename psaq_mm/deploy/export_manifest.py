# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The file that describes a folder of exported graphs, and checks it by digests."""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Union

from psaq_mm.checkpoint import save_bytes
from psaq_mm.errors import UserError

MANIFEST = 'export.json'
"""Name of the file."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Serialize a manifest, with the SHA-256 of the rest of it as its last key."""

    def serialize(content: Mapping[str, Any]) -> bytes:
        return (json.dumps(content, indent=2, allow_nan=False) + '\n').encode()

    content = {key: value for key, value in manifest.items() if key != 'sha256'}
    return serialize({**content, 'sha256': hashlib.sha256(serialize(content)).hexdigest()})


def write_export(manifest: Mapping[str, Any], folder: Union[str, Path]) -> None:
    """Write ``export.json``.

    Args:
        manifest (Mapping): What it says; ``graphs`` is a list of dicts with
            ``file``, ``size``, and in ``sha256`` the digest of each file.
        folder (str or Path): The folder of the graphs.
    """
    save_bytes(_sealed(manifest), Path(folder) / MANIFEST)


def read_export(folder: Union[str, Path]) -> Dict[str, Any]:
    """Read ``export.json``, and check it and all files that it lists.

    Args:
        folder (str or Path): What :func:`export_graphs` wrote.

    Returns:
        dict: What ``export.json`` says.

    Raises:
        UserError: If a file is missing or damaged.
    """
    path = Path(folder) / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); tools/export.py writes such '
                        'a folder') from error
    try:
        manifest = json.loads(data)
        intact = data == _sealed(manifest)
    except (ValueError, AttributeError, RecursionError):  # no JSON, or no object
        intact = False
    if not intact:
        raise UserError(f'{path} is damaged, or written by an older version; export again')
    for graph in manifest['graphs']:
        for name, digest in graph['sha256'].items():
            file = path.with_name(name)
            try:
                found = file_digest(file)
            except OSError as error:
                raise UserError(f'{file} cannot be read ({error.strerror}); export again') \
                    from error
            if found != digest:
                raise UserError(f'{file} is damaged: its SHA-256 is not that in {MANIFEST}; '
                                'export again')
    return dict(manifest)
