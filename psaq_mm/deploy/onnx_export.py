# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A traced part of a model as an ONNX graph."""
import inspect
import io
import warnings
from typing import Any, Collection, Dict, Mapping, Optional

import numpy as np
import torch
from torch import nn

from psaq_mm.errors import UserError

from .export_forms import WeightForm, use_export_forms
from .graph_ops import OPENVINO_DOMAIN, OPSET, OWN_DOMAIN
from .graph_part import GraphPart, Size
from .packages import require_package

INT4_OPSET = 21
"""The first with 4-bit integers in QuantizeLinear and DequantizeLinear."""


def trace(part: GraphPart, size: Optional[Size], target: str,
          float_roles: Collection[str] = (), batch: int = 1) -> Any:
    """Trace a part of a model.

    Args:
        part (GraphPart): Of a calibrated model, or a float one.
        size (tuple[int, int], optional): Height and width of the images; None
            if they vary.
        target (str): ``onnx``: QuantizeLinear and DequantizeLinear;
            ``openvino``: FakeQuantize of OpenVINO for activations.
        float_roles (Collection[str]): Roles whose quantizers are left out.
            Defaults to none.
        batch (int): Images at once. Defaults to 1.

    Returns:
        onnx.ModelProto: The graph.

    Raises:
        UserError: If onnx is not installed, or the part cannot be traced.
    """
    onnx = require_package('onnx')
    form = part.export_form(size, batch)
    use_export_forms(form, target, float_roles)
    height, width = size or (224, 224)
    images = torch.zeros(batch, part.channels, height, width)
    names = list(part.output_names)
    dynamic = None
    if size is None:
        dynamic = {name: {2: f'{name}_height', 3: f'{name}_width'}
                   for name in [part.input_name, *names]}
    buffer: Any = io.BytesIO()
    options: Dict[str, Any] = dict(
        opset_version=OPSET, input_names=[part.input_name], output_names=names,
        dynamic_axes=dynamic, do_constant_folding=False)  # engines fold; files would grow
    if target == 'openvino':
        options['custom_opsets'] = {OPENVINO_DOMAIN: 1}
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:  # True since torch 2.9
        options['dynamo'] = False
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter('ignore')  # of sizes that become constants, as they should
            torch.onnx.export(form, (images, ), buffer, **options)
    except UserError:
        raise
    except Exception as error:  # heads are programs: anything may be raised
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'{part.name} cannot be exported ({type(error).__name__}): {reason}') \
            from error
    model = onnx.load_model_from_string(buffer.getvalue())
    _name_directly(model)
    if target == 'onnx':
        _quantize_before_concat(model)  # first: what a Scan takes from around it is no input
        _write_out_patch_products(model)
    _pack_small_weights(model, form)
    return model


def _pack_small_weights(model: Any, form: nn.Module) -> None:
    """Store weights of 4 bits and fewer in ONNX's own 4-bit types."""
    onnx = require_package('onnx')
    small = {}
    for name, module in form.named_modules():
        if isinstance(module, WeightForm) and module.bits <= 4:
            for key in ('integers', 'zero_point'):
                small[f'{name}.{key}'] = module
    packed = False
    for tensor in model.graph.initializer:
        if tensor.name not in small:
            continue
        signed = small[tensor.name].zero_point is None
        kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
        values = onnx.numpy_helper.to_array(tensor)
        slots = np.append(values.flatten(), np.zeros(values.size % 2)).astype(np.int8) & 15
        halves = slots.astype(np.uint8).reshape(-1, 2)  # the first in the low half
        data = (halves[:, 0] | halves[:, 1] << 4).tobytes()
        tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, kind, list(values.shape), data,
                                                raw=True))
        packed = True
    if packed:
        _raise_opset(model)


