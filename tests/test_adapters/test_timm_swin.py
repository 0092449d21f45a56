# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""timm's Swin: quantized modules against the host's own, recorder, layouts."""
import copy
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import plain_student
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn

import psaq_mm
from psaq_mm import SynthesisSettings
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.timm_adapter import QuantTimmPatchEmbed
from psaq_mm.adapters.timm_swin import (
    SWIN_AUTHORS,
    QuantTimmSwinBlock,
    QuantTimmWindowAttention,
    TimmSwinAdapter,
    window_validity,
)
from psaq_mm.checkpoint import load_float_weights
from psaq_mm.classification import TimmClassifier
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, set_quantization
from psaq_mm.quantization import Quantizer, QuantSpec, sqnr_db

ADAPTER = TimmSwinAdapter()
NAME = 'swin_tiny_patch4_window7_224'
TINY = dict(img_size=56, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
            num_classes=5)
ASYMMETRIC = QuantSpec(8, False)
OPERANDS = ('query', 'key', 'attention', 'value')
ROLES = (*OPERANDS, 'logits', 'bias_table')


def randomized(module):
    """Parameters that are 0 or 1 at first have no effect: draw them."""
    for name, parameter in module.named_parameters():
        if 'bias' in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.eval()


def swin(**changes):
    return randomized(timm.create_model(NAME, **{**TINY, **changes}))


def classifier(**changes):
    return randomized(TimmClassifier(NAME, **{**TINY, **changes}))


def calibrated(module, op, roles, *inputs, spec=ASYMMETRIC):
    """The op on a copy, with ranges from some inputs."""
    op = op.from_float(copy.deepcopy(module), dict.fromkeys(roles, spec))
    for quantizer in op.quantizers.values():
        quantizer.start_observing()
    with torch.no_grad():
        op(*inputs)
    for quantizer in op.quantizers.values():
        quantizer.finish_observing()
    return op


def min_max(x):
    """Scale and zero point of 8 bits, asymmetric, per tensor."""
    low, high = min(0., x.min().item()), max(0., x.max().item())
    scale = torch.tensor((high - low) / 255).item()  # rounded to float32
    return scale, round(-low / scale)


def fake(x, ranges=None):
    return torch.fake_quantize_per_tensor_affine(x, *(ranges or min_max(x)), 0, 255)


# Window attention


def reference_attention(attn, x, mask, pass_on):
    """timm's forward without fusion, each tensor that has a role through ``pass_on``."""
    B_, N, C = x.shape
    qkv = attn.qkv(x).reshape(B_, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    logits = pass_on('logits', pass_on('query', q * attn.scale)
                     @ pass_on('key', k).transpose(-2, -1))
    logits = logits + pass_on('bias_table', attn._get_rel_pos_bias())
    if mask is not None:
        num_win = mask.shape[0]
        logits = logits.view(-1, num_win, attn.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
        logits = logits.view(-1, attn.num_heads, N, N)
    weights = pass_on('attention', logits.softmax(-1))
    return attn.proj((weights @ pass_on('value', v)).transpose(1, 2).reshape(B_, N, -1))


def quantized_by_hand(attn, x, mask, roles):
    """Ranges of the float tensors, then torch's fake quantize where ``roles`` say."""
    ranges = {}

    def observe(role, tensor):
        ranges[role] = min_max(tensor)
        return tensor

    with torch.no_grad():
        assert torch.equal(reference_attention(attn, x, mask, observe), attn(x, mask))
        return reference_attention(attn, x, mask, lambda role, tensor: fake(
            tensor, ranges[role]) if role in roles else tensor)


def window_mask(count, tokens):
    labels = torch.randint(2, (count, tokens), generator=torch.Generator().manual_seed(1))
    return (labels[:, :, None] != labels[:, None]).float() * -100.


def window_attention(**changes):
    return randomized(WindowAttention(**{**dict(dim=16, num_heads=4, window_size=(3, 3)),
                                         **changes}))


@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('changes', [
    {}, dict(num_heads=1), dict(qkv_bias=False), dict(head_dim=6), dict(window_size=(2, 4))])
def test_attention_off_equals_float(changes, masked):
    attn = window_attention(**changes)
    x = torch.randn(6, attn.window_area, 16) * 3
    mask = window_mask(3, attn.window_area) if masked else None
    with torch.no_grad():
        expected = attn(x, mask)
        op = calibrated(attn, QuantTimmWindowAttention, ROLES, x, mask)
        assert not torch.equal(op(x, mask), expected)
        set_quantization(op, False)
        assert torch.equal(op(x, mask), expected)
        assert torch.equal(op(x, mask=mask), expected)
        attn.fused_attn = True
        assert torch.allclose(op(x, mask), attn(x, mask), atol=1e-6)


def test_attention_off_equals_float_in_training_mode():
    attn, results = WindowAttention(16, 4, window_size=3, attn_drop=0.3, proj_drop=0.2), []
    op = QuantTimmWindowAttention.from_float(copy.deepcopy(attn), dict(attention=QuantSpec()))
    for module in (attn, op):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 2 * 9 * 16).view(2, 9, 16).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad, module.qkv.weight.grad,
                        module.relative_position_bias_table.grad))
    assert results[0][3].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('roles', [*[(role, ) for role in ROLES], OPERANDS,
                                   ('logits', 'bias_table')], ids='-'.join)
