# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""mmdet's Swin: quantized modules against the host's own, and the recorder."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones import ResNet
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, SwinTransformer, WindowMSA
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.layers import PatchEmbed
from torch import nn

import psaq_mm
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.mmdet_swin import (
    MMDetSwinAdapter,
    QuantPatchEmbed,
    QuantSwinBlock,
    QuantWindowMSA,
)
from psaq_mm.errors import UserError
from psaq_mm.ops import (
    QuantOp,
    apply_plan,
    named_quant_ops,
    plan_quantization,
    set_quantization,
)
from psaq_mm.quantization import Quantizer, QuantSpec, sqnr_db
from psaq_mm.recipe.merging import merged
from psaq_mm.recipe.quantization import QuantizationSettings

ADAPTER = MMDetSwinAdapter()
OPERANDS = ('query', 'key', 'attention', 'value')
WINDOW_ROLES = (*OPERANDS, 'logits', 'bias_table')


def randomized(module):
    """Parameters that are 0 or 1 at first have no effect: draw them."""
    for name, parameter in module.named_parameters():
        if 'bias' in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    module.eval()  # the backbone's returns None
    return module


def swin(**changes):
    return randomized(SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2),
                                      strides=(4, 2), out_indices=(0, 1), **changes))


class Detector(nn.Module):
    """What the adapter looks at in a detector."""

    def __init__(self, backbone=None, **preprocessor):
        super().__init__()
        self.backbone = swin() if backbone is None else backbone
        self.data_preprocessor = DetDataPreprocessor(**preprocessor)
        self.calls = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.calls.append((inputs, data_samples, mode))
        return self.backbone(inputs)


def convert(module, op, specs):
    """The op on a copy: what is not its own stays float."""
    return op.from_float(copy.deepcopy(module), specs)


def calibrate(module, *args, **kwargs):
    ops = [op for _, op in named_quant_ops(module)]
    pending = [q for op in ops for role, q in op.quantizers.items()
               if role != 'weight' and not q.calibrated]
    for quantizer in pending:
        quantizer.start_observing()
    with torch.no_grad():
        module(*args, **kwargs)
    for quantizer in pending:
        quantizer.finish_observing()
    for op in ops:
        op.set_weight_range()
    return module


def min_max(*tensors):
    """Scale and zero point of 8 bits, asymmetric, per tensor."""
    low = min(0., *(t.min().item() for t in tensors))
    high = max(0., *(t.max().item() for t in tensors))
    scale = torch.tensor((high - low) / 255).item()  # rounded to float32
    return scale, round(-low / scale)


def fake(x):
    """torch's fake quantize in the tensor's own range."""
    return torch.fake_quantize_per_tensor_affine(x, *min_max(x), 0, 255)


def window_mask(count, tokens):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(2, (count, tokens), generator=generator)
    return (labels[:, :, None] != labels[:, None]).float() * -100.


