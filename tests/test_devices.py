# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What runs on another device computes what it does on the CPU, and mixes nothing of both."""
import copy

import pytest
import timm
import torch
from conftest import DEMO, plain_student
from mmdet.models.backbones.swin import SwinTransformer as DetSwin
from mmengine.config import Config
from mmseg.models.backbones.swin import SwinTransformer as SegSwin
from other_device import OTHER, OtherTensor, other_device
from torch import nn

import psaq_mm
from psaq_mm import EvolutionSettings, Recipe, SynthesisSettings, UserError
from psaq_mm.adapters import find_adapter
from psaq_mm.devices import module_device, require_float32
from psaq_mm.engine import build_float_model
from psaq_mm.evolution import discrepancy
from psaq_mm.evolution.views import random_blend, random_zoom
from psaq_mm.ops import apply_plan, named_quant_ops, without_notes
from psaq_mm.ops.op import op_for
from psaq_mm.prior import (
    AttentionRecord,
    BatchNormPrior,
    BatchNormRecord,
    PatchSimilarityPrior,
    PriorState,
    TotalVariationPrior,
    channel_statistics,
    random_flip,
    random_roll,
)
from psaq_mm.quantization import (
    Quantizer,
    QuantSpec,
    excess_width,
    gptq_round,
    scale_and_zero_point,
    second_moments,
)
from psaq_mm.quantization.placement import ROLES
from psaq_mm.registry import OBSERVERS, QUANT_OPS
from psaq_mm.student import equalize_channels
from psaq_mm.student.final_ranges import transferred_end
from psaq_mm.synthesis import mosaics


@pytest.fixture
def other(monkeypatch):
    with other_device(monkeypatch) as device:
        yield device


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(device, value):
    """A nested value with all of its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, one) for one in value)
    return {k: on(device, v) for k, v in value.items()} if isinstance(value, dict) else value


def tensors(value):
    """All tensors of a nested value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in tensors(one)] if isinstance(value, (list, tuple)) else []


def same(other_value, value):
    """Whether two nested values hold equal tensors, the first on the other device."""
    pairs = list(zip(tensors(other_value), tensors(value)))
    assert pairs and len(tensors(other_value)) == len(tensors(value))
    assert all(one.device == OTHER and two.device.type == 'cpu' for one, two in pairs)
    return all(torch.equal(one.cpu(), two) for one, two in pairs)


# The device itself


@pytest.mark.parametrize('mix', [
    lambda here, there: here + there, lambda here, there: there * here,
    lambda here, there: torch.cat([here, there]), lambda here, there: here @ there,
    lambda here, there: torch.stack([here.sum(), there.sum()]),
    lambda here, there: torch.where(here > 0, there, there),
    lambda here, there: here[there.argsort()], lambda here, there: there.masked_fill(here > 0, 1.),
    lambda here, there: there.clamp(min=here),
    lambda here, there: there.new_zeros(3).index_put_((torch.tensor([0, 1, 2]), ), here),
    lambda here, there: torch.rand(3, device=OTHER, generator=torch.Generator()),
    lambda here, there: nn.Linear(3, 2)(there),
    lambda here, there: nn.Linear(3, 2).to(OTHER)(here)])
def test_mixing_is_refused(other, mix):
    here = draw(3)
    with pytest.raises(RuntimeError, match='expected'):
        mix(here, here.to(other))


def test_what_a_gpu_allows(other):
    here = draw(3)
    there = here.to(other)
    assert isinstance(there, OtherTensor) and there.device == OTHER
    assert same(there + torch.tensor(2.), here + 2)
    assert same(there[torch.tensor([2, 0])], here[[2, 0]])
    assert same(torch.zeros(3, device=other).copy_(here), here)
    assert same(there.add_(1)[1:], here[1:] + 1)
    here.copy_(there)
    assert torch.equal(here, draw(3) + 1)
    assert float(there.sum()) == pytest.approx(float(here.sum()))
    layer = nn.Linear(3, 2)
    expected = layer(here)
    moved = copy.deepcopy(layer).to(other)
    assert same(moved(there), expected)
    expected.sum().backward()
    moved(there).sum().backward()
    assert same(moved.weight.grad, layer.weight.grad)


# Prior


def gradient_and_value(images, compute):
    images = images.detach().requires_grad_(True)
    value = compute(images)
    return value.detach(), torch.autograd.grad(value, images)[0]


