# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Export neither depends on the device and the mode of a model nor changes it."""
from types import SimpleNamespace

import pytest
import torch
from demo_models import demo_model
from small_models import swin
from torch import nn
from torch._subclasses import FakeTensorMode

from psaq_mm.deploy import Graphs, export, export_graphs
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.subgraph import Subgraph
from psaq_mm.ops import named_quant_ops, set_quantization

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

SIZE = (64, 96)


def snapshot(model):
    """All that export must leave as it is."""
    return ({k: v.clone() for k, v in model.state_dict().items()},
            [(m.training, tuple(m._forward_hooks), tuple(m._forward_pre_hooks),
              [id(p) for p in m._parameters.values()]) for m in model.modules()],
            [(p.device, p.dtype, p.requires_grad) for p in model.parameters()])


def same(one, other):
    return one[0].keys() == other[0].keys() and one[1:] == other[1:] \
        and all(torch.equal(one[0][key], other[0][key]) for key in one[0])


@pytest.mark.parametrize('name', ['mask_rcnn_swin', 'upernet_swin'])
def test_mode(tmp_path, name):
    """A model in train mode gives the graph and the parity of one in evaluation mode."""
    model = demo_model(name, scope='model').eval()
    expected = export_graphs(model, tmp_path / 'eval', 'onnx', [SIZE])
    model.train()
    model.backbone.eval()  # modes may differ from module to module
    model.backbone.patch_embed.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    got = export_graphs(model, tmp_path / 'train', 'onnx', [SIZE])
    assert same(before, snapshot(model))
    assert got == expected
    graphs = Graphs(tmp_path / 'train', 'onnxruntime')
    assert find_subgraph(model).output_names == tuple(got['output_names'])
    assert same(before, snapshot(model))
    norms = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}
    graphs.install(model)
    after = model.state_dict()
    assert all(torch.equal(after[key], norms[key]) for key in norms if key in after)
    assert model.training


def test_bare_backbone(tmp_path):
    """mmdet's Swin Transformer alone, whose ``eval()`` returns nothing."""
    model = swin()
    assert model.eval() is None
    graphs = export_graphs(model, tmp_path, 'onnx', [SIZE])['graphs']
    assert [row['sqnr_db'] is None or row['sqnr_db'] > 90
            for row in graphs[0]['parity']['outputs']] == [True] * len(model.out_indices)


def test_dtype(tmp_path):
    """Half precision is exported as float32: engines run no half on a CPU."""
    model = demo_model('swin', quantized=False).half()
    before = snapshot(model)
    manifest = export_graphs(model, tmp_path, 'onnx')
    assert same(before, snapshot(model))
    assert all(row['sqnr_db'] is None or row['sqnr_db'] > 80
               for row in manifest['graphs'][0]['parity']['outputs'])


class Traced(Exception):
    """Raised where tracing would begin."""


@pytest.mark.parametrize('name', ['mask_rcnn_swin', 'upernet_swin', 'swin'])
def test_device(tmp_path, monkeypatch, name):
    """A model on CUDA, made of fake tensors: an operation that mixes devices raises."""
    model = demo_model(name, scope='model')
    # They look at values, which fake tensors do not have.
    set_quantization(model, False)
    monkeypatch.setattr(Subgraph, 'channels', 3)
    modules = {m for root in [model, *(op.float_module for _, op in named_quant_ops(model))]
               for m in root.modules()}
    if name == 'mask_rcnn_swin':  # its real tensors cannot be copied among fake ones
        model.rpn_head.prior_generator = None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            torch.zeros(1).to('cuda')
        except RuntimeError:
            pytest.skip('this torch looks for a driver, even of fake tensors')
        fakes = {}

        def on_cuda(tensor):
            if tensor not in fakes:
                fake = mode.from_tensor(tensor.detach()).to('cuda')
                fakes[tensor] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
            return fakes[tensor]

        for module in modules:
            for tensors in (module._parameters, module._buffers):
                tensors.update({k: on_cuda(v) for k, v in tensors.items() if v is not None})
        assert {p.device.type for p in model.parameters()} == {'cuda'}
        names = find_subgraph(model).output_names  # runs the model where it is

        def trace(subgraph, size, *args):
            assert subgraph.output_names == names
            copied = subgraph.model
            assert {t.device.type for t in [*copied.parameters(), *copied.buffers()]} == {'cpu'}
            outputs = subgraph.run(torch.zeros(1, 3, *(size or SIZE)))
            assert {output.device.type for output in outputs} == {'cpu'}
            raise Traced

        monkeypatch.setattr(export, 'trace', trace)
        # So does the range of pixels.
        monkeypatch.setattr(export, 'find_adapter', lambda model: SimpleNamespace(
            valid_range=lambda model: (None, None), taken_size=lambda model, size: size))
        with pytest.raises(Traced):
            export_graphs(model, tmp_path, 'onnx')
        assert {p.device.type for p in model.parameters()} == {'cuda'}