def test_attention_equals_the_literal_reference(roles, masked):
    attn, x = window_attention(), torch.randn(6, 9, 16) * 2
    mask = window_mask(3, 9) if masked else None
    with torch.no_grad():
        y = calibrated(attn, QuantTimmWindowAttention, roles, x, mask)(x, mask)
        assert torch.equal(y, quantized_by_hand(attn, x, mask, roles))
        assert not torch.equal(y, attn(x, mask))
        assert sqnr_db(attn(x, mask), y) > 25


def test_attention_is_never_fused(monkeypatch):
    model, x = swin(), torch.randn(1, 3, 56, 56)
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = True
    expected = model(x)

    def fused(*args, **kwargs):
        raise AssertionError('fused attention')

    monkeypatch.setattr(F, 'scaled_dot_product_attention', fused)
    with pytest.raises(AssertionError, match='fused'):
        model(x)
    model = plain_student(model)
    psaq_mm.calibrate(model, x)
    assert sqnr_db(expected, model(x)) > 20


@pytest.mark.parametrize('role', ROLES)
def test_channels_are_heads(role):
    op = calibrated(window_attention(), QuantTimmWindowAttention, (role, ),
                    torch.randn(6, 9, 16), spec=QuantSpec(8, False, 'per_channel'))
    assert op.quantizers[role].scale.shape == (4, )


# Block and patch embedding


@pytest.mark.parametrize('shift', [0, 2])
def test_block(shift):
    block = randomized(SwinTransformerBlock(16, (6, 9), num_heads=2, window_size=4,
                                            shift_size=shift))
    x = torch.randn(2, 6, 9, 16)
    with torch.no_grad():
        expected = block(x)
        op = calibrated(block, QuantTimmSwinBlock, ('attention_residual', 'ffn_residual'), x)
        attended = x + block._attn(block.norm1(x))
        whole = attended + block.mlp(block.norm2(attended))
        middle = fake(attended)
        by_hand = fake(middle + block.mlp(block.norm2(middle)), min_max(whole))
        assert torch.equal(op(x), by_hand)
        assert op(x).shape == x.shape
        set_quantization(op, False)
        assert torch.equal(op(x), expected)


@pytest.mark.parametrize('changes', [dict(output_fmt='NHWC', norm_layer=nn.LayerNorm), {}])
def test_patch_embed(changes):
    embed = randomized(PatchEmbed(img_size=16, patch_size=4, embed_dim=8, **changes))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = embed(x)
        op = calibrated(embed, QuantTimmPatchEmbed, ('output', ), x)
        assert torch.equal(op(x), fake(expected))  # after the norm
        assert expected.shape[-1] == 8  # the channel axis
        set_quantization(op, False)
        assert torch.equal(op(x), expected)


