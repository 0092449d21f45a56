# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Trace a subgraph of a model, and write it as an ONNX graph."""
import inspect
import io
import warnings
from pathlib import Path
from typing import Any, Collection, Dict, List, Mapping, Optional

import numpy as np
import torch
from torch import nn

from psaq_mm.checkpoint import save_bytes
from psaq_mm.errors import UserError
from psaq_mm.runtime.packages import require_package

from .exportable_ops import make_exportable
from .exportable_quantizer import ExportableWeight
from .graph_ops import OPENVINO_DOMAIN, OPSET, PATCH_DOMAIN
from .subgraph import Size, Subgraph


def trace(subgraph: Subgraph, size: Optional[Size], target: str,
          float_roles: Collection[str] = (), batch: int = 1) -> Any:
    """Trace a subgraph of a model.

    Args:
        subgraph (Subgraph): Of a calibrated quantized model, or a float one.
        size (tuple[int, int], optional): Height and width of the images; None
            if they vary.
        target (str): ``onnx``, for QuantizeLinear and DequantizeLinear;
            ``tensorrt``, for the same around plain convolutions; or
            ``openvino``, for OpenVINO's FakeQuantize of activations.
        float_roles (Collection[str]): Roles whose quantizers are left out.
            Defaults to none.
        batch (int): Number of images at once. Defaults to 1.

    Returns:
        onnx.ModelProto: The graph.

    Raises:
        UserError: If onnx is not installed, or the model cannot be traced.
    """
    onnx = require_package('onnx')
    exportable = subgraph.exportable(size, batch)
    make_exportable(exportable, target, float_roles)
    height, width = size or subgraph.probe_size
    images = torch.zeros(batch, subgraph.channels, height, width)
    names = list(subgraph.output_names)
    buffer: Any = io.BytesIO()
    options: Dict[str, Any] = dict(
        opset_version=OPSET, input_names=[subgraph.input_name], output_names=names,
        dynamic_axes=subgraph.dynamic_axes(size),
        do_constant_folding=False)  # engines fold; files would grow
    if target == 'openvino':
        options['custom_opsets'] = {OPENVINO_DOMAIN: 1}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:  # True since torch 2.9
        options['dynamo'] = False
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')  # of sizes that become constants, as they should
            torch.onnx.export(exportable, (images, ), buffer, **options)
    except UserError:
        raise
    except Exception as error:  # heads are programs: they may raise anything
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{subgraph.modules} cannot be exported ({type(error).__name__}): '
                        f'{reason}') from error
    model = onnx.load_model_from_string(buffer.getvalue())
    _remove_identities(model)
    if target == 'onnx':
        _quantize_before_concat(model)  # first: inputs of a Scan's body are not seen by it
        _expand_patch_products(model)
    if target == 'tensorrt':
        _require_zero_points_of_zero(model)
    else:
        pack_small_weights(model, exportable)
    return model


def save_onnx(model: Any, path: Path, about: Mapping[str, str]) -> List[Path]:
    """Check a graph of standard operators with onnx's own checker, and write it.

    Args:
        model (onnx.ModelProto): A graph traced for ``onnx``.
        path (Path): The ``.onnx`` file.
        about (Mapping[str, str]): What to record in the file.

    Returns:
        list[Path]: The file.

    Raises:
        UserError: If the file cannot be written.
    """
    onnx = require_package('onnx')
    onnx.checker.check_model(model, full_check=True)
    onnx.helper.set_model_props(model, dict(about))
    save_bytes(model.SerializeToString(), path)
    return [path]


def zero_points(model: Any) -> Dict[str, np.ndarray]:
    """Zero points of a graph, by the name of the tensor that they quantize.

    Args:
        model (onnx.ModelProto): A graph of QuantizeLinear and DequantizeLinear.
    """
    onnx = require_package('onnx')
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    return {node.input[0]: onnx.numpy_helper.to_array(values[node.input[2]])
            for node in model.graph.node
            if node.op_type in ('QuantizeLinear', 'DequantizeLinear') and len(node.input) > 2}


def _require_zero_points_of_zero(model: Any) -> None:
    """Check that TensorRT will read the quantizers of a graph."""
    for name, values in zero_points(model).items():
        if values.any():
            raise UserError(f'{name} has a zero point that is not 0, which TensorRT does not '
                            "read; quantize with the base config psaq_mm::_base_/tensorrt.py, or "
                            'with quantization.activation.symmetric=True')


