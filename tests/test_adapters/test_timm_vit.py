# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""timm's ViT and DeiT: quantized modules against the host's own, recorder, layouts."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import plain_student
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import psaq_mm
from psaq_mm import SynthesisSettings
from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.timm_vit import (
    DEIT_III_AUTHORS,
    QuantTimmAttention,
    QuantTimmViTBlock,
    TimmViTAdapter,
)
from psaq_mm.checkpoint import load_float_weights
from psaq_mm.classification import TimmClassifier
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, set_quantization
from psaq_mm.quantization import Quantizer, QuantSpec, sqnr_db

ADAPTER = TimmViTAdapter()
DEIT, DISTILLED, DEIT_III = ('deit_tiny_patch16_224', 'deit_tiny_distilled_patch16_224',
                             'deit3_small_patch16_224')
TINY = dict(img_size=64, embed_dim=16, depth=2, num_heads=2, num_classes=5)
ASYMMETRIC = QuantSpec(8, False)
OPERANDS = ('query', 'key', 'attention', 'value')
ROLES = (*OPERANDS, 'logits')


def randomized(module):
    """Parameters that are 0, 1 or tiny at first have no effect: draw them."""
    for name, parameter in module.named_parameters():
        if 'bias' in name or 'token' in name or 'pos_embed' in name:
            nn.init.normal_(parameter, std=0.5)
        elif parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return module.eval()


def vit(name=DEIT, **changes):
    return randomized(timm.create_model(name, **{**TINY, **changes}))


def classifier(name=DEIT, **changes):
    return randomized(TimmClassifier(name, **{**TINY, **changes}))


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


# Attention


def attention(fused=False, **changes):
    module = Attention(**{**dict(dim=16, num_heads=4, qkv_bias=True, norm_layer=nn.LayerNorm),
                          **changes})
    module.fused_attn = fused
    return randomized(module)


def masks(tokens):
    mask = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = mask | torch.eye(tokens, dtype=torch.bool)  # a token sees itself at least
    return dict(none={}, boolean=dict(attn_mask=mask), causal=dict(is_causal=True),
                added=dict(attn_mask=torch.randn(tokens, tokens)))


OPTIONS = [{}, dict(num_heads=1), dict(qkv_bias=False), dict(attn_head_dim=6),
           dict(qk_norm=True), dict(scale_norm=True), dict(gated=True),
           dict(qk_norm=True, scale_norm=True, gated=True, dim_out=12)]


@pytest.mark.parametrize('mask', ['none', 'boolean', 'added', 'causal'])
@pytest.mark.parametrize('changes', OPTIONS)
def test_attention_off_equals_float(changes, mask):
    attn, x = attention(**changes), torch.randn(3, 9, 16) * 3
    given = masks(9)[mask]
    with torch.no_grad():
        expected = attn(x, **given)
        op = calibrated(attn, QuantTimmAttention, ROLES, x)
        assert not torch.equal(op(x, **given), expected)
        set_quantization(op, False)
        assert torch.equal(op(x, **given), expected)
        attn.fused_attn = True
        assert torch.allclose(op(x, **given), attn(x, **given), atol=1e-6)