# The whole model

LAYERS = ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')
BLOCKS = [f'layers.{stage}.blocks.{block}' for stage in (0, 1) for block in (0, 1)]


def quantizer_names(model):
    return {name.replace('quantizers.', '') for name, module in model.named_modules()
            if isinstance(module, Quantizer)}


def expected_names(placement, scope):
    linear = [*(f'{block}.{layer}' for block in BLOCKS for layer in LAYERS),
              'layers.1.downsample.reduction', 'patch_embed.proj']
    if scope == 'model':
        linear.append('head.fc')
    names = {f'{name}.{role}' for name in linear for role in ('weight', 'input')}
    if placement == 'operands':
        return names | {f'{block}.attn.{role}' for block in BLOCKS for role in OPERANDS}
    names |= {f'{block}.{name}' for block in BLOCKS for name in (
        'attention_residual', 'ffn_residual', 'attn.logits', 'attn.bias_table',
        'attn.qkv.output', 'attn.proj.output', 'mlp.fc2.output')}
    return names | {'patch_embed.output', 'layers.1.downsample.reduction.output'}


@pytest.mark.parametrize('build', [swin, classifier])
@pytest.mark.parametrize('scope', ['backbone', 'model'])
@pytest.mark.parametrize('placement', ['operands', 'v1'])
def test_every_quantizer_is_calibrated(placement, scope, build):
    model, x = build(), torch.randn(2, 3, 56, 56)
    prefix = 'model.' if build is classifier else ''
    with torch.no_grad():
        expected = model(x)
        model = plain_student(model, placement=placement, scope=scope)
        assert torch.equal(model(x), expected)
        assert quantizer_names(model) == {
            prefix + name for name in expected_names(placement, scope)}
        psaq_mm.calibrate(model, x)
        assert all(m.calibrated for m in model.modules() if isinstance(m, Quantizer))
        y = model(x)
        assert not torch.equal(y, expected) and sqnr_db(expected, y) > 20
        set_quantization(model, False)
        assert torch.equal(model(x), expected)


def test_fewer_bits_are_worse():
    x, noise = torch.randn(2, 3, 56, 56), []
    for bits in (8, 6, 4):
        torch.manual_seed(0)
        model = swin()
        with torch.no_grad():
            expected = model(x)
            model = plain_student(model, scope='backbone', weight=dict(bits=bits),
                                  activation=dict(bits=bits))
            noise.append(sqnr_db(expected, psaq_mm.calibrate(model, x)(x)))
    assert noise[0] > noise[1] + 6 > noise[2] + 12  # a bit is worth 6 dB


@pytest.mark.parametrize('build', [swin, classifier])
@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_round_trip(build, scope, tmp_path):
    model, x = build(), torch.randn(2, 3, 56, 56)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    float_logits = model(x)
    model = plain_student(model, scope=scope, weight=dict(bits=4))
    psaq_mm.calibrate(model, x)
    psaq_mm.save(model, tmp_path / 'quantized.pth')
    other = psaq_mm.load(build(), tmp_path / 'quantized.pth')
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    psaq_mm.unwrap(model)
    assert not list(named_quant_ops(model))
    assert torch.equal(model(x), float_logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('build', [swin, classifier])
def test_synthesize(build):
    model = build()
    images = psaq_mm.synthesize(model, SynthesisSettings(
        num_images=2, batch_size=2, image_size=56, steps=3, lr=100.))
    assert images.shape == (2, 3, 56, 56)
    low, high = ADAPTER.valid_range(model)
    assert torch.allclose(images.amin((0, 2, 3)), low.flatten())
    assert torch.allclose(images.amax((0, 2, 3)), high.flatten())


# Recording attention


def attention_by_hand(attn, x, mask):
    """attn @ v, window by window and head by head: (windows, N, heads, head_dim)."""
    heads, dim = attn.num_heads, x.shape[-1] // attn.num_heads
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).split(x.shape[-1], -1)
    out = torch.zeros(len(x), x.shape[1], heads, dim)
    for window in range(len(x)):
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            logits = q[window, :, part] * dim**-0.5 @ k[window, :, part].T
            logits = logits + attn.relative_position_bias_table[
                attn.relative_position_index, head]
            if mask is not None:
                logits = logits + mask[window % len(mask)]
            out[window, :, head] = logits.softmax(-1) @ v[window, :, part]
    return out


