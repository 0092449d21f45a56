# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The bits that were chosen, as a picture and as a config."""
import io
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from small_models import swin

import psaq_mm
from psaq_mm import Recipe, pipeline
from psaq_mm.engine import load_config, read_recipe
from psaq_mm.engine.hooks.bits_hook import BitsHook, bits_config, bits_picture
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


def test_config_in_the_work_dir_has_the_options(allocation, tmp_path):
    """The file itself lacks them, and stays as it is."""
    text = "recipe = 'w4a4'\nmodel = dict()\nquantization = dict(channel_limit=None, " \
        "overrides={'*.ffn.*': dict(weight=dict(margin=0.5))})\n"
    (tmp_path / 'mine.py').write_text(text)
    config = load_config(tmp_path / 'mine.py', {'quantization.mean_bits': 3,
                                                'synthesis.steps': 7})
    recipe = read_recipe(config)
    runner = SimpleNamespace(
        cfg=config, work_dir=str(tmp_path), logger=logging.getLogger(),
        pipeline=SimpleNamespace(allocation=allocation, recipe=recipe))
    BitsHook().after_quantize(runner)
    assert runner.bits_picture.size == Image.open(tmp_path / 'bits.png').size
    found = read_recipe(load_config(tmp_path / 'mine_bits.py'))
    assert found == replace(recipe, quantization=allocation.settings)
    assert found.synthesis.steps == 7 and (tmp_path / 'mine.py').read_text() == text


def test_picture(allocation):
    assert Image.open(io.BytesIO(bits_picture(allocation, 'mean_bits=3'))).size[0] == 1600


def test_report(allocation):
    recipe = Recipe().changed(dict(quantization=dict(mean_bits=3)))
    run = SimpleNamespace(allocation=allocation, measured=0.25, recipe=recipe)
    report = describe_allocation(SimpleNamespace(pipeline=run))['allocation']
    assert report['budget'] == 'mean_bits=3' and report['measured'] == 0.25
    assert report['weights'] <= 3 and report['activations'] <= 4
    entry = report['groups'][0]
    assert entry['tensors'] == [['patch_embed.projection', 'weight']] and entry['bits'] == 8
    run.allocation = None
    assert describe_allocation(SimpleNamespace(pipeline=run)) == {}


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


@pytest.mark.parametrize('error, level', [(0.0199, logging.INFO), (0.0201, logging.WARNING)])
def test_prediction_is_checked_on_images_that_nothing_has_seen(monkeypatch, error, level):
    recipe = Recipe().changed(dict(
        quantization=dict(max_drop=2, channel_limit=None, candidate_bits=[4, 8]),
        synthesis=dict(num_images=1, steps=1, image_size=56)))
    shown, phases, checked = [], [], []

    def measure(student, teacher, images):
        checked.append(images)
        return error

    monkeypatch.setattr(pipeline, 'measure_tap_error', measure)
    monkeypatch.setattr(pipeline, 'print_log', lambda line, level=logging.INFO, **kwargs:
                        shown.append((line, level)))
    model = swin(depths=(1, 1), num_heads=(1, 1))
    psaq_mm.quantize(model, recipe, progress=lambda p: phases.append((p.phase, p.done, p.total)))
    line, found = shown[-1]
    assert found == level and f'measured on 2 held-out images: {100 * error:g} %' in line
    assert ('over max_drop=2: give a smaller one' in line) == (level == logging.WARNING)
    steps = phases[-1][2]
    assert phases[-steps - 1:] == [('held_out', step, steps) for step in range(steps + 1)]
    three = psaq_mm.synthesize(model, replace(recipe.synthesis, num_images=3), seed=0)
    assert torch.allclose(checked[0], three[1:], atol=1e-4)