def pack_small_weights(model: Any, exportable: nn.Module) -> None:
    """Store weights of up to 4 bits two a byte, in place; an odd number stays in 8.

    The graph looks both up in a table of all bytes. That is a constant, which engines compute
    once, when they load the graph. Then they have 8-bit integers, for which they have kernels.
    ONNX has 4-bit types too, but for those onnxruntime and OpenVINO have no product with
    quantized inputs: they multiply in float, and round the inputs once more, to 8 bits of a
    range of their own [measured].

    Args:
        model (onnx.ModelProto): A traced graph.
        exportable (nn.Module): What was traced.
    """
    onnx = require_package('onnx')
    make, arrays = onnx.helper, onnx.numpy_helper
    small = {f'{name}.integers' for name, module in
             exportable.named_modules(remove_duplicate=False)
             if isinstance(module, ExportableWeight) and module.bits <= 4}
    pairs = np.stack([np.arange(256) & 15, np.arange(256) >> 4], 1)  # the first in the low half
    tables = {onnx.TensorProto.UINT8: pairs.astype(np.uint8),
              onnx.TensorProto.INT8: ((pairs + 8 & 15) - 8).astype(np.int8)}
    nodes: List[Any] = []
    constants: Dict[str, np.ndarray] = {}
    for tensor in [t for t in model.graph.initializer if t.name in small]:
        integers = arrays.to_array(tensor)
        if integers.size % 2:
            continue
        halves = integers.astype(np.uint8).reshape(-1, 2) & 15
        table, prefix = f'pairs_{tensor.data_type}', f'packed_{len(nodes)}'
        constants.update({table: tables[tensor.data_type],
                          f'{prefix}_bytes': halves[:, 0] | halves[:, 1] << 4,
                          f'{prefix}_shape': np.array(integers.shape)})
        nodes += [make.make_node('Cast', [f'{prefix}_bytes'], [f'{prefix}_places'],
                                 to=onnx.TensorProto.INT32),
                  make.make_node('Gather', [table, f'{prefix}_places'], [f'{prefix}_pairs']),
                  make.make_node('Reshape', [f'{prefix}_pairs', f'{prefix}_shape'],
                                 [tensor.name])]
        model.graph.initializer.remove(tensor)
    model.graph.initializer.extend(arrays.from_array(value, name)
                                   for name, value in constants.items())
    for node in reversed(nodes):  # before what reads them
        model.graph.node.insert(0, node)


def _remove_identities(model: Any) -> None:
    """Remove the Identity nodes by which torch shares equal constants."""
    constants = {tensor.name for tensor in model.graph.initializer}
    known: Dict[str, str] = {}
    for node in list(model.graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = known.get(name, name)
        if node.op_type == 'Identity' and node.input[0] in constants:
            known[node.output[0]] = node.input[0]
            model.graph.node.remove(node)


def _expand_patch_products(model: Any) -> None:
    """Replace each PatchProduct by standard operators: a Scan over the rows of
    the result, with Gather, DequantizeLinear and MatMul in its body."""
    onnx = require_package('onnx')
    make, kinds = onnx.helper, onnx.TensorProto
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for index, node in enumerate(list(model.graph.node)):
        if node.domain != PATCH_DOMAIN:
            continue
        q, places, scale, zero_point, weight, *weight_range = node.input
        prefix = f'{node.name}/row'

        def named(what: str, prefix: str = prefix) -> str:
            return f'{prefix}/{what}'

        length = onnx.numpy_helper.from_array(
            np.array([0, -1, shapes[weight][0]], dtype=np.int64), named('shape'))
        steps = [('Gather', [q, named('places')], 'patches', dict(axis=1)),
                 ('Reshape', [named('patches'), named('shape')], 'matrix', {}),
                 ('DequantizeLinear', [named('matrix'), scale, zero_point], 'real', {}),
                 ('DequantizeLinear', [weight, *weight_range], 'weight', dict(axis=1)),
                 ('MatMul', [named('real'), named('weight')], 'product', {})]
        body = make.make_graph(
            [make.make_node(kind, inputs, [named(output)], name=f'{prefix}/{kind}_{output}',
                            **attributes) for kind, inputs, output, attributes in steps],
            prefix, [make.make_tensor_value_info(named('places'), kinds.INT64, [None])],
            [make.make_tensor_value_info(named('product'), kinds.FLOAT, [None] * 3)], [length])
        scan = make.make_node('Scan', [places], list(node.output), name=f'{node.name}/Scan',
                              body=body, num_scan_inputs=1, scan_output_axes=[1])
        model.graph.node.remove(node)
        model.graph.node.insert(index, scan)
    for entry in list(model.opset_import):
        if entry.domain == PATCH_DOMAIN:
            model.opset_import.remove(entry)


def _quantize_before_concat(model: Any) -> None:
    """Move QuantizeLinear from the result of a Concat to its inputs.

    The numbers stay the same, and the Concat moves a quarter of the bytes.
    """
    onnx = require_package('onnx')
    makers = {name: node for node in model.graph.node for name in node.output}
    uses: Dict[str, int] = {}
    for name in [n for node in model.graph.node for n in node.input] \
            + [output.name for output in model.graph.output]:
        uses[name] = uses.get(name, 0) + 1
    for node in list(model.graph.node):
        concat = makers.get(node.input[0]) if node.op_type == 'QuantizeLinear' else None
        if concat is None or concat.op_type != 'Concat' or uses[concat.output[0]] != 1:
            continue
        place = list(model.graph.node).index(concat)
        result = node.output[0]
        model.graph.node.remove(node)
        quantized = [onnx.helper.make_node(
            'QuantizeLinear', [name, *node.input[1:]], [f'{result}_{number}'],
            name=f'{node.name}_{number}') for number, name in enumerate(concat.input)]
        for new in reversed(quantized):
            model.graph.node.insert(place, new)
        del concat.input[:]
        concat.input.extend(new.output[0] for new in quantized)
        concat.output[0] = result
