# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The bits that were chosen, as a picture and as a config."""
import io
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from small_models import swin

import psaq_mm
from psaq_mm import Recipe
from psaq_mm.engine import read_recipe
from psaq_mm.engine.hooks.bits_hook import bits_config, bits_picture
from psaq_mm.engine.hooks.report_hook import describe_allocation
from psaq_mm.student import Allocator, TensorGroup


@pytest.fixture(scope='module')
def allocation():
    settings = Recipe.shipped('w4a4').changed(dict(quantization=dict(
        mean_bits=3, channel_limit=None, overrides={'*.ffn.*': dict(weight=dict(margin=0.5))})))
    allocator = Allocator(swin(), settings.quantization)
    return allocator.choose([
        TensorGroup((tensor, ), 10, {bits: (1 + 7 * index % 5) * 4. ** -bits for bits in specs})
        for index, (tensor, specs) in enumerate(allocator.specs.items())])


def test_config_gives_the_same_bits(allocation, tmp_path):
    (tmp_path / 'base.py').write_text(
        "recipe = 'w4a4'\nmodel = dict()\nquantization = dict(mean_bits=3, channel_limit=None, "
        "overrides={'*.ffn.*': dict(weight=dict(margin=0.5))})\n")
    (tmp_path / 'bits.py').write_text(bits_config('./base.py', 'mean_bits=3', allocation))
    assert read_recipe(Config.fromfile(str(tmp_path / 'base.py'))).quantization.mean_bits == 3
    found = read_recipe(Config.fromfile(str(tmp_path / 'bits.py'))).quantization
    assert found == allocation.settings
    assert 'attn.w_msa.qkv' in (tmp_path / 'bits.py').read_text()


def test_picture(allocation):
    assert Image.open(io.BytesIO(bits_picture(allocation, 'mean_bits=3'))).size[0] == 1600


def test_report(allocation):
    recipe = Recipe().changed(dict(quantization=dict(mean_bits=3)))
    pipeline = SimpleNamespace(allocation=allocation, measured=0.25, recipe=recipe)
    report = describe_allocation(SimpleNamespace(pipeline=pipeline))['allocation']
    assert report['budget'] == 'mean_bits=3' and report['measured'] == 0.25
    assert report['weights'] <= 3 and report['activations'] <= 4
    entry = report['groups'][0]
    assert entry['tensors'] == [['patch_embed.projection', 'weight']] and entry['bits'] == 8
    pipeline.allocation = None
    assert describe_allocation(SimpleNamespace(pipeline=pipeline)) == {}


def test_quantize_resumes_with_what_was_measured(tmp_path, monkeypatch):
    recipe = Recipe().changed(dict(
        quantization=dict(mean_bits=4, channel_limit=None, candidate_bits=[2, 4, 8]),
        synthesis=dict(num_images=2, steps=1, image_size=56)))
    model = swin(depths=(1, 1), num_heads=(1, 1))
    file = tmp_path / 'state.pth'
    first = psaq_mm.quantize(model, recipe, state_file=file)
    monkeypatch.setattr(Allocator, 'measure', None)  # not called
    second = psaq_mm.quantize(model, recipe, state_file=file, resume=True)
    state, again = first.state_dict(), second.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    bits = {op.weight_quantizer.spec.bits for _, op in psaq_mm.ops.named_quant_ops(first)
            if op.weight_quantizer is not None}
    assert len(bits) > 1