def generators(count):
    """Random numbers for each of some images."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


VALID = torch.ones(4, 9, dtype=torch.bool)
VALID[2:, 3:] = False


@pytest.mark.parametrize('valid', [None, VALID, VALID.logical_not()])
@pytest.mark.parametrize('term', [
    PatchSimilarityPrior(), PatchSimilarityPrior(bins=300), PatchSimilarityPrior(form='v1')])
def test_patch_similarity(other, term, valid):
    def compute(tokens):
        mask = valid if valid is None else valid.to(tokens.device)
        return term(PriorState(images=tokens.new_zeros(2, 3, 8, 8), attention=[
            AttentionRecord(tokens, mask), AttentionRecord(tokens * 2)],
            generators=generators(2))).sum()

    tokens = draw(8, 9, 2, 5)
    assert same(gradient_and_value(tokens.to(other), compute), gradient_and_value(tokens, compute))


def test_total_variation(other):
    def compute(images):
        return TotalVariationPrior()(PriorState(
            images=images, attention=[], generators=generators(2))).sum()

    images = draw(2, 3, 16, 20)
    assert same(gradient_and_value(images.to(other), compute), gradient_and_value(images, compute))


def test_batch_norm(other):
    def compute(x):
        norm = nn.BatchNorm2d(3).to(x.device)
        return BatchNormPrior()(PriorState(
            images=x, attention=[], generators=generators(2), batch_norms=[BatchNormRecord(
                *channel_statistics(x), norm.running_mean, norm.running_var, norm.eps)])).sum()

    images = draw(2, 3, 4, 5)
    assert same(gradient_and_value(images.to(other), compute), gradient_and_value(images, compute))


@pytest.mark.parametrize('change', [
    lambda images, generator: random_roll(images, (5, 7), torch.rand(3, 2, generator=generator)),
    lambda images, generator: random_flip(images, 1., torch.rand(3, generator=generator)),
    lambda images, generator: random_zoom(images, 3., generator),
    lambda images, generator: random_blend(images, 0.2, on(images.device, torch.full(
        (1, 3, 1, 1), -2.)), on(images.device, torch.full((1, 3, 1, 1), 2.)), generator),
    lambda images, generator: mosaics(images, (40, 24))])
def test_images(other, change):
    images = draw(3, 3, 16, 20)
    there, here = (change(x, torch.Generator().manual_seed(2)) for x in (images.to(other), images))
    assert same(there, here) and not (here.shape == images.shape and torch.equal(here, images))


# Numbers to integers


SPECS = [dict(), dict(symmetric=True), dict(bits=4, margin=2.0), dict(granularity='per_channel'),
         dict(symmetric=True, granularity='per_channel', bits=3)]


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('rule', ['MinMaxObserver', 'PercentileObserver', 'MSEObserver',
                                  'MAEObserver'])
def test_observers(other, rule, spec):
    keeps = {} if rule == 'MinMaxObserver' else dict(samples=500)  # fewer than it sees
    keeps.update(dict(candidates=6) if rule in ('MSEObserver', 'MAEObserver') else {})

    def ranges(device):
        quantizer = Quantizer(QuantSpec.from_dict(dict(spec, observer=dict(type=rule, **keeps))),
                              1)
        quantizer.to(device)
        quantizer.start_observing()
        for seed in (0, 1):
            quantizer.observer.observe(draw(30, 4, 60, seed=seed).to(device), quantizer.axis)
        quantizer.finish_observing()
        x = draw(5, 4, 6).to(device)
        return [quantizer.scale, quantizer.zero_point, *quantizer.range(),
                quantizer.to_integers(x)]

    assert same(ranges(other), ranges('cpu'))


def test_every_range_rule_is_here():
    QuantSpec()  # imports them
    own = {name for name, cls in OBSERVERS.module_dict.items()
           if cls.__module__.startswith('psaq_mm.')}
    assert own == {'MinMaxObserver', 'PercentileObserver', 'MSEObserver', 'MAEObserver'}


def test_ranges(other):
    lower, upper = draw(4).abs().neg(), draw(4, seed=1).abs()
    for symmetric in (False, True):
        spec = QuantSpec(bits=4, symmetric=symmetric, granularity='per_channel')
        assert same(scale_and_zero_point(lower.to(other), upper.to(other), spec),
                    scale_and_zero_point(lower, upper, spec))
    with pytest.raises(ValueError, match='finite'):
        scale_and_zero_point(torch.full((1, ), float('nan'), device=other), upper[:1].to(other),
                             QuantSpec())
    ends = lower, upper, lower
    assert same(transferred_end(*on(other, ends)), transferred_end(*ends))
    squares = draw(9).square() + torch.tensor([0.] * 8 + [900.])
    assert same(excess_width(squares.to(other), 2.), excess_width(squares, 2.))


def test_gptq(other):
    weight, inputs = draw(6, 140), draw(50, 140, seed=1)
    inputs[:, 7] = 0
    scale, zero_point = torch.full((6, ), 0.3), torch.zeros(6)

    def rounded(device):
        moments = second_moments(inputs.to(device))
        return [*moments, gptq_round(weight.to(device), moments, scale.to(device),
                                     zero_point.to(device), (-7, 7))]

    assert same(rounded(other), rounded('cpu'))
    with pytest.raises(ValueError, match='not finite'):
        gptq_round(weight.to(other), second_moments(torch.full_like(inputs, float('inf')).to(
            other)), scale.to(other), zero_point.to(other), (-7, 7))


@pytest.mark.parametrize('learnt', [False, True])
def test_gradients_of_fake_quantization(other, learnt):
    def gradients(device):
        quantizer = Quantizer(QuantSpec(bits=4, granularity='per_channel'), 1).to(device)
        quantizer.set_range(draw(4).abs().neg().to(device), draw(4).abs().to(device))
        quantizer.enabled = True
        x = draw(5, 4, 6).to(device).requires_grad_(True)
        leaves = [x, quantizer.scale, quantizer.zero_point] if learnt else [x]
        for leaf in leaves:
            leaf.requires_grad_(True)
        out = quantizer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    assert same(gradients(other), gradients('cpu'))


# Quantized ops


TIMM_SWIN = dict(img_size=56, embed_dim=12, depths=(2, 2), num_heads=(1, 2))
BACKBONES = dict(
    mmdet=lambda: DetSwin(embed_dims=12, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                          out_indices=(0, 1)),
    mmseg=lambda: SegSwin(embed_dims=12, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                          out_indices=(0, 1)),
    timm_swin=lambda: timm.create_model('swin_tiny_patch4_window7_224', **TIMM_SWIN),
    timm_padded=lambda: timm.create_model('swin_tiny_patch4_window7_224', **TIMM_SWIN,
                                          dynamic_img_size=True, always_partition=True),
    deit=lambda: timm.create_model('deit_tiny_distilled_patch16_224', img_size=64, depth=2,
                                   embed_dim=12, num_heads=2))
SIZES = dict(mmdet=(60, 52), mmseg=(60, 52), timm_swin=(56, 56), timm_padded=(60, 52),
             deit=(64, 64))


def built(name):
    torch.manual_seed(0)
    model = BACKBONES[name]()
    model.eval()
    return model


@pytest.mark.parametrize('name', BACKBONES)
def test_quantized_backbones(other, name):
    """Every role there is, and what the prior reads."""
    images = draw(1, 3, *SIZES[name])

    def run(device):
        model = plain_student(built(name).to(device), images, placement=list(ROLES),
                              weight=dict(bits=4), activation=dict(bits=6))
        adapter = find_adapter(model)
        with torch.no_grad(), adapter.record_attention(model) as recorder:
            out = adapter.forward_backbone(model, images.to(device))
            records = recorder.pop_all()
        return [list(out), [[r.output] + ([] if r.valid is None else [r.valid]) for r in records],
                without_notes(model.state_dict())]  # which are on the CPU

    assert same(run(other), run('cpu'))


LAYERS = [
    (nn.Linear(6, 5), (3, 6)), (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), (2, 4, 7, 7)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 5))]


@pytest.mark.parametrize('layer, shape', LAYERS, ids=lambda x: str(x)[:30])
def test_layers(other, layer, shape):
    """With the gradients of weight, bias and input, and what GPTQ makes of them."""
    x = draw(*shape)

    def run(device):
        model = nn.Sequential(copy.deepcopy(layer)).to(device)
        spec = QuantSpec(bits=4, symmetric=True, granularity='per_channel')
        apply_plan(model, {'0': dict(weight=spec, input=QuantSpec(), output=QuantSpec())})
        op, inputs = model[0], x.to(device)
        for role in ('input', 'output'):
            op.quantizers[role].start_observing()
        op(inputs)
        for role in ('input', 'output'):
            op.quantizers[role].finish_observing()
        op.set_weight_range()
        inputs.requires_grad_(True)
        out = op(inputs)
        found = [out.detach(), *torch.autograd.grad(out.square().sum(),
                                                    [inputs, op.weight, op.bias])]
        with torch.no_grad():
            found += [op(inputs), op.quantized_weight()]
            rows = op.weight_rows(op.weight)
            if rows is not None:
                found += [op.input_rows(inputs), op.weight_of_rows(rows)]
        return found

    assert same(run(other), run('cpu'))


def test_every_op_is_here():
    found = {op_for(layer) for layer, _ in LAYERS}
    for name in BACKBONES:
        model = plain_student(built(name), placement=list(ROLES))
        found |= {type(op) for _, op in named_quant_ops(model)}
    own = {op for op in QUANT_OPS.module_dict.values() if op.__module__.startswith('psaq_mm.')}
    assert own == found


# Teacher and student


@pytest.mark.parametrize('group', ['scores', 'deltas'])
def test_discrepancy(other, group):
    teacher = {'deltas.0': draw(2, 8, 4, 5), 'scores.0': 3 * draw(2, 6, 4, 5, seed=1)}
    student = draw(*teacher[f'{group}.0'].shape, seed=2)

    def run(device):
        def compute(tap):
            taps = on(device, teacher)
            return discrepancy(taps, {**taps, f'{group}.0': tap},
                               dict(deltas=1., scores=0.5)).sum()

        return gradient_and_value(student.to(device), compute)

    assert same(run(other), run('cpu'))


def test_equalization(other):
    images = draw(2, 3, 56, 56)

    def run(device):
        model = built('mmdet').to(device)
        with torch.no_grad():
            model.stages[0].blocks[0].norm1.weight[3] = 50
        moved = equalize_channels(model, find_adapter(model).norm_readers(model), images,
                                  lambda batch: model(batch.to(device)), 4.)
        assert moved['stages.0.blocks.0.norm1'] == 1
        return dict(model.state_dict())

    assert same(run(other), run('cpu'))


def small_segmentor():
    config = Config.fromfile(DEMO / 'upernet_swin_demo.py')
    head = dict(in_channels=[8, 16], in_index=[0, 1], channels=8)
    config.merge_from_dict(dict(model=dict(
        backbone=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2),
                      out_indices=(0, 1)), decode_head=head, auxiliary_head=None)))
    return build_float_model(config)


@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_whole_run(other, scope):
    """From a float model to the last rounding, learning included: the same student."""
    torch.manual_seed(0)
    source = small_segmentor()
    source = source if scope == 'model' else source.backbone
    taps = dict(backbone=1.) if scope == 'backbone' else dict(backbone=1., logits=1.)
    prior = SynthesisSettings(num_images=2, batch_size=2, image_size=56, steps=2)
    settings = Recipe().changed(dict(quantization=dict(
        scope=scope, weight=dict(bits=4), activation=dict(bits=6),
        roles=dict(input=dict(rotate=True, granularity='per_token'),
                   attention=dict(granularity='per_token'))))).quantization
    game = EvolutionSettings(rounds=1, sample_steps=1, student_steps=1, batch_size=2, taps=taps,
                             learn='both' if scope == 'model' else 'ranges')

    def run(device):
        model = copy.deepcopy(source).to(device)
        images = psaq_mm.synthesize(model, prior, seed=3)
        psaq_mm.equalize(model, images, settings)
        student = psaq_mm.prepare(model, settings)
        psaq_mm.calibrate(student, images)
        psaq_mm.evolve(student, model, images, game, prior, seed=4)
        psaq_mm.recalibrate(student, images, (72, 64))
        if scope == 'backbone':  # no weight has learned
            psaq_mm.round_weights(student, images)
        assert images.device.type == 'cpu'
        return [without_notes(student.state_dict()), images.to(device)]

    found, expected = run(other), run('cpu')
    assert same(found, expected), [
        key for key in found[0] if not torch.equal(found[0][key].cpu(), expected[0][key])]


def test_module_device():
    assert module_device(nn.Linear(2, 2, device='meta')).type == 'meta'
    assert module_device(nn.ReLU()).type == 'cpu'
    buffered = nn.Module()
    buffered.register_buffer('table', torch.zeros(1, device='meta'))
    assert module_device(buffered).type == 'meta'


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused(dtype):
    model = DetSwin(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).to(dtype)
    for call in (require_float32, psaq_mm.synthesize, psaq_mm.quantize):
        with pytest.raises(UserError, match=rf'{dtype} .*call model.float\(\) first'):
            call(model)
    require_float32(model.float())
