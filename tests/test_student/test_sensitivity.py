# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What outputs lose by one tensor: against that tensor alone quantized."""
import copy

import pytest
import torch
from small_models import swin
from torch import nn

from psaq_mm import QuantizationSettings
from psaq_mm.adapters import find_adapter
from psaq_mm.ops import apply_plan, named_quantizers, plan_quantization, quantization_enabled
from psaq_mm.quantization import QuantSpec
from psaq_mm.student import measure_sensitivity, measure_tap_error
from psaq_mm.student.sensitivity import tap_error

ROTATED = dict(input=dict(rotate=True))
PER_TOKEN = dict(input=dict(rotate=True, granularity='per_token'),
                 attention=dict(granularity='per_token'))


def student_of(model, roles=None):
    chosen = QuantizationSettings.from_dict(dict(channel_limit=None, roles=roles or {}))
    plan = plan_quantization(model, chosen, find_adapter(model))
    student = copy.deepcopy(model)
    apply_plan(student, plan)
    return student, {(name, role): {bits: QuantSpec.from_dict(dict(spec.to_dict(), bits=bits))
                                    for bits in (4, 6)}
                     for name, roles in plan.items() for role, spec in roles.items()}


@pytest.mark.parametrize('roles', [{}, ROTATED, PER_TOKEN])
def test_losses_are_those_of_the_tensor_alone(roles):
    torch.manual_seed(0)
    model, images = swin(), torch.randn(2, 3, 56, 56)
    student, specs = student_of(model, roles)
    groups = measure_sensitivity(student, images, specs, probes=24, views=False)
    quantizers = {(name, role): q for name, role, q in named_quantizers(student)}
    assert [t for group in groups for t in group.tensors] == list(specs)
    ratios = []
    for group in groups[::7]:
        (tensor, ) = group.tensors
        with quantization_enabled(student, False):
            quantizers[tensor].enabled = True  # at the last width, 6 bits
            direct = measure_tap_error(student, model, images)
        assert 2 < group.losses[4] / group.losses[6] < 200, tensor
        ratios.append(group.losses[6] / direct)
    assert len(ratios) > 4
    assert min(ratios) > 0.4 and max(ratios) < 2.5
    assert 0.8 < sum(ratios) / len(ratios) < 1.25


def test_elements_are_those_of_an_image():
    model, images = swin(), torch.randn(2, 3, 56, 56)
    student, specs = student_of(model)
    elements = {group.tensors[0]: group.elements
                for group in measure_sensitivity(student, images, specs, probes=1)}
    first = 'stages.0.blocks.0.attn.w_msa'
    assert elements['patch_embed.projection', 'input'] == 3 * 56 * 56
    assert elements[f'{first}.qkv', 'weight'] == 16 * 48
    assert elements[f'{first}.qkv', 'input'] == 14 * 14 * 16
    assert elements[first, 'attention'] == 4 * 49 * 49  # windows of 7x7, one head


def test_tap_error_by_hand():
    expected = {'neck.0': torch.tensor([[3., 4.]]), 'neck.1': torch.tensor([[1., 0.]]),
                'scores.0': torch.tensor([[2.]]), 'rois.0': torch.empty(1, 0)}
    given = {'neck.0': torch.tensor([[3., 3.]]), 'neck.1': torch.tensor([[1., 1.]]),
             'scores.0': torch.tensor([[1.]]), 'rois.0': torch.empty(1, 0)}
    # Groups count alike: neck (1/25 and 1) and scores (1/4).
    assert tap_error(expected, given).tolist() == pytest.approx([(0.52 + 0.25) / 2])


class TwoReaders(nn.Module):
    """Two layers read what a third gives."""

    def __init__(self):
        super().__init__()
        self.first, self.query, self.key = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        return self.query(x) + self.key(x)


@pytest.mark.parametrize('roles', [{}, ROTATED, PER_TOKEN])
def test_readers_of_one_tensor_have_equal_bits(roles):
    from psaq_mm.student import sensitivity
    model = swin()
    model.extra = TwoReaders()
    model.norm1.register_forward_hook(
        lambda module, args, out: out + 1e-3 * model.extra(out[..., :4]).sum(-1, keepdim=True))
    student, specs = student_of(model, roles)
    student.norm1._forward_hooks.clear()
    student.norm1.register_forward_hook(
        lambda module, args, out: out + 1e-3 * student.extra(out[..., :4]).sum(-1, keepdim=True))
    groups = sensitivity.measure_sensitivity(student, torch.randn(1, 3, 56, 56), specs, probes=1)
    tensors = {group.tensors for group in groups if group.tensors[0][0].startswith('extra')}
    assert (('extra.query', 'input'), ('extra.key', 'input')) in tensors
    assert (('extra.query', 'weight'), ('extra.key', 'weight')) in tensors
    assert (('extra.first', 'weight'), ) in tensors