def real_tokens(block, height, width):
    """Which tokens of a map of ones reach the attention as ones."""
    block, seen = copy.deepcopy(block), []
    block.attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]),
                                         with_kwargs=True)
    block._attn(torch.ones(1, height, width, block.dim))
    return seen[0].eq(1).all(-1)


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('changes, size, tokens', [
    (dict(img_size=64), (64, 64), [(16, 16), (8, 8)]),
    ({}, (56, 56), [(14, 14), (7, 7)]),  # pads
    (dict(dynamic_img_size=True), (60, 36), [(15, 9), (8, 5)]),
    (dict(img_size=(24, 64), window_size=7), (24, 64), [(6, 16), (3, 8)]),  # 6 x 7, 3 x 7
])
def test_record_attention(changes, size, tokens, whole):
    model, seen = (classifier if whole else swin)(**changes), []
    inner = model.model if whole else model
    blocks = [m for m in inner.modules() if isinstance(m, SwinTransformerBlock)]
    handles = [block.attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module, args[0], kwargs['mask'])),
        with_kwargs=True) for block in blocks]
    with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
        ADAPTER.forward_backbone(model, torch.randn(2, 3, *size))
        records = recorder.pop_all()
    for handle in handles:
        handle.remove()
    assert len(records) == len(blocks) == len(seen) == 4
    padded = 0
    for record, block, shape, (attn, x, mask) in zip(
            records, blocks, [t for t in tokens for _ in range(2)], seen):
        assert attn is block.attn
        windows = math.ceil(shape[0] / block.window_size[0]) \
            * math.ceil(shape[1] / block.window_size[1])
        assert record.output.shape == (2 * windows, block.window_area, attn.num_heads, 16)
        with torch.no_grad():
            assert torch.allclose(record.output, attention_by_hand(attn, x, mask), atol=1e-5)
            valid = real_tokens(block, *shape)
        if valid.all():
            assert record.valid is None
        else:
            padded += 1
            assert torch.equal(record.valid, valid)
            assert record.valid.sum() == shape[0] * shape[1]
    assert any(mask is not None for _, _, mask in seen)
    assert padded == (0 if size == (64, 64) else 4)


def test_window_validity():
    assert window_validity(8, 12, (4, 6)) is None
    valid = window_validity(3, 5, (2, 3))  # windows of 2 x 3 over 4 x 6 tokens
    rows = [[[1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 0]],
            [[1, 1, 1], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]]
    assert torch.equal(valid, torch.tensor(rows).flatten(1) == 1)


def test_records_have_gradients():
    model, x = swin(), torch.randn(1, 3, 56, 56, requires_grad=True)
    with ADAPTER.record_attention(model) as recorder:
        model(x)
        for record in recorder.pop_all():
            gradient, = torch.autograd.grad(record.output.square().sum(), x, retain_graph=True)
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize('placement', ['operands', 'v1'])
def test_recording_a_quantized_model(placement):
    model, x = classifier(), torch.randn(1, 3, 56, 56)

    def record():
        with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
            model(x)
            return recorder.pop_all()

    plain = record()
    model = plain_student(model, placement=placement)
    psaq_mm.calibrate(model, x)
    records = record()
    assert len(records) == len(plain) == 4
    for a, b in zip(plain, records):
        assert not torch.equal(a.output, b.output)
        assert sqnr_db(a.output, b.output) > 20
        assert torch.equal(a.valid, b.valid)


