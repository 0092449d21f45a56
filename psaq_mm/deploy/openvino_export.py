# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A traced graph as OpenVINO's own two files."""
import tempfile
from pathlib import Path
from typing import Any, Mapping

from psaq_mm.checkpoint import save_bytes

from .packages import require_package


def save_openvino(model: Any, path: Path, about: Mapping[str, str]) -> int:
    """Convert a graph and write ``path`` (.xml) and the weights beside it (.bin).

    Args:
        model (onnx.ModelProto): Traced for ``openvino``.
        path (Path): The ``.xml`` file.
        about (Mapping[str, str]): Recorded in the file.

    Returns:
        int: Bytes of both files.

    Raises:
        UserError: If OpenVINO is not installed or a file cannot be written.
    """
    openvino = require_package('openvino')
    graph = openvino.Core().read_model(model.SerializeToString())
    for key, value in about.items():
        graph.set_rt_info(value, ['psaq_mm', key])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'graph.xml'
        # In float32: halves would not be the numbers of the checkpoint.
        openvino.save_model(graph, str(file), compress_to_fp16=False)
        xml, weights = file.read_bytes(), file.with_suffix('.bin').read_bytes()
    save_bytes(weights, path.with_suffix('.bin'))
    save_bytes(xml, path)  # last: what is looked for
    return len(xml) + len(weights)