def _raise_opset(model: Any) -> None:
    """Bring a graph of opset 17 to that of 4-bit integers. Of the operators that
    torch writes, reductions and splits differ; onnx's own converter does not
    take graphs with operators of OpenVINO."""
    onnx = require_package('onnx')
    for node in model.graph.node:
        axes = next((a for a in node.attribute if a.name == 'axes'), None)
        if node.op_type.startswith('Reduce') and axes is not None:
            name = f'{node.output[0]}_axes'
            model.graph.initializer.append(onnx.numpy_helper.from_array(
                np.array(axes.ints, dtype=np.int64), name))
            node.input.append(name)
            node.attribute.remove(axes)
        if node.op_type == 'Split' and len(node.input) == 1:
            node.attribute.append(onnx.helper.make_attribute('num_outputs', len(node.output)))
    for entry in model.opset_import:
        if entry.domain == '':
            entry.version = INT4_OPSET


def _name_directly(model: Any) -> None:
    """Take out the Identity nodes by which torch shares equal constants."""
    constants = {tensor.name for tensor in model.graph.initializer}
    known: Dict[str, str] = {}
    for node in list(model.graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = known.get(name, name)
        if node.op_type == 'Identity' and node.input[0] in constants:
            known[node.output[0]] = node.input[0]
            model.graph.node.remove(node)


def _write_out_patch_products(model: Any) -> None:
    """Write convolutions that are products of matrices as a Scan over the rows of
    their result: Gather, DequantizeLinear, MatMul."""
    onnx = require_package('onnx')
    make, kinds = onnx.helper, onnx.TensorProto
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    for index, node in enumerate(list(model.graph.node)):
        if node.domain != OWN_DOMAIN:
            continue
        q, places, scale, zero_point, weight, *weight_range = node.input
        own = f'{node.name}/row'

        def named(what: str, own: str = own) -> str:
            return f'{own}/{what}'

        length = onnx.numpy_helper.from_array(
            np.array([0, -1, shapes[weight][0]], dtype=np.int64), named('shape'))
        steps = [('Gather', [q, named('places')], 'patches', dict(axis=1)),
                 ('Reshape', [named('patches'), named('shape')], 'matrix', {}),
                 ('DequantizeLinear', [named('matrix'), scale, zero_point], 'real', {}),
                 ('DequantizeLinear', [weight, *weight_range], 'weight', dict(axis=1)),
                 ('MatMul', [named('real'), named('weight')], 'product', {})]
        body = make.make_graph(
            [make.make_node(kind, inputs, [named(output)], name=f'{own}/{kind}_{output}',
                            **attributes) for kind, inputs, output, attributes in steps],
            own, [make.make_tensor_value_info(named('places'), kinds.INT64, [None])],
            [make.make_tensor_value_info(named('product'), kinds.FLOAT, [None] * 3)], [length])
        scan = make.make_node('Scan', [places], list(node.output), name=f'{node.name}/Scan',
                              body=body, num_scan_inputs=1, scan_output_axes=[1])
        model.graph.node.remove(node)
        model.graph.node.insert(index, scan)
    for entry in list(model.opset_import):
        if entry.domain == OWN_DOMAIN:
            model.opset_import.remove(entry)


def _quantize_before_concat(model: Any) -> None:
    """Let integers be put together, not the floats that they are made of: a
    quarter of the bytes. The numbers are the same."""
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
        parts = []
        for number, name in enumerate(concat.input):
            parts.append(onnx.helper.make_node(
                'QuantizeLinear', [name, *node.input[1:]], [f'{result}_{number}'],
                name=f'{node.name}_{number}'))
        for part in reversed(parts):
            model.graph.node.insert(place, part)
        del concat.input[:]
        concat.input.extend(part.output[0] for part in parts)
        concat.output[0] = result


def check_onnx(model: Any) -> None:
    """Run onnx's own checker on a graph of standard operators."""
    onnx = require_package('onnx')
    onnx.checker.check_model(model, full_check=True)


def describe_onnx(model: Any, about: Mapping[str, str]) -> None:
    """Record where a graph came from, in its own metadata."""
    onnx = require_package('onnx')
    onnx.helper.set_model_props(model, dict(about))