@pytest.mark.parametrize('fails', [True, False])
def test_recording_leaves_nothing_behind(fails):
    model, x = swin(), torch.randn(1, 3, 56, 56)
    model.layers[1].grad_checkpointing = True

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    with torch.no_grad():
        expected, before = model(x), hooks()
        try:
            with ADAPTER.record_attention(model) as recorder:
                assert not any(layer.grad_checkpointing for layer in model.layers)
                assert hooks() != before
                assert torch.equal(model(x), expected)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert hooks() == before
        assert [layer.grad_checkpointing for layer in model.layers] == [False, True]
        model(x)
        assert len(recorder.records) == 4


# The adapter's answers


def test_find_adapter():
    assert type(find_adapter(swin())) is type(find_adapter(classifier())) is TimmSwinAdapter
    assert not ADAPTER.matches(nn.Linear(2, 2))
    assert not ADAPTER.matches(timm.create_model('resnet18'))


@pytest.mark.parametrize('build', [swin, classifier])
def test_names(build):
    model = build()
    prefix = 'model.' if build is classifier else ''
    assert ADAPTER.backbone_name(model) == prefix.rstrip('.')
    for name in ('head', 'head.fc', 'head.global_pool'):
        assert not ADAPTER.in_scope(model, prefix + name, 'backbone')
        assert ADAPTER.in_scope(model, prefix + name, 'model')
    for name in ('layers.0', 'norm', 'patch_embed', 'header', 'layers.0.head'):
        assert ADAPTER.in_scope(model, prefix + name, 'backbone')
    assert [name for name, _ in model.named_modules() if ADAPTER.is_patch_embed(model, name)] == [
        prefix + 'patch_embed.proj']
    assert ADAPTER.predictors(model) == {prefix + name for name in {'head.fc'}}
    assert not ADAPTER.runs_on_proposals(model, prefix + 'layers.0')
    readers = ADAPTER.norm_readers(model)
    blocks = [name for name, m in model.named_modules() if isinstance(m, SwinTransformerBlock)]
    assert blocks and readers == {
        **{f'{name}.norm1': f'{name}.attn.qkv' for name in blocks},
        **{f'{name}.norm2': f'{name}.mlp.fc1' for name in blocks},
        prefix + 'layers.1.downsample.norm': prefix + 'layers.1.downsample.reduction'}
    assert ADAPTER.is_rgb(model)


def test_valid_range():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = classifier()
    for each in (swin(), model, SwinTransformer(**TINY)):
        low, high = ADAPTER.valid_range(each)
        assert low.shape == high.shape == (1, 3, 1, 1)
        assert low.flatten().tolist() == pytest.approx([-m / s for m, s in zip(mean, std)])
        assert high.flatten().tolist() == pytest.approx([(1 - m) / s for m, s in zip(mean, std)])
    pixels = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 255)]
    batch = model.data_preprocessor(dict(inputs=pixels))['inputs']
    assert torch.allclose(batch[0], low[0].expand(3, 8, 8))
    assert torch.allclose(batch[1], high[0].expand(3, 8, 8))
    low, high = ADAPTER.valid_range(classifier(data_preprocessor=dict(type='ImgDataPreprocessor')))
    assert low.flatten().tolist() == [0.] * 3 and high.flatten().tolist() == [255.] * 3


def test_forward():
    model, x = classifier(), torch.randn(2, 3, 56, 56)
    seen = []
    model.model.head.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        features = ADAPTER.forward_backbone(model, x)
        assert len(features) == 1
        assert torch.equal(features[0], model.model.forward_features(x))
        ADAPTER.forward(model, x, 'backbone')
        assert not seen
        ADAPTER.forward(model, x, 'model')
        assert torch.equal(seen[0], model(x))


def test_image_size():
    for model in (swin(), classifier()):
        ADAPTER.check_image_size(model, (56, 56))
        with pytest.raises(UserError, match='synthesis.image_size must be 56, .*got 64$'):
            ADAPTER.check_image_size(model, (64, 64))
        with pytest.raises(UserError, match='synthesis.image_size must be 56'):
            psaq_mm.synthesize(model, SynthesisSettings(image_size=64))
    with pytest.raises(UserError, match=r'must be \[24, 64\], .*got 56$'):
        ADAPTER.check_image_size(swin(img_size=(24, 64)), (56, 56))
    dynamic = swin(dynamic_img_size=True)
    ADAPTER.check_image_size(dynamic, (60, 36))
    with pytest.raises(UserError, match=r'must be a multiple of 4, .*got \[60, 38\]$'):
        ADAPTER.check_image_size(dynamic, (60, 38))


