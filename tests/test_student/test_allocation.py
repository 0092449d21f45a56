# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Bits chosen for a budget: against all choices, and against sizes by hand."""
import itertools
import re
from dataclasses import replace

import pytest
import timm
import torch
from scipy.optimize import OptimizeResult
from small_models import detector, left_as_it_was, swin

import psaq_mm
from psaq_mm import QuantizationSettings, UserError
from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import planned_bytes
from psaq_mm.ops import named_quantizers, plan_quantization
from psaq_mm.student import Allocator, TensorGroup, allocation
from psaq_mm.student.allocation import Limit, choose_bits

WIDTHS = (2, 4, 8)


def settings(**values):
    return QuantizationSettings.from_dict(dict(channel_limit=None, **values))


def random_problem(seed, groups=6):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return float(torch.empty(()).uniform_(low, high, generator=generator))
    elements = [int(draw(1, 1000)) for _ in range(groups)]
    losses = [{bits: draw(0.1, 10) * 4. ** -bits for bits in WIDTHS} for _ in range(groups)]
    return losses, [{bits: bits * count for bits in WIDTHS} for count in elements], sum(elements)


def best_by_trying_all(objective, limits):
    within = [choice for choice in itertools.product(WIDTHS, repeat=len(objective))
              if all(limit.keeps(choice) for limit in limits)]
    return min((sum(o[b] for o, b in zip(objective, choice)) for choice in within), default=None)


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('mean', [2, 2.7, 4, 5.5, 8])
def test_the_best_choice_within_a_budget(seed, mean, capfd):
    losses, costs, total = random_problem(seed)
    limit = Limit(costs, mean * total)
    chosen = choose_bits(losses, [limit])
    assert limit.keeps(chosen)
    found = sum(values[bits] for values, bits in zip(losses, chosen))
    assert found == pytest.approx(best_by_trying_all(losses, [limit]), rel=1e-3)
    assert capfd.readouterr().out == ''


def test_two_budgets_at_once():
    losses, costs, total = random_problem(1)
    first, second = Limit(costs[:3] + [dict.fromkeys(WIDTHS, 0)] * 3, 3 * total / 2), \
        Limit([dict.fromkeys(WIDTHS, 0)] * 3 + costs[3:], 2 * total)
    chosen = choose_bits(losses, [first, second])
    assert sum(v[b] for v, b in zip(losses, chosen)) == pytest.approx(
        best_by_trying_all(losses, [first, second]), rel=1e-3)


def test_nothing_is_within_too_small_a_budget():
    losses, costs, total = random_problem(0)
    assert choose_bits(losses, [Limit(costs, 1.99 * total)]) is None


@pytest.mark.parametrize('mean', [2, 2.0000001])
def test_exact_budget_with_a_tiny_group(mean):
    """More than 2 bits of it are within what a solver takes for an error of rounding."""
    counts = [1, *[10**7] * 8]
    losses = [{bits: 4. ** -bits for bits in WIDTHS} for _ in counts]
    costs = [{bits: bits * count for bits in WIDTHS} for count in counts]
    expected = 2 if mean == 2 else 8
    assert choose_bits(losses, [Limit(costs, mean * sum(counts))]) == [expected, *[2] * 8]


def test_two_budgets_that_exclude_each_other():
    costs, opposite = ([{bits: sign * bits for bits in WIDTHS}] * 3 for sign in (1, -1))
    limits = [Limit(costs, 11), Limit(opposite, -13)]
    assert all(limit.spare >= 0 for limit in limits)
    assert choose_bits(costs, limits) is None


@pytest.mark.parametrize('status, message', [(1, 'Time limit reached'), (4, 'Numerical')])
def test_a_solver_that_fails(monkeypatch, status, message):
    """It is not said that no bits fit."""
    monkeypatch.setattr(allocation, 'milp', lambda *args, **kwargs: OptimizeResult(
        x=None, status=status, message=message))
    losses, costs, total = random_problem(0)
    with pytest.raises(UserError, match=f'scipy.optimize.milp, .* failed .{message}.: give'):
        choose_bits(losses, [Limit(costs, 4 * total)])


def groups_of(allocator):
    """Each tensor by itself; the first weights matter most."""
    model, found = allocator.model, []
    for index, ((name, role), specs) in enumerate(allocator.specs.items()):
        count = model.get_submodule(name).weight.numel() if role == 'weight' else 100 + index
        found.append(TensorGroup(((name, role), ), count,
                                 {bits: 4. ** -bits / (1 + index) for bits in specs}))
    return found


