# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write a traced graph in OpenVINO's format."""
import tempfile
from pathlib import Path
from typing import Any, List, Mapping

import numpy as np

from psaq_mm.checkpoint import save_bytes
from psaq_mm.runtime.packages import require_package


def save_openvino(model: Any, path: Path, about: Mapping[str, str]) -> List[Path]:
    """Convert a graph and write the ``.xml`` file and the weights beside it.

    Args:
        model (onnx.ModelProto): A graph traced for ``openvino``.
        path (Path): The ``.xml`` file.
        about (Mapping[str, str]): What to record in the file.

    Returns:
        list[Path]: The two files.

    Raises:
        UserError: If OpenVINO is not installed or a file cannot be written.
    """
    openvino = require_package('openvino')
    graph = openvino.Core().read_model(model.SerializeToString())
    _transpose_within_matmuls(graph)
    if about.get('model_info model_type') == 'ssd':
        _add_batch_axis(graph)
    for key, value in about.items():
        # Keys of the Model API have a place of their own.
        graph.set_rt_info(value, key.split(' ') if ' ' in key else ['psaq_mm', key])
    # Where a weight alone is quantized OpenVINO would round the input to 8 bits, unasked.
    graph.set_rt_info('0', ['runtime_options', 'DYNAMIC_QUANTIZATION_GROUP_SIZE'])
    files = [path.with_suffix('.bin'), path]  # the .xml last: it is what users look for
    with tempfile.TemporaryDirectory() as folder:
        # In float32: float16 would change the numbers of the checkpoint.
        openvino.save_model(graph, str(Path(folder) / path.name), compress_to_fp16=False)
        for file in files:
            save_bytes((Path(folder) / file.name).read_bytes(), file)
    return files


def _add_batch_axis(graph: Any) -> None:
    """Give all outputs a first axis of 1: so the Model API wants those of a detector of boxes."""
    from openvino import opset8
    for result in graph.get_results():
        source = result.input_value(0)
        names = source.get_names()
        source.get_tensor().set_names(set())
        batched = opset8.unsqueeze(source, np.array(0))
        batched.output(0).get_tensor().set_names(names)
        result.input(0).replace_source_output(batched.output(0))
    graph.validate_nodes_and_infer_types()


def _transpose_within_matmuls(graph: Any) -> None:
    """Let the product with the keys transpose them itself.

    ONNX's MatMul cannot, so torch writes one Transpose that separates the heads
    and transposes the keys. OpenVINO runs that outside of the fused attention,
    several times slower than one that only separates the heads [measured].
    """
    from openvino import opset8
    for node in graph.get_ordered_ops():
        if node.get_type_name() != 'MatMul':
            continue
        keys = node.input_value(1).get_node()
        if keys.get_type_name() != 'Transpose':
            continue
        order = keys.input_value(1).get_node()
        if order.get_type_name() != 'Constant' or list(order.get_vector()) != [0, 2, 3, 1]:
            continue
        heads = opset8.transpose(keys.input_value(0), np.array([0, 2, 1, 3]))
        product = opset8.matmul(node.input_value(0), heads, False, True)
        product.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(product.output(0))