# Layouts


def as_of_the_authors(model):
    """The state dict of a bare timm model in the keys of the authors' code."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r'^layers\.(\d+)\.downsample',
                     lambda match: f'layers.{int(match[1]) - 1}.downsample', key)
        state[re.sub(r'^head\.fc\.', 'head.', key)] = value.clone()
    for name, module in model.named_modules():
        if isinstance(module, WindowAttention):
            state[f'{name}.relative_position_index'] = module.relative_position_index.clone()
        if isinstance(module, SwinTransformerBlock) and module.attn_mask is not None:
            state[f'{name}.attn_mask'] = module.attn_mask.clone()
    return state


@pytest.mark.parametrize('build, layout', [
    (swin, 'timm'), (swin, SWIN_AUTHORS), (classifier, 'psaq_mm'), (classifier, 'timm'),
    (classifier, SWIN_AUTHORS)])
def test_layouts(build, layout, tmp_path):
    stages = dict(depths=(2, 2, 1), num_heads=(1, 2, 4))
    source, target, x = swin(**stages), build(**stages), torch.randn(2, 3, 56, 56)
    state = source.state_dict()
    if layout == SWIN_AUTHORS:
        state = as_of_the_authors(source)
        assert 'layers.1.downsample.reduction.weight' in state and 'head.weight' in state
        assert any('attn_mask' in key for key in state)
    elif layout == 'psaq_mm':
        state = {f'model.{key}': value for key, value in state.items()}
    if build is classifier:
        assert ADAPTER.layouts[layout] in state
    result, name = ADAPTER.convert_state(target, state)
    assert name == layout
    assert set(result) == set(target.state_dict())
    torch.save(dict(model=state), tmp_path / 'model.pth')
    with torch.no_grad():
        assert not torch.equal(target(x), source(x))
        load_float_weights(target, str(tmp_path / 'model.pth'))
        assert torch.equal(target(x), source(x))


def test_unknown_layout():
    for state in ({}, {'backbone.layers.0.x': torch.zeros(1)}, {'blocks.0.x': torch.zeros(1)}):
        assert ADAPTER.convert_state(classifier(), state) == (state, '')


@pytest.mark.parametrize('layout', ['timm', SWIN_AUTHORS])
@pytest.mark.parametrize('changes, difference', [
    (dict(depths=(1, 2)), 'missing'), (dict(embed_dim=32), 'another shape'),
    (dict(window_size=5), 'another shape'), (dict(patch_size=2), 'another shape'),
    (dict(num_classes=7), 'another shape'),
    (dict(depths=(3, 2, 1), num_heads=(1, 2, 4)), 'another shape')])
def test_another_model_is_reported(layout, changes, difference, tmp_path):
    target, other = classifier(), swin(**changes)
    state = as_of_the_authors(other) if layout == SWIN_AUTHORS else other.state_dict()
    result, name = ADAPTER.convert_state(target, state)
    assert name == layout
    # Nothing is resized to fit, and nothing is lost.
    assert {key[len('model.'):]: value.shape for key, value in result.items()} == {
        key: value.shape for key, value in other.state_dict().items()}
    torch.save(dict(model=state), tmp_path / 'model.pth')
    with pytest.raises(UserError, match=f'is not a checkpoint of this model.*{difference}'):
        load_float_weights(target, str(tmp_path / 'model.pth'))


def test_ops_are_instances_of_the_host_classes():
    for op, host in ((QuantTimmWindowAttention, WindowAttention),
                     (QuantTimmSwinBlock, SwinTransformerBlock),
                     (QuantTimmPatchEmbed, PatchEmbed)):
        assert issubclass(op, host)