@pytest.mark.parametrize('mean', [2, 3.5, 8])
def test_mean_bits_are_never_exceeded(mean):
    allocator = Allocator(swin(), settings(mean_bits=mean, activation=dict(bits=4)))
    found = allocator.choose(groups_of(allocator))
    model = allocator.model
    plan = plan_quantization(model, found.settings, find_adapter(model))
    weights = {name: specs['weight'].bits for name, specs in plan.items() if 'weight' in specs}
    assert weights.pop('patch_embed.projection') == 8  # patch_embed_bits
    counts = {name: model.get_submodule(name).weight.numel() for name in weights}
    used = sum(bits * counts[name] for name, bits in weights.items())
    assert mean - 0.5 < used / sum(counts.values()) <= mean
    assert found.mean_bits(True) == pytest.approx(used / sum(counts.values()))
    assert 3.5 < found.mean_bits(False) <= 4
    assert not found.settings.budget


def test_margins_and_range_rules_are_those_of_the_bits():
    base = psaq_mm.Recipe.shipped('w4a4').changed(dict(quantization=dict(
        mean_bits=4, channel_limit=None))).quantization
    allocator = Allocator(swin(), base)
    qkv = 'stages.0.blocks.0.attn.w_msa.qkv'
    for bits, recipe in ((3, 'w3a3'), (4, 'w4a4'), (6, 'w6a6'), (8, 'w8a8')):
        shipped = psaq_mm.Recipe.shipped(recipe).quantization
        # Whether it is rotated, and has a scale for each token, does not depend on the bits.
        expected = replace(shipped.spec_for(qkv, 'input'), rotate=False, granularity='per_tensor')
        if bits == 3:
            expected = replace(expected, observer=dict(type='PercentileObserver', percentile=0.99))
        assert allocator.specs[qkv, 'input'][bits] == expected
    # Few tokens are far larger than the rest: with one scale for all, all must fit.
    few = allocator.specs['stages.0.blocks.0.attn.w_msa.proj', 'input'][3]
    assert few.observer == dict(type='MinMaxObserver') and few.margin == 0
    few = allocator.specs['stages.0.blocks.0.attn.w_msa', 'attention'][3]
    assert few.observer['type'] == 'MAEObserver' and few.granularity == 'per_tensor'
    own = Allocator(swin(), psaq_mm.Recipe.shipped('w3a3').changed(dict(quantization=dict(
        mean_bits=3, channel_limit=None))).quantization)
    for bits, percentile in ((2, 0.98), (3, 0.98), (4, 0.999), (8, 0.999)):
        for layer in (qkv, 'stages.0.blocks.0.attn.w_msa.proj'):
            spec = own.specs[layer, 'input'][bits]
            assert spec.observer == dict(type='PercentileObserver', percentile=percentile)
            assert spec.rotate and spec.granularity == 'per_token'
    assert allocator.specs['patch_embed.projection', 'input'].keys() == {8}
    own = Allocator(swin(), settings(mean_bits=4, activation=dict(margin=0.25, symmetric=True)))
    assert {(spec.margin, spec.symmetric) for spec in own.specs[qkv, 'input'].values()} == {
        (0.25, True)}


def test_what_is_set_for_one_module_stays():
    name = 'stages.0.blocks.0.attn.w_msa.qkv'
    allocator = Allocator(swin(), settings(mean_bits=4, activation=dict(bits=4), overrides={
        name: dict(weight=dict(margin=0.5), activation=dict(margin=0.25)),
        '*.w_msa.*': dict(activation=dict(margin=0.75))}))
    assert allocator.plan[name]['input'].margin == 0.75  # the later one wins
    found = allocator.choose(groups_of(allocator))
    plan = plan_quantization(allocator.model, found.settings, find_adapter(allocator.model))
    for group, bits in zip(found.groups, found.bits):
        for module, role in group.tensors:
            assert plan[module][role] == allocator.specs[module, role][bits]


