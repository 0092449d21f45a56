# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The file that describes a folder of exported graphs, and checks it by digests."""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Union

from psaq_mm.errors import UserError

MANIFEST = 'export.json'
"""Name of the file."""


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Serialize a manifest, with the SHA-256 of the rest of it as its last key."""

    def serialize(content: Mapping[str, Any]) -> bytes:
        return (json.dumps(content, indent=2, allow_nan=False) + '\n').encode()

    content = {key: value for key, value in manifest.items() if key != 'sha256'}
    return serialize({**content, 'sha256': hashlib.sha256(serialize(content)).hexdigest()})


def read_export(folder: Union[str, Path], file: Optional[str] = None) -> Dict[str, Any]:
    """Read ``export.json``, and check it and the files that it lists.

    Args:
        folder (str or Path): What ``tools/export.py`` wrote.
        file (str, optional): Check the files of this graph alone. Defaults to None: all.

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
        intact = data == sealed(manifest)
    except (ValueError, AttributeError, RecursionError):  # no JSON, or no object
        intact = False
    if not intact:
        raise UserError(f'{path} is damaged, or written by an older version; export again')
    for graph in manifest['graphs']:
        if file is not None and graph['file'] != file:
            continue
        for name, digest in graph['sha256'].items():
            listed = path.with_name(name)
            try:
                found = file_digest(listed)
            except OSError as error:
                raise UserError(f'{listed} cannot be read ({error.strerror}); export again') \
                    from error
            if found != digest:
                raise UserError(f'{listed} is damaged: its SHA-256 is not that in {MANIFEST}; '
                                'export again')
    return dict(manifest)
