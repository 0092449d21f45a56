# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A traced graph as OpenVINO's own two files."""
import tempfile
from pathlib import Path
from typing import Any, Mapping

import numpy as np

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
    _transpose_within_matmuls(graph)
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


def _transpose_within_matmuls(graph: Any) -> None:
    """Let products with transposed keys transpose them themselves.

    ONNX's MatMul cannot, so torch writes one Transpose that parts the heads and
    turns the keys over; OpenVINO runs it apart from the attention, and several
    times slower than one that only parts the heads [measured].
    """
    from openvino import opset8
    for node in graph.get_ordered_ops():
        if node.get_type_name() != 'MatMul':
            continue
        turned = node.input_value(1).get_node()
        if turned.get_type_name() != 'Transpose':
            continue
        order = turned.input_value(1).get_node()
        if order.get_type_name() != 'Constant' or list(order.get_vector()) != [0, 2, 3, 1]:
            continue
        heads = opset8.transpose(turned.input_value(0), np.array([0, 2, 1, 3]))
        product = opset8.matmul(node.input_value(0), heads, False, True)
        product.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(product.output(0))