def test_target_size(tmp_path):
    model = swin(embed_dims=64)
    allocator = Allocator(model, settings(target_size='330kB'))
    allocator.check_size()
    found = allocator.choose(groups_of(allocator))
    student = psaq_mm.calibrate(psaq_mm.prepare(model, found.settings),
                                torch.randn(1, 3, 32, 32))
    psaq_mm.round_weights(student, torch.randn(1, 3, 32, 32))
    psaq_mm.save(student, tmp_path / 'quantized.pth')
    size = (tmp_path / 'quantized.pth').stat().st_size
    assert 0.93 * 330e3 < size <= 330e3


def test_target_size_with_many_overrides_and_meta(tmp_path):
    """They are in the file too, and the config that a model was trained by."""
    meta = dict(cfg='model = dict()\n' * 1000, dataset_meta=dict(classes=('object', ) * 500))
    model, images = swin(embed_dims=64, depths=(3, 3)), torch.randn(1, 3, 32, 32)
    plan = plan_quantization(model, settings(), find_adapter(model))
    own = {pattern: {role: dict(margin=0.25, symmetric=False, observer=dict(type='MinMaxObserver'))
                     for role in specs}
           for name, specs in plan.items() for pattern in (f'{name}*', name)}
    recipe = psaq_mm.Recipe(quantization=settings(
        target_size='540kB', overrides=own, weight=dict(rounding='nearest')))
    allocator = Allocator(model, recipe.quantization, meta)
    found = allocator.choose(groups_of(allocator))
    student = psaq_mm.calibrate(psaq_mm.prepare(model, found.settings), images)
    psaq_mm.save(student, tmp_path / 'quantized.pth', meta, dict(settings=recipe.to_dict()))
    assert 0.9 * 540e3 < (tmp_path / 'quantized.pth').stat().st_size <= 540e3


def test_planned_size_is_that_of_the_file(tmp_path):
    model, images = swin(embed_dims=64), torch.randn(1, 3, 32, 32)
    rotated = dict(roles=dict(input=dict(rotate=True)))
    for bits, changes in ((3, {}), (6, {}), (4, rotated), (6, dict(
            activation=dict(granularity='per_channel'))), (3, dict(
                activation=dict(granularity='per_channel'), placement='v1'))):
        chosen = settings(weight=dict(bits=bits, rounding='nearest'), **changes)
        student = psaq_mm.calibrate(psaq_mm.prepare(model, chosen), images)
        psaq_mm.save(student, tmp_path / 'quantized.pth')
        size = (tmp_path / 'quantized.pth').stat().st_size
        plan = plan_quantization(model, chosen, find_adapter(model))
        assert size <= planned_bytes(model, plan) <= 1.06 * size


def test_smallest_size_for_a_drop():
    allocator = Allocator(swin(), settings(max_drop=1, activation=dict(bits=8)))
    groups = groups_of(allocator)
    found = allocator.choose(groups)
    assert 0 < found.predicted <= 0.01
    less = Allocator(swin(), settings(max_drop=0.1, activation=dict(bits=8)))
    assert less.choose(groups).mean_bits(True) > found.mean_bits(True)
    none = Allocator(swin(), settings(max_drop=1e-9, activation=dict(bits=4)))
    with pytest.raises(UserError, match='max_drop=1e-09 is below the smallest possible, .* %'):
        none.choose(groups)


def test_the_smallest_that_is_named_is_possible():
    """Rounded towards what can be."""
    changes = dict(activation=dict(bits=4), candidate_bits=[3, 4, 5])
    for key, wrong in (('target_size', 1000), ('target_size', '1GB'), ('max_drop', 1e-9)):
        def allocator(value, key=key):
            found = Allocator(swin(), settings(**changes, **{key: value}))
            found.check_size()
            return found, groups_of(found)

        with pytest.raises(UserError) as raised:
            found, groups = allocator(wrong)
            found.choose(groups)
        number, unit = re.search(r'possible, ([\d.e-]+) (MB|%)', str(raised.value)).groups()
        found, groups = allocator(float(number) if unit == '%' else number + unit)
        found.choose(groups)


def test_no_advice_to_have_more_than_all_bits():
    for most, advised in ((8, True), (4, False)):
        allocator = Allocator(swin(), settings(max_drop=1e-9, activation=dict(bits=4),
                                               candidate_bits=[4, most] if advised else [3, 4]))
        with pytest.raises(UserError) as raised:
            allocator.choose(groups_of(allocator))
        assert ('more bits to activations' in str(raised.value)) == advised