def test_attention_off_equals_float_in_training_mode():
    attn = Attention(16, 4, attn_drop=0.3, proj_drop=0.2)
    attn.fused_attn, results = False, []
    op = QuantTimmAttention.from_float(copy.deepcopy(attn), dict(attention=QuantSpec()))
    for module in (attn, op):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 2 * 9 * 16).view(2, 9, 16).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append((y, x.grad, module.qkv.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def reference_attention(attn, x, pass_on):
    """timm's forward without fusion, each tensor that has a role through ``pass_on``."""
    B, N, C = x.shape
    qkv = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = pass_on('logits', pass_on('query', q * attn.scale)
                     @ pass_on('key', k).transpose(-2, -1))
    weights = pass_on('attention', logits.softmax(-1))
    out = attn.norm((weights @ pass_on('value', v)).transpose(1, 2).reshape(B, N, attn.attn_dim))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj(out)


@pytest.mark.parametrize('changes', [{}, OPTIONS[-1]])
@pytest.mark.parametrize('roles', [*[(role, ) for role in ROLES], OPERANDS, ROLES], ids='-'.join)
def test_attention_equals_the_literal_reference(roles, changes):
    attn, x, ranges = attention(**changes), torch.randn(3, 9, 16) * 2, {}

    def observe(role, tensor):
        ranges[role] = min_max(tensor)
        return tensor

    with torch.no_grad():
        y = calibrated(attn, QuantTimmAttention, roles, x)(x)
        assert torch.equal(reference_attention(attn, x, observe), attn(x))
        assert torch.equal(y, reference_attention(attn, x, lambda role, tensor: fake(
            tensor, ranges[role]) if role in roles else tensor))
        assert not torch.equal(y, attn(x))
        assert sqnr_db(attn(x), y) > 25


@pytest.mark.parametrize('role', ROLES)
def test_channels_are_heads(role):
    op = calibrated(attention(), QuantTimmAttention, (role, ), torch.randn(3, 9, 16),
                    spec=QuantSpec(8, False, 'per_channel'))
    assert op.quantizers[role].scale.shape == (4, )


def test_attention_is_never_fused(monkeypatch):
    model, x = vit(), torch.randn(1, 3, 64, 64)
    expected = model(x)

    def fused(*args, **kwargs):
        raise AssertionError('fused attention')

    monkeypatch.setattr(F, 'scaled_dot_product_attention', fused)
    with pytest.raises(AssertionError, match='fused'):
        model(x)
    model = plain_student(model)
    psaq_mm.calibrate(model, x)
    assert sqnr_db(expected, model(x)) > 20


# Block


@pytest.mark.parametrize('changes', [{}, dict(init_values=0.3, scale_mlp_norm=True)])
def test_block(changes):
    block = randomized(Block(16, 2, norm_layer=nn.LayerNorm, **changes))
    block.attn.fused_attn = False
    x = torch.randn(2, 9, 16)
    with torch.no_grad():
        op = calibrated(block, QuantTimmViTBlock, ('attention_residual', 'ffn_residual'), x)
        attended = x + block.ls1(block.attn(block.norm1(x)))
        whole = attended + block.ls2(block.mlp(block.norm2(attended)))
        assert torch.equal(block(x), whole)
        middle = fake(attended)
        assert torch.equal(op(x), fake(middle + block.ls2(block.mlp(block.norm2(middle))),
                                       min_max(whole)))
        set_quantization(op, False)
        for given in masks(9).values():
            assert torch.equal(op(x, **given), block(x, **given))


# The whole model

LAYERS = ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')


def quantizer_names(model):
    return {name.replace('quantizers.', '') for name, module in model.named_modules()
            if isinstance(module, Quantizer)}


def expected_names(name, placement, scope):
    blocks = ['blocks.0', 'blocks.1']
    linear = [*(f'{block}.{layer}' for block in blocks for layer in LAYERS), 'patch_embed.proj']
    if scope == 'model':
        linear += ['head', 'head_dist'] if name == DISTILLED else ['head']
    names = {f'{layer}.{role}' for layer in linear for role in ('weight', 'input')}
    if placement == 'operands':
        return names | {f'{block}.attn.{role}' for block in blocks for role in OPERANDS}
    return names | {'patch_embed.output'} | {f'{block}.{point}' for block in blocks for point in (
        'attention_residual', 'ffn_residual', 'attn.logits', 'attn.qkv.output',
        'attn.proj.output', 'mlp.fc2.output')}


@pytest.mark.parametrize('build', [vit, classifier])
@pytest.mark.parametrize('name', [DEIT, DISTILLED])
@pytest.mark.parametrize('scope', ['backbone', 'model'])
@pytest.mark.parametrize('placement', ['operands', 'v1'])
def test_every_quantizer_is_calibrated(placement, scope, name, build):
    model, x = build(name), torch.randn(2, 3, 64, 64)
    prefix = 'model.' if build is classifier else ''
    with torch.no_grad():
        expected = model(x)
        model = plain_student(model, placement=placement, scope=scope)
        assert torch.allclose(model(x), expected, atol=1e-6)  # not fused any more
        assert quantizer_names(model) == {
            prefix + point for point in expected_names(name, placement, scope)}
        psaq_mm.calibrate(model, x)
        assert all(m.calibrated for m in model.modules() if isinstance(m, Quantizer))
        y = model(x)
        assert not torch.allclose(y, expected, atol=1e-5) and sqnr_db(expected, y) > 20
        psaq_mm.unwrap(model)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize('scope', ['backbone', 'model'])
@pytest.mark.parametrize('changes', [
    dict(global_pool='map', class_token=False), dict(global_pool='avg'), dict(reg_tokens=2),
    dict(dynamic_img_size=True), dict(init_values=0.1)])
def test_other_vits_are_calibrated_too(changes, scope):
    model, x = vit(**changes), torch.randn(2, 3, 64, 64)
    model = plain_student(model, scope=scope, placement='v1')
    psaq_mm.calibrate(model, x)
    assert any(name.startswith(('head', 'attn_pool')) for name, _ in named_quant_ops(model)) \
        is (scope == 'model')


@pytest.mark.parametrize('build', [vit, classifier])
@pytest.mark.parametrize('scope', ['backbone', 'model'])
def test_round_trip(build, scope, tmp_path):
    model, x = build(), torch.randn(2, 3, 64, 64)
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


@pytest.mark.parametrize('build', [vit, classifier])
def test_synthesize(build):
    model = build()
    images = psaq_mm.synthesize(model, SynthesisSettings(
        num_images=2, batch_size=2, image_size=64, steps=3, lr=100.))
    assert images.shape == (2, 3, 64, 64)
    low, high = ADAPTER.valid_range(model)
    assert torch.allclose(images.amin((0, 2, 3)), low.flatten())
    assert torch.allclose(images.amax((0, 2, 3)), high.flatten())


# Recording attention


def attention_by_hand(attn, x):
    """attn @ v, image by image and head by head: (B, N, heads, head_dim)."""
    heads, dim = attn.num_heads, attn.head_dim
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).split(attn.attn_dim, -1)
    out = torch.zeros(len(x), x.shape[1], heads, dim)
    for image in range(len(x)):
        for head in range(heads):
            part = slice(head * dim, (head + 1) * dim)
            query, key = attn.q_norm(q[image, :, part]), attn.k_norm(k[image, :, part])
            out[image, :, head] = (query * dim**-0.5 @ key.T).softmax(-1) @ v[image, :, part]
    return out


@pytest.mark.parametrize('build', [vit, classifier])
@pytest.mark.parametrize('name, changes, prefix', [
    (DEIT, {}, 1), (DISTILLED, {}, 2), (DEIT, dict(reg_tokens=3), 4),
    (DEIT, dict(class_token=False, global_pool='avg'), 0),
    (DEIT, dict(scale_attn_norm=True, qk_norm=True), 1)])
def test_record_attention(name, changes, prefix, build):
    model, seen = build(name, **changes), []
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    handles = [attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
               for attn in attentions]
    with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
        ADAPTER.forward_backbone(model, torch.randn(2, 3, 64, 64))
        records = recorder.pop_all()
        assert recorder.pop_all() == []
    for handle in handles:
        handle.remove()
    assert len(records) == len(attentions) == 2
    for record, attn, x in zip(records, attentions, seen):
        assert x.shape[1] == 16 + prefix
        assert record.output.shape == (2, 16, 2, 8)
        assert record.valid is None
        with torch.no_grad():
            assert torch.allclose(record.output, attention_by_hand(attn, x)[:, prefix:],
                                  atol=1e-5)


def test_records_have_gradients():
    model, x = vit(), torch.randn(1, 3, 64, 64, requires_grad=True)
    with ADAPTER.record_attention(model) as recorder:
        model(x)
        for record in recorder.pop_all():
            gradient, = torch.autograd.grad(record.output.square().sum(), x, retain_graph=True)
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize('placement', ['operands', 'v1'])
def test_recording_a_quantized_model(placement):
    model, x = classifier(), torch.randn(1, 3, 64, 64)

    def record():
        with torch.no_grad(), ADAPTER.record_attention(model) as recorder:
            model(x)
            return recorder.pop_all()

    plain = record()
    model = plain_student(model, placement=placement)
    psaq_mm.calibrate(model, x)
    records = record()
    assert len(records) == len(plain) == 2
    for a, b in zip(plain, records):
        assert not torch.equal(a.output, b.output)
        assert sqnr_db(a.output, b.output) > 20


@pytest.mark.parametrize('fails', [True, False])
def test_recording_leaves_nothing_behind(fails):
    model, x = vit(), torch.randn(1, 3, 64, 64)
    model.set_grad_checkpointing(True)

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    with torch.no_grad():
        expected, before = model(x), hooks()
        try:
            with ADAPTER.record_attention(model) as recorder:
                assert not model.grad_checkpointing
                assert hooks() != before
                assert torch.equal(model(x), expected)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert hooks() == before
        assert model.grad_checkpointing
        model(x)
        assert len(recorder.records) == 2


def test_blocks_without_attention_of_their_own():
    model = timm.create_model('vit_base_patch16_rpn_224', **TINY)
    with ADAPTER.record_attention(model) as recorder:  # other blocks, the same attention
        model(torch.randn(1, 3, 64, 64))
    assert len(recorder.records) == 2
    parallel = VisionTransformer(**TINY, block_fn=timm.models.vision_transformer.
                                 ParallelScalingBlock)
    with pytest.raises(UserError, match='ParallelScalingBlock, have no attention'), \
            ADAPTER.record_attention(parallel):
        pass


# The adapter's answers


def test_find_adapter():
    for name in (DEIT, DISTILLED):
        assert type(find_adapter(vit(name))) is TimmViTAdapter
        assert type(find_adapter(classifier(name))) is TimmViTAdapter
    assert not ADAPTER.matches(nn.Linear(2, 2))
    assert not ADAPTER.matches(timm.create_model('resnet18'))


@pytest.mark.parametrize('build', [vit, classifier])
def test_names(build):
    model = build(DISTILLED)
    prefix = 'model.' if build is classifier else ''
    assert ADAPTER.backbone_name(model) == prefix.rstrip('.')
    for name in ('head', 'head_dist', 'fc_norm', 'attn_pool.q'):
        assert not ADAPTER.in_scope(model, prefix + name, 'backbone')
        assert ADAPTER.in_scope(model, prefix + name, 'model')
    for name in ('blocks.0', 'norm', 'patch_embed', 'blocks.0.head', 'head_drop'):
        assert ADAPTER.in_scope(model, prefix + name, 'backbone')
    assert [name for name, _ in model.named_modules() if ADAPTER.is_patch_embed(model, name)] == [
        prefix + 'patch_embed.proj']
    assert ADAPTER.predictors(model) == {prefix + name for name in {'head', 'head_dist'}}
    assert not ADAPTER.is_output_point(model, prefix + 'attn_pool.mlp.fc2')
    blocks = [f'{prefix}blocks.{i}' for i in range(2)]
    assert ADAPTER.norm_readers(model) == {
        **{f'{name}.norm1': f'{name}.attn.qkv' for name in blocks},
        **{f'{name}.norm2': f'{name}.mlp.fc1' for name in blocks}}
    assert ADAPTER.is_rgb(model)


def test_norms_that_a_gate_reads_too_are_left():
    model = vit()
    model.blocks[0].attn = attention(gated=True)
    assert list(ADAPTER.norm_readers(model)) == ['blocks.0.norm2', 'blocks.1.norm1',
                                                 'blocks.1.norm2']


def test_valid_range():
    for build in (vit, classifier):
        low, high = ADAPTER.valid_range(build('vit_tiny_patch16_224'))  # 0.5 and 0.5
        assert low.flatten().tolist() == [-1.] * 3 and high.flatten().tolist() == [1.] * 3
        low, high = ADAPTER.valid_range(build())
        assert low.flatten().tolist() == pytest.approx([-2.11790, -2.03571, -1.80444], abs=1e-5)
        assert high.shape == (1, 3, 1, 1)


def test_forward():
    model, x = classifier(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features, = ADAPTER.forward_backbone(model, x)
        assert torch.equal(features, model.model.forward_features(x))
        assert torch.equal(model.model.forward_head(features), model(x))


def test_image_size():
    for model in (vit(), classifier()):
        ADAPTER.check_image_size(model, (64, 64))
        with pytest.raises(UserError, match=r'synthesis.image_size must be 64, .*got \[64, 32\]$'):
            ADAPTER.check_image_size(model, (64, 32))
    dynamic = vit(dynamic_img_size=True)
    ADAPTER.check_image_size(dynamic, (32, 80))
    with pytest.raises(UserError, match='must be a multiple of 16, .*got 40$'):
        ADAPTER.check_image_size(dynamic, (40, 40))
    ADAPTER.check_image_size(vit(dynamic_img_size=True, dynamic_img_pad=True), (40, 40))


# Layouts


def as_of_deit_iii(model):
    """The state dict of a bare timm model in the keys of DeiT III's authors."""
    return {key.replace('ls1.gamma', 'gamma_1').replace('ls2.gamma', 'gamma_2'): value
            for key, value in model.state_dict().items()}


@pytest.mark.parametrize('name, build, layout', [
    (DEIT, vit, 'timm'), (DEIT, classifier, 'psaq_mm'), (DEIT, classifier, 'timm'),
    (DISTILLED, classifier, 'timm'), (DEIT_III, vit, DEIT_III_AUTHORS),
    (DEIT_III, classifier, DEIT_III_AUTHORS)])
def test_layouts(name, build, layout, tmp_path):
    source, target, x = vit(name), build(name), torch.randn(2, 3, 64, 64)
    state = source.state_dict()
    if layout == DEIT_III_AUTHORS:
        state = as_of_deit_iii(source)
        assert set(state) != set(source.state_dict())
    elif layout == 'psaq_mm':
        state = {f'model.{key}': value for key, value in state.items()}
    if build is classifier:
        assert ADAPTER.layouts[layout] in state
    result, found = ADAPTER.convert_state(target, state)
    assert found == layout
    assert set(result) == set(target.state_dict())
    torch.save(dict(model=state), tmp_path / 'model.pth')
    with torch.no_grad():
        assert not torch.equal(target(x), source(x))
        load_float_weights(target, str(tmp_path / 'model.pth'))
        assert torch.equal(target(x), source(x))


def test_unknown_layout():
    for state in ({}, {'backbone.blocks.0.x': torch.zeros(1)}, {'layers.0.x': torch.zeros(1)}):
        assert ADAPTER.convert_state(classifier(), state) == (state, '')


@pytest.mark.parametrize('name, layout', [(DEIT, 'timm'), (DEIT_III, DEIT_III_AUTHORS)])
@pytest.mark.parametrize('changes, difference', [
    (dict(depth=1), 'missing'), (dict(embed_dim=32), 'another shape'),
    (dict(img_size=96), 'another shape'), (dict(patch_size=8), 'another shape'),
    (dict(num_classes=7), 'another shape')])
def test_another_model_is_reported(name, layout, changes, difference, tmp_path):
    target, other = classifier(name), vit(name, **changes)
    state = as_of_deit_iii(other) if layout == DEIT_III_AUTHORS else other.state_dict()
    result, found = ADAPTER.convert_state(target, state)
    assert found == layout
    # Nothing is resized to fit, and nothing is lost.
    assert {key[len('model.'):]: value.shape for key, value in result.items()} == {
        key: value.shape for key, value in other.state_dict().items()}
    torch.save(dict(model=state), tmp_path / 'model.pth')
    with pytest.raises(UserError, match=f'is not a checkpoint of this model.*{difference}'):
        load_float_weights(target, str(tmp_path / 'model.pth'))


def test_ops_are_instances_of_the_host_classes():
    for op, host in ((QuantTimmAttention, Attention), (QuantTimmViTBlock, Block)):
        assert issubclass(op, host)