def reference_attention(msa, x, mask, pass_on):
    """mmdet's WindowMSA.forward, each tensor that has a role through ``pass_on``."""
    B, N, C = x.shape
    qkv = msa.qkv(x).reshape(B, N, 3, msa.num_heads, C // msa.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    q = pass_on('query', q * msa.scale)
    attn = pass_on('logits', q @ pass_on('key', k).transpose(-2, -1))
    bias = msa.relative_position_bias_table[msa.relative_position_index.view(-1)].view(N, N, -1)
    bias = pass_on('bias_table', bias.permute(2, 0, 1).contiguous())
    attn = attn + bias.unsqueeze(0)
    if mask is not None:
        nW = mask.shape[0]
        attn = attn.view(B // nW, nW, msa.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, msa.num_heads, N, N)
    attn = pass_on('attention', msa.softmax(attn))
    x = (attn @ pass_on('value', v)).transpose(1, 2).reshape(B, N, C)
    return msa.proj(x)


def reference_quantized_attention(msa, x, mask, roles):
    """Ranges from the float tensors, then torch's fake quantize where ``roles`` say."""
    ranges = {}

    def observe(role, tensor):
        ranges[role] = min_max(tensor)
        return tensor

    def quantize(role, tensor):
        if role not in roles:
            return tensor
        return torch.fake_quantize_per_tensor_affine(tensor, *ranges[role], 0, 255)

    with torch.no_grad():
        assert torch.equal(reference_attention(msa, x, mask, observe), msa(x, mask))
        return reference_attention(msa, x, mask, quantize)


# WindowMSA

@pytest.fixture
def msa():
    return randomized(WindowMSA(embed_dims=16, num_heads=4, window_size=(3, 3)))


@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('changes', [
    {}, dict(num_heads=1), dict(qkv_bias=False), dict(qk_scale=0.3), dict(window_size=(2, 4))
])
def test_window_msa_off_equals_float(changes, masked):
    msa = randomized(WindowMSA(**{**dict(embed_dims=16, num_heads=4, window_size=(3, 3)),
                                  **changes}))
    tokens = math.prod(msa.window_size)
    x, mask = torch.randn(6, tokens, 16) * 3, window_mask(3, tokens) if masked else None
    op = convert(msa, QuantWindowMSA, {role: QuantSpec() for role in WINDOW_ROLES})
    expected = msa(x, mask)
    assert torch.equal(op(x, mask), expected)
    assert torch.equal(op(x, mask=mask), expected)
    calibrate(op, x, mask)
    assert not torch.equal(op(x, mask), expected)
    set_quantization(op, False)
    assert torch.equal(op(x, mask), expected)


def test_window_msa_off_equals_float_in_training_mode():
    msa = WindowMSA(16, 4, (3, 3), attn_drop_rate=0.3, proj_drop_rate=0.2)
    op = convert(msa, QuantWindowMSA, dict(attention=QuantSpec()))
    results = []
    for module in (msa, op):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 2 * 9 * 16).view(2, 9, 16).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        table = module.relative_position_bias_table
        results.append((y, x.grad, module.qkv.weight.grad, table.grad))
    assert results[0][3].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize('masked', [True, False])
@pytest.mark.parametrize('roles', [
    *[(role, ) for role in WINDOW_ROLES], ('query', 'key'), ('attention', 'value'), OPERANDS,
    ('logits', 'bias_table'), WINDOW_ROLES
], ids='-'.join)
def test_window_msa_equals_the_literal_reference(msa, roles, masked):
    x, mask = torch.randn(6, 9, 16) * 2, window_mask(3, 9) if masked else None
    op = convert(msa, QuantWindowMSA, dict.fromkeys(roles, QuantSpec(8, False)))
    y = calibrate(op, x, mask)(x, mask)
    assert torch.equal(y, reference_quantized_attention(msa, x, mask, roles))
    assert not torch.equal(y, msa(x, mask))
    assert sqnr_db(msa(x, mask), y) > 30


@pytest.mark.parametrize('role', WINDOW_ROLES)
def test_channels_are_heads(msa, role):
    x, seen = torch.randn(6, 9, 16), {}
    op = calibrate(convert(msa, QuantWindowMSA, {role: QuantSpec(4, True, 'per_channel')}), x)
    reference_attention(msa, x, None, lambda name, tensor: seen.setdefault(name, tensor))
    heads = seen[role].movedim(0 if role == 'bias_table' else 1, 0).flatten(1)
    assert torch.allclose(op.quantizers[role].scale, heads.abs().amax(1) / 7)


def test_masked_logits_do_not_widen_the_range(msa):
    # 'logits' is the result of the matmul: the -100 of the mask is added after it.
    x = torch.randn(6, 9, 16)
    op = calibrate(convert(msa, QuantWindowMSA, dict(logits=QuantSpec(8, False))), x,
                   window_mask(3, 9))
    assert op.quantizers['logits'].range()[0] > -50


# Swin block

def both_residuals(*arguments):
    return {role: QuantSpec(*arguments) for role in ('attention_residual', 'ffn_residual')}


@pytest.mark.parametrize('height, width', [(14, 14), (7, 7), (13, 9), (5, 3), (8, 15)])
@pytest.mark.parametrize('shift', [True, False])
def test_block_off_equals_float(shift, height, width):
    block = randomized(SwinBlock(16, 2, 32, window_size=7, shift=shift))
    x = torch.randn(2, height * width, 16)
    op = convert(block, QuantSwinBlock, both_residuals())
    op.attn.w_msa = QuantWindowMSA.from_float(op.attn.w_msa, dict(attention=QuantSpec()))
    expected = block(x, (height, width))
    assert torch.equal(op(x, (height, width)), expected)
    calibrate(op, x, (height, width))
    assert sqnr_db(expected, op(x, (height, width))) > 30
    assert not torch.equal(op(x, (height, width)), expected)


def test_block_with_checkpointing_off_equals_float():
    block = randomized(SwinBlock(16, 2, 32, window_size=4, shift=True, with_cp=True))
    op = convert(block, QuantSwinBlock, both_residuals())
    x = torch.randn(2, 30, 16, requires_grad=True)
    assert torch.equal(op(x, (5, 6)), block(x, (5, 6)))


@pytest.mark.parametrize('shift', [True, False])
def test_residual_is_quantized_twice(shift):
    block = randomized(SwinBlock(16, 2, 32, window_size=4, shift=shift))
    x, hw = torch.randn(2, 30, 16), (5, 6)
    op = calibrate(convert(block, QuantSwinBlock, both_residuals(8, False)), x, hw)
    y = op(x, hw)
    with torch.no_grad():
        first = x + block.attn(block.norm1(x), hw)
        second = first + block.ffn.layers(block.norm2(first))
        # Each addition has the range of what it gave in float.
        first_range, second_range = min_max(first), min_max(second)
        first = torch.fake_quantize_per_tensor_affine(first, *first_range, 0, 255)
        once = first + block.ffn.layers(block.norm2(first))
        twice = torch.fake_quantize_per_tensor_affine(once, *second_range, 0, 255)
    assert torch.equal(y, twice)
    assert not torch.equal(y, once)


# Patch embedding

@pytest.mark.parametrize('norm', [dict(type='LN'), None])
@pytest.mark.parametrize('height, width', [(32, 32), (30, 33), (4, 4), (3, 1), (17, 23)])
def test_patch_embed(norm, height, width):
    embed = randomized(PatchEmbed(3, 16, 'Conv2d', kernel_size=4, stride=4, norm_cfg=norm))
    x = torch.randn(2, 3, height, width)
    op = convert(embed, QuantPatchEmbed, dict(output=QuantSpec(8, False)))
    expected, shape = embed(x)
    tokens, same_shape = op(x)
    assert torch.equal(tokens, expected)
    assert same_shape == shape == (math.ceil(height / 4), math.ceil(width / 4))
    tokens, same_shape = calibrate(op, x)(x)
    assert same_shape == shape
    # After the norm, where there is one.
    assert torch.equal(tokens, fake(expected))
    assert sqnr_db(expected, tokens) > 30


# The whole backbone

def quantized(model, x, **settings):
    settings = merged(dict(weight=dict(rounding='nearest'), activation=dict(margin=0.),
                           roles={}, overrides={}), settings)
    apply_plan(model, plan_quantization(model, QuantizationSettings.from_dict(settings), ADAPTER))
    return calibrate(model, x)


def test_quantizers_of_operands():
    model = quantized(swin(), torch.randn(1, 3, 56, 56))
    names = {name for name, m in model.named_modules() if isinstance(m, Quantizer)}
    block = 'stages.1.blocks.1'
    names = {n[len(block) + 1:].replace('quantizers.', '') for n in names if n.startswith(block)}
    assert names == {
        'attn.w_msa.query', 'attn.w_msa.key', 'attn.w_msa.attention', 'attn.w_msa.value',
        *(f'{layer}.{role}' for role in ('weight', 'input') for layer in
          ('attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.0.0', 'ffn.layers.1'))}


def test_quantizers_of_v1():
    model = quantized(swin(), torch.randn(1, 3, 56, 56), placement='v1')
    names = {name.replace('quantizers.', '') for name, m in model.named_modules()
             if isinstance(m, Quantizer)}
    block = 'stages.0.blocks.1'
    assert {name[len(block) + 1:] for name in names if name.startswith(block)} == {
        'attention_residual', 'ffn_residual', 'attn.w_msa.logits', 'attn.w_msa.bias_table',
        *(f'{layer}.{role}' for role in ('weight', 'input', 'output')
          for layer in ('attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.1')),
        'ffn.layers.0.0.weight', 'ffn.layers.0.0.input'}
    assert {name for name in names if '.blocks.' not in name} == {
        'patch_embed.output', 'patch_embed.projection.weight', 'patch_embed.projection.input',
        *(f'stages.0.downsample.reduction.{role}' for role in ('weight', 'input', 'output'))}


@pytest.mark.parametrize('placement', ['operands', 'v1'])
@pytest.mark.parametrize('size', [(56, 56), (60, 36), (33, 50)])
def test_backbone(placement, size):
    model, x = swin(), torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        quantized(model, x, placement=placement)
        for y, reference in zip(model(x), expected):
            assert not torch.equal(y, reference)
            assert sqnr_db(reference, y) > 30
        set_quantization(model, False)
        assert all(torch.equal(a, b) for a, b in zip(model(x), expected))


def test_fewer_bits_are_worse():
    x, noise = torch.randn(2, 3, 56, 56), []
    for bits in (8, 6, 4):
        torch.manual_seed(0)
        model = swin()
        with torch.no_grad():
            expected = model(x)[1]
            model = quantized(model, x, weight=dict(bits=bits), activation=dict(bits=bits))
            noise.append(sqnr_db(expected, model(x)[1]))
    # A bit is worth 6 dB.
    assert noise[0] > noise[1] + 6 > noise[2] + 12


# Recording attention

class Watch:
    """What each w_msa gets, by hooks of the test's own."""

    def __init__(self, model):
        self.inputs = []
        self.modules = [m for m in model.modules() if isinstance(m, WindowMSA)]
        for module in self.modules:
            module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.inputs.append((module, args[0], kwargs['mask']))


def attention_by_hand(msa, x, mask):
    """attn @ v, window by window and head by head: (windows, N, heads, head_dim)."""
    heads, dim = msa.num_heads, msa.embed_dims // msa.num_heads
    tokens = x.shape[1]
    q, k, v = F.linear(x, msa.qkv.weight, msa.qkv.bias).split(msa.embed_dims, -1)
    out = torch.zeros(len(x), tokens, heads, dim)
    for window in range(len(x)):
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            logits = q[window, :, part] * dim**-0.5 @ k[window, :, part].T
            logits = logits + msa.relative_position_bias_table[msa.relative_position_index, head]
            if mask is not None:
                logits = logits + mask[window % len(mask)]
            out[window, :, head] = logits.softmax(-1) @ v[window, :, part]
    return out


def literal_valid(block, height, width):
    window = block.window_size
    marked = F.pad(torch.ones(1, height, width, 1),
                   (0, 0, 0, -width % window, 0, -height % window))
    marked = torch.roll(marked, (-block.shift_size, -block.shift_size), (1, 2))
    return block.window_partition(marked).view(-1, window**2) == 1


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('size, tokens', [
    ((56, 56), [(14, 14)] * 2 + [(7, 7)] * 2), ((60, 36), [(15, 9)] * 2 + [(8, 5)] * 2),
    ((28, 45), [(7, 12)] * 2 + [(4, 6)] * 2)
])
def test_record_attention(size, tokens, whole):
    backbone = swin()
    model, watch = Detector(backbone) if whole else backbone, Watch(backbone)
    with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
        ADAPTER.forward_backbone(model, torch.randn(2, 3, *size))
        records = recorder.pop_all()
    blocks = [m for m in backbone.modules() if isinstance(m, ShiftWindowMSA)]
    assert len(records) == len(blocks) == len(watch.inputs) == 4
    for record, block, (height, width), (module, x, mask) in zip(records, blocks, tokens,
                                                                 watch.inputs):
        assert module is block.w_msa
        windows = math.ceil(height / 7) * math.ceil(width / 7)
        assert record.output.shape == (2 * windows, 49, module.num_heads,
                                       module.embed_dims // module.num_heads)
        with torch.no_grad():
            assert torch.allclose(record.output, attention_by_hand(module, x, mask), atol=1e-5)
        valid = literal_valid(block, height, width)
        if valid.all():
            assert record.valid is None
        else:
            assert torch.equal(record.valid, valid)
            assert record.valid.shape == (windows, 49)
    assert any(mask is not None for _, _, mask in watch.inputs)


def test_records_have_gradients():
    model, x = swin(), torch.randn(1, 3, 28, 28, requires_grad=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with ADAPTER.record_attention(model) as recorder:
        model(x)
        records = recorder.pop_all()
    for record in records:
        gradient, = torch.autograd.grad(record.output.square().sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_take():
    model, x = swin(), torch.randn(1, 3, 28, 28)
    with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
        assert recorder.pop_all() == []
        model(x)
        first = recorder.pop_all()
        assert recorder.pop_all() == []
        model(x)
        model(x)
        assert len(first) == 4
        both = recorder.pop_all()
    assert len(both) == 8
    for a, b, c in zip(first, both, both[4:]):
        assert torch.equal(a.output, b.output) and torch.equal(a.output, c.output)


def hooks(model):
    return [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in
            model.named_modules()]


@pytest.mark.parametrize('fails', [True, False])
def test_recording_leaves_nothing_behind(fails):
    model, x = swin(with_cp=True), torch.randn(1, 3, 28, 28)
    blocks = [m for m in model.modules() if isinstance(m, SwinBlock)]
    blocks[1].with_cp = False
    before, flags = hooks(model), [block.with_cp for block in blocks]
    try:
        with ADAPTER.record_attention(model) as recorder:
            assert not any(block.with_cp for block in blocks)
            assert hooks(model) != before
            model(x)
            assert len(recorder.records) == 4
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert hooks(model) == before
    assert [block.with_cp for block in blocks] == flags == [True, False, True, True]
    model(x)
    assert len(recorder.records) == 4


def test_recording_changes_no_result():
    model, x = swin(), torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = model(x)
        with ADAPTER.record_attention(model):
            assert all(torch.equal(a, b) for a, b in zip(model(x), expected))


@pytest.mark.parametrize('placement', ['operands', 'v1'])
def test_recording_a_quantized_model(placement):
    model, x = swin(), torch.randn(1, 3, 40, 40)

    def record():
        with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
            model(x)
            return recorder.pop_all()

    plain = record()
    quantized(model, x, placement=placement)
    records = record()
    assert len(records) == len(plain) == 4
    for a, b in zip(plain, records):
        assert not torch.equal(a.output, b.output)
        assert sqnr_db(a.output, b.output) > 25
        assert torch.equal(a.valid, b.valid)


# The adapter's answers

def test_find_adapter():
    assert type(find_adapter(swin())) is MMDetSwinAdapter
    assert type(find_adapter(Detector())) is MMDetSwinAdapter
    resnet = ResNet(18)
    for model, name in ((Detector(resnet), 'model.backbone'), (resnet, 'model')):
        with pytest.raises(UserError, match=f'^{name} is ResNet; expected a Swin'):
            find_adapter(model)
    with pytest.raises(UserError, match='^model is Linear; expected a Swin'):
        find_adapter(nn.Linear(2, 2))


def test_backbone_name_and_scope():
    assert ADAPTER.backbone_name(swin()) == ''
    detector = Detector()
    assert ADAPTER.backbone_name(detector) == 'backbone'
    inside = dict(backbone=True, neck=False, backbone_b=False)
    inside.update({'backbone.stages.0': True, 'neck.backbone': False, 'backbone_b.c': False})
    for name, expected in inside.items():
        assert ADAPTER.in_scope(detector, name, 'backbone') is expected
        assert ADAPTER.in_scope(detector, name, 'model')
        assert ADAPTER.in_scope(detector.backbone, name, 'backbone')


def test_runs_on_proposals():
    detector = Detector()
    for name in ('roi_head.bbox_head.fc_cls', 'roi_head.mask_head.convs.0.conv'):
        assert ADAPTER.runs_on_proposals(detector, name)
    for name in ('backbone.stages.0', 'neck.fpn_convs.0.conv', 'rpn_head.rpn_conv', 'roi_head_b.c',
                 'backbone.roi_head.fc', ''):
        assert not ADAPTER.runs_on_proposals(detector, name)


def test_norm_readers():
    model = Detector()
    blocks = [f'backbone.stages.{i}.blocks.{j}' for i in (0, 1) for j in (0, 1)]
    assert ADAPTER.norm_readers(model) == {
        **{f'{name}.norm1': f'{name}.attn.w_msa.qkv' for name in blocks},
        **{f'{name}.norm2': f'{name}.ffn.layers.0.0' for name in blocks},
        'backbone.stages.0.downsample.norm': 'backbone.stages.0.downsample.reduction'}
    assert 'stages.0.blocks.0.norm1' in ADAPTER.norm_readers(model.backbone)


def test_norms_that_may_be_read_otherwise_are_left():
    model = Detector()

    class OtherBlock(SwinBlock):
        """Some other use of its norms."""

    model.backbone.stages[0].blocks[0].__class__ = OtherBlock
    model.backbone.stages[0].blocks[1].norm1 = nn.Identity()
    model.backbone.stages[1].blocks[0].norm2 = nn.LayerNorm(32, elementwise_affine=False)
    model.backbone.stages[1].blocks[1].attn.w_msa.qkv = nn.Identity()
    assert list(ADAPTER.norm_readers(model)) == [
        'backbone.stages.0.blocks.1.norm2', 'backbone.stages.0.downsample.norm',
        'backbone.stages.1.blocks.0.norm1', 'backbone.stages.1.blocks.1.norm2']


def test_norms_that_are_shared_are_left():
    model = Detector()
    blocks = model.backbone.stages[0].blocks
    blocks[1].norm1 = blocks[0].norm1
    blocks[1].ffn.layers[0][0].weight = blocks[0].ffn.layers[0][0].weight
    assert [name for name in ADAPTER.norm_readers(model) if 'stages.0' in name] == [
        'backbone.stages.0.downsample.norm']


def test_output_points_and_patch_embedding():
    detector = Detector()
    names = [name for name, _ in detector.named_modules()]
    layers = ('attn.w_msa.qkv', 'attn.w_msa.proj', 'ffn.layers.1')
    assert {name for name in names if ADAPTER.is_output_point(detector, name)} == {
        'backbone.patch_embed', 'backbone.stages.0.downsample.reduction',
        *(f'backbone.stages.{s}.blocks.{b}.{layer}' for s in (0, 1) for b in (0, 1)
          for layer in layers)}
    assert [name for name in names if ADAPTER.is_patch_embed(detector, name)] == [
        'backbone.patch_embed.projection']
    assert not ADAPTER.is_output_point(detector, 'neck.attn.w_msa.qkv')
    assert not ADAPTER.is_output_point(detector, 'backbone.stages.0.my_patch_embed')
    assert ADAPTER.is_output_point(detector.backbone, 'patch_embed')
    assert ADAPTER.is_patch_embed(detector.backbone, 'patch_embed.projection')
    assert not ADAPTER.is_patch_embed(detector.backbone, 'backbone.patch_embed.projection')


def test_valid_range():
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    low, high = ADAPTER.valid_range(Detector(mean=mean, std=std, bgr_to_rgb=True))
    assert low.shape == high.shape == (1, 3, 1, 1)
    for channel in range(3):
        assert low[0, channel].item() == pytest.approx(-mean[channel] / std[channel])
        assert high[0, channel].item() == pytest.approx((255 - mean[channel]) / std[channel])


def test_valid_range_by_the_preprocessor_itself():
    detector = Detector(mean=[100., 110., 120.], std=[50., 60., 70.])
    pixels = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 255)]
    batch = detector.data_preprocessor(dict(inputs=pixels))['inputs']
    low, high = ADAPTER.valid_range(detector)
    assert torch.allclose(batch[0], low[0].expand(3, 8, 8))
    assert torch.allclose(batch[1], high[0].expand(3, 8, 8))


def test_valid_range_without_normalization():
    for model in (swin(), Detector()):
        low, high = ADAPTER.valid_range(model)
        assert low.flatten().tolist() == [0.] * 3
        assert high.flatten().tolist() == [255.] * 3
    low, high = ADAPTER.valid_range(Detector(swin(in_channels=1), mean=[100.], std=[50.]))
    assert low.shape == high.shape == (1, 1, 1, 1)
    assert (low.item(), high.item()) == (pytest.approx(-2.), pytest.approx(3.1))


def test_valid_range_of_a_wrong_preprocessor():
    for changes in (dict(std=[1., 0., 1.]), dict(std=[1., -1., 1.])):
        with pytest.raises(UserError, match='model.data_preprocessor: mean and std'):
            ADAPTER.valid_range(Detector(mean=[0., 0., 0.], **changes))
    with pytest.raises(UserError, match='one value for each of 4 channels'):
        ADAPTER.valid_range(Detector(swin(in_channels=4), mean=[0.] * 3, std=[1.] * 3))


def test_forward():
    detector, x = Detector(), torch.randn(2, 3, 28, 36)
    with torch.no_grad():
        expected = detector.backbone(x)
        features = ADAPTER.forward_backbone(detector, x)
        assert isinstance(features, tuple)
        assert all(torch.equal(a, b) for a, b in zip(features, expected))
        assert len(features) == 2
        ADAPTER.forward(detector, x, 'backbone')
        assert detector.calls == []
        ADAPTER.forward(detector, x, 'model')
    (inputs, samples, mode), = detector.calls
    assert inputs is x
    assert mode == 'tensor'
    assert [sample.img_id for sample in samples] == [0, 1]
    for sample in samples:
        for key in ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'):
            assert sample.metainfo[key] == (28, 36)


def test_forward_of_a_backbone_as_a_model():
    with torch.no_grad():
        images, model = torch.randn(1, 3, 28, 28), swin()
        assert all(map(torch.equal, ADAPTER.forward_model(model, images), model(images)))


def test_ops_are_instances_of_the_host_classes():
    for op, host in ((QuantWindowMSA, WindowMSA), (QuantSwinBlock, SwinBlock),
                     (QuantPatchEmbed, PatchEmbed)):
        assert issubclass(op, host) and issubclass(op, QuantOp)


def test_swin_v2_is_refused():
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    model = SwinTransformerV2(img_size=32, embed_dim=8, depths=(1, ), num_heads=(1, ),
                              window_size=4)
    with pytest.raises(UserError, match='model is SwinTransformerV2: Swin V2 is not supported'):
        psaq_mm.quantize(model)