@pytest.mark.parametrize('values, message', [
    (dict(target_size=1000), '=1000 is below the smallest possible, 0.* MB with 2 bits'),
    (dict(target_size='1GB'), '=1GB is above the largest possible, 0.* MB with 8 bits'),
    (dict(mean_bits=4, weight=dict(bits=4), overrides={'*': dict(weight=dict(bits=4))}),
     'mean_bits=4: no weight is free to have other bits'),
    ({}, 'no budget is set'),
])
def test_what_cannot_be_is_refused_before_anything_is_measured(values, message):
    with pytest.raises(UserError, match=message):
        psaq_mm.allocate(swin(), torch.randn(1, 3, 32, 32), settings(**values))


def test_what_no_output_depends_on_keeps_its_bits():
    allocator = Allocator(swin(), settings(target_size='175kB', weight=dict(bits=6),
                                           candidate_bits=[4, 6, 8]))
    groups = groups_of(allocator)
    at = next(i for i, group in enumerate(groups) if group.is_weight and i > 3)
    groups[at] = TensorGroup(groups[at].tensors, groups[at].elements, {4: 0., 6: 0., 8: 0.})
    found = allocator.choose(groups)
    assert found.bits[at] == 6
    plan = plan_quantization(allocator.model, found.settings, find_adapter(allocator.model))
    assert planned_bytes(allocator.model, plan) <= 175_000


def test_allocate_wants_an_equalized_model():
    with pytest.raises(UserError, match='psaq_mm.allocate: call psaq_mm.equalize first'):
        psaq_mm.allocate(swin(), torch.randn(1, 3, 32, 32), QuantizationSettings(mean_bits=4))


def test_prepare_wants_bits_to_be_chosen_first():
    with pytest.raises(UserError, match='mean_bits=4.* call psaq_mm.allocate first'):
        psaq_mm.prepare(swin(), settings(mean_bits=4))


def test_allocate_and_prepare():
    model = swin(depths=(1, 1), num_heads=(1, 1))
    images = torch.randn(2, 3, 32, 32)
    chosen = settings(mean_bits=4, activation=dict(bits=6), candidate_bits=[2, 4, 8])
    with left_as_it_was(model):
        found = psaq_mm.allocate(model, images, chosen, seed=3)
    assert found == psaq_mm.allocate(model, images, chosen, seed=3)
    student = psaq_mm.calibrate(psaq_mm.prepare(model, found.settings), images)
    bits = {(name, role): q.spec.bits for name, role, q in named_quantizers(student)}
    for group, width in zip(found.groups, found.bits):
        assert {bits[tensor] for tensor in group.tensors} == {width}
    assert len(set(found.bits)) > 1
    assert found.describe()[0].keys() == {'tensors', 'bits', 'elements', 'losses'}
    # Used again, as from a config, they are the same bits.
    again = psaq_mm.Recipe(quantization=found.settings)
    assert psaq_mm.Recipe.from_dict(again.to_dict()) == again


def test_all_of_a_detector():
    found = psaq_mm.allocate(detector(), torch.randn(1, 3, 64, 64), settings(
        scope='model', mean_bits=3, activation=dict(bits=4), candidate_bits=[2, 4, 8]))
    bits = {tensor: width for group, width in zip(found.groups, found.bits)
            for tensor in group.tensors}
    pinned = [('roi_head.bbox_head.fc_reg', 'weight'), ('rpn_head.rpn_cls', 'weight'),
              ('roi_head.bbox_head.shared_fcs.0', 'input'), ('backbone.patch_embed.projection',
                                                             'weight')]
    assert [bits[tensor] for tensor in pinned] == [8] * 4
    assert found.mean_bits(True) <= 3 and found.mean_bits(False) <= 4
    for group in found.groups:  # what the heads give is compared too
        assert all(loss > 0 for loss in group.losses.values()), group.tensors
    # Both predictors of the RPN read one tensor: equal bits, pinned as they are.
    assert any({('rpn_head.rpn_cls', 'input'), ('rpn_head.rpn_reg', 'input')} == {*group.tensors}
               for group in found.groups)


def test_a_classifier():
    model = timm.create_model('deit_tiny_patch16_224', img_size=32, embed_dim=32, depth=1,
                              num_heads=2, num_classes=5).eval()
    found = psaq_mm.allocate(model, torch.randn(1, 3, 32, 32), settings(
        mean_bits=4, candidate_bits=[2, 4, 8]))
    assert 2 <= found.mean_bits(True) <= 4
    psaq_mm.prepare(model, found.settings)
