# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Published layouts: the same network after conversion, shown by its outputs."""
import pytest
import timm
import torch
from conftest import ROOT, load_script
from mmdet.models.backbones import SwinTransformer as MMDetSwin
from mmseg.models.backbones import SwinTransformer as MMSegSwin
from torch import nn

from psaq_mm import UserError
from psaq_mm.adapters.swin_layouts import (
    OPENMMLAB,
    SWIN_AUTHORS,
    convert_openmmlab_swin,
    from_swin_authors,
    reorder_patch_merging,
)
from psaq_mm.checkpoint import load_float_weights

LAYOUTS = load_script(ROOT / 'benchmarks' / 'published_layouts.py')
concatenated = LAYOUTS.concatenated
to_swin_authors_detection = LAYOUTS.to_swin_authors_detection
SMALL = dict(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1))


def old_patch_merging(x, norm, reduction):
    """The Swin authors' formula, on x of shape (B, H, W, C)."""
    x0, x1 = x[:, 0::2, 0::2], x[:, 1::2, 0::2]
    x2, x3 = x[:, 0::2, 1::2], x[:, 1::2, 1::2]
    return reduction(norm(torch.cat([x0, x1, x2, x3], -1)))


def new_patch_merging(x, norm, reduction):
    """OpenMMLab's formula, on the same."""
    unfolded = nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2))  # (B, 4C, H/2*W/2)
    out = reduction(norm(unfolded.transpose(1, 2)))
    return out.view(len(x), x.shape[1] // 2, x.shape[2] // 2, -1)


@pytest.mark.parametrize('channels', [1, 3, 8])
def test_patch_merging_by_both_formulas(channels):
    x = torch.randn(2, 6, 4, channels, dtype=torch.float64)
    norm = nn.LayerNorm(4 * channels).double()
    reduction = nn.Linear(4 * channels, 2 * channels, bias=False).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        expected = old_patch_merging(x, norm, reduction)
        for parameter in (norm.weight, norm.bias, reduction.weight):
            parameter.copy_(reorder_patch_merging(parameter))
        converted = new_patch_merging(x, norm, reduction)
    assert float((converted - expected).abs().max()) <= 1e-6
    # and it does change something
    assert channels == 1 or not torch.equal(reorder_patch_merging(reduction.weight),
                                            reduction.weight)


def test_order_by_hand():
    # two channels, a and b, of the four places: upper left, lower left, upper right, lower right
    old = torch.tensor([0., 1., 10., 11., 20., 21., 30., 31.])
    new = [0., 20., 10., 30., 1., 21., 11., 31.]  # a: row by row; then b
    assert reorder_patch_merging(old).tolist() == new
    assert concatenated(torch.tensor(new)).tolist() == old.tolist()


def timm_swin_in_the_authors_layout(model):
    """timm keeps the authors' code but for where a patch merging stands: at the
    beginning of the next stage. Its own classifier's keys are left out."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith('layers.') and '.downsample.' in key:
            stage = int(key.split('.')[1])
            key = key.replace(f'layers.{stage}.', f'layers.{stage - 1}.')
        if not key.startswith(('head.', 'norm.')):
            state[key] = value
    return state


@pytest.mark.parametrize('host', [MMDetSwin, MMSegSwin])
def test_against_the_swin_of_timm(host):
    """An implementation by others, with the old order of channels: after the
    conversion the feature maps agree."""
    theirs = timm.create_model('swin_tiny_patch4_window7_224', embed_dim=16, depths=(2, 2, 2),
                               num_heads=(1, 2, 4), num_classes=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = host(embed_dims=16, depths=(2, 2, 2), num_heads=(1, 2, 4), strides=(4, 2, 2),
                out_indices=(0, 1, 2))
    ours.eval()
    state = timm_swin_in_the_authors_layout(theirs)
    converted, layout = convert_openmmlab_swin(state, '')
    assert layout == SWIN_AUTHORS
    missing, unexpected = ours.load_state_dict(converted, strict=False)
    assert not unexpected
    assert all('relative_position_index' in k or k.startswith('norm') for k in missing)
    # 56, 28 and 14 tokens a side: where there is but one window, timm does not shift it
    images = torch.randn(1, 3, 224, 224)
    for name in ('norm0', 'norm1', 'norm2'):  # of the detector's own, not of the backbone
        setattr(ours, name, nn.Identity())
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, intermediates_only=True)
        maps = ours(images)
    for one, other in zip(maps, expected):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    # without the reorder they do not
    plain = {k: v if '.downsample.' not in k else concatenated(v)
             for k, v in converted.items()}
    ours.load_state_dict(plain, strict=False)
    with torch.no_grad():
        assert not torch.allclose(ours(images)[1], expected[1], atol=1e-2)


@pytest.mark.parametrize('host', [MMDetSwin, MMSegSwin])
def test_round_trip(host):
    model = host(**SMALL)
    state = {'backbone.' + k: torch.randn(v.shape) if v.is_floating_point() else v
             for k, v in model.state_dict().items()}
    state['neck.lateral_convs.0.conv.weight'] = torch.randn(2, 2, 1, 1)
    published = to_swin_authors_detection(state)
    assert not any('stages' in k or 'w_msa' in k or 'ffn' in k for k in published)
    # buffers that other versions of that code saved
    published['backbone.layers.0.blocks.1.attn_mask'] = torch.zeros(4, 49, 49)
    converted, layout = convert_openmmlab_swin(published, 'backbone')
    assert layout == SWIN_AUTHORS
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[k], state[k]) for k in state)


def test_relative_positions_are_counted_alike():
    """Tables are taken as they are, since both count positions the same way."""
    theirs = timm.create_model('swin_tiny_patch4_window7_224', num_classes=0)
    ours = MMDetSwin(**SMALL)
    assert torch.equal(theirs.layers[0].blocks[0].attn.relative_position_index,
                       ours.stages[0].blocks[0].attn.w_msa.relative_position_index)


def test_own_layout_and_unknown_ones_are_left_alone():
    state = {'backbone.stages.0.blocks.0.norm1.weight': torch.ones(2), 'neck.x': torch.ones(1)}
    assert convert_openmmlab_swin(state, 'backbone') == (state, OPENMMLAB)
    for other in ('encoder.layers.0.x', 'layers.0.blocks.0.attn.qkv.weight'):
        state = {other: torch.ones(2)}
        assert convert_openmmlab_swin(state, 'backbone') == (state, '')


def test_scalars_and_odd_shapes_do_not_stop_the_conversion():
    state = {'layers.0.downsample.norm.weight': torch.ones(6),
             'layers.0.downsample.count': torch.tensor(3)}
    converted = from_swin_authors(state)
    assert converted['stages.0.downsample.count'] == 3
    assert converted['stages.0.downsample.norm.weight'].shape == (6, )


# Through the loader


@pytest.fixture(scope='module')
def detector(demo_config):
    from psaq_mm.engine import build_float_model, load_config
    return build_float_model(load_config(demo_config))


def test_loader_names_the_layout(detector, tmp_path, caplog):
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in before.items()}
    torch.save(dict(meta=dict(epoch=36), state_dict=to_swin_authors_detection(changed)),
               tmp_path / 'swin.pth')
    with caplog.at_level('INFO'):
        meta = load_float_weights(detector, str(tmp_path / 'swin.pth'))
    assert meta == dict(epoch=36)
    assert all(torch.equal(v, changed[k]) for k, v in detector.state_dict().items())
    detector.load_state_dict(before)


def test_unknown_layout_is_refused(detector, tmp_path):
    torch.save(dict(model={'layers.0.blocks.0.attn.qkv.weight': torch.ones(3, 1)}),
               tmp_path / 'imagenet.pth')
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_float_weights(detector, str(tmp_path / 'imagenet.pth'))
    message = str(caught.value)
    for part in ('imagenet.pth', 'unknown layout', 'layers.0.blocks.0.attn.qkv.weight',
                 'backbone.stages.0', 'backbone.layers.0', 'Missing: backbone.',
                 'a backbone alone'):
        assert part in message
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_recognised_layout_of_another_model(detector, tmp_path):
    state = to_swin_authors_detection(detector.state_dict())
    del state['backbone.layers.0.downsample.reduction.weight']
    torch.save(dict(state_dict=state), tmp_path / 'cut.pth')
    with pytest.raises(UserError, match='missing: backbone.stages.0.downsample.reduction.weight'):
        load_float_weights(detector, str(tmp_path / 'cut.pth'))
