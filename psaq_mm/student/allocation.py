# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Mixed precision: which tensors have how many bits, within a budget."""
import copy
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
from mmengine.logging import print_log
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import planned_bytes
from psaq_mm.devices import require_float32
from psaq_mm.errors import UserError
from psaq_mm.ops import Plan, apply_plan, kinds_in, plan_quantization
from psaq_mm.quantization.packing import packed_bytes
from psaq_mm.recipe import QuantizationSettings
from psaq_mm.recipe.checks import check_progress, check_seed
from psaq_mm.recipe.quantization import size_in_bytes
from psaq_mm.recipe.widths import FreeTensors, spec_at_width, without_budget

from .history import require_equalized, require_float, require_images
from .sensitivity import Specs, TensorGroup, measure_sensitivity

Choice = List[int]
"""Bits of each group."""

INFEASIBLE = 2
"""Status of ``scipy.optimize.milp`` if no choice is within the limits."""


@dataclass(frozen=True)
class Allocation:
    """Bits of each module, chosen for a budget.

    Args:
        settings (QuantizationSettings): What :func:`psaq_mm.prepare` takes: without a budget,
            the chosen bits as ``overrides``.
        groups (tuple[TensorGroup]): What was measured.
        bits (tuple[int]): Those of each group.
    """
    settings: QuantizationSettings
    groups: Tuple[TensorGroup, ...]
    bits: Tuple[int, ...]

    @property
    def predicted(self) -> float:
        """float: The predicted relative squared error of the outputs: the sum of all losses."""
        return sum(group.losses[bits] for group, bits in zip(self.groups, self.bits))

    def mean_bits(self, weights: bool) -> float:
        """Bits of weights, or of activations, on the average over those that were chosen."""
        chosen = [(bits, group.elements) for group, bits in zip(self.groups, self.bits)
                  if group.is_weight == weights and len(group.losses) > 1]
        return sum(b * n for b, n in chosen) / max(1, sum(n for _, n in chosen))

    def describe(self) -> List[Dict[str, Any]]:
        """One entry for each group, in plain values: ``tensors`` (module and role), ``elements``,
        ``losses`` (bits to loss) and ``bits``."""
        return [dict(tensors=[list(tensor) for tensor in group.tensors], bits=bits,
                     elements=group.elements,
                     losses={str(k): float(f'{v:.4g}') for k, v in group.losses.items()})
                for group, bits in zip(self.groups, self.bits)]


def allocate(model: nn.Module, images: Tensor, settings: QuantizationSettings, seed: int = 0,
             batch_size: int = 8, progress: Optional[Callable[[int], None]] = None) -> Allocation:
    """Choose the bits of each module for a budget.

        allocation = psaq_mm.allocate(model, images, QuantizationSettings(mean_bits=4))
        student = psaq_mm.prepare(model, allocation.settings)

    Args:
        model (nn.Module): The float model, after :func:`psaq_mm.equalize` if ``channel_limit``
            is set. It stays as it is.
        images (Tensor): Normalized images of shape (N, C, H, W).
        settings (QuantizationSettings): With ``mean_bits``, ``target_size`` or ``max_drop``.
        seed (int): Seed of random directions. Defaults to 0.
        batch_size (int): Images in a forward pass that sets ranges. Defaults to 8.
        progress (Callable, optional): Called with 1 for each image. Defaults to None.

    Returns:
        Allocation: The bits, and what they were chosen by.

    Raises:
        UserError: If there is no budget, no choice of bits keeps to it, or ``channel_limit`` is
            set and :func:`psaq_mm.equalize` was not called.
    """
    check_progress(progress)
    check_seed(seed, 'seed')
    require_float(model, 'allocate')
    require_float32(model)
    require_images(model, images, 'allocate', batch_size)
    check_budget(model, settings)
    require_equalized(model, settings.channel_limit, 'allocate')
    allocator = Allocator(model, settings)
    return allocator.choose(allocator.measure(images, seed, batch_size, progress))


def check_budget(model: nn.Module, settings: QuantizationSettings,
                 meta: Optional[Mapping[str, Any]] = None) -> None:
    """Raise if no bits of a float model could keep to a budget, as far as it is known before
    anything is measured; arguments are those of :class:`Allocator`.

    Raises:
        UserError: If so, or there is no budget.
    """
    if not settings.budget:
        raise UserError('psaq_mm.allocate: no budget is set; give quantization.mean_bits, '
                        'target_size or max_drop')
    Allocator(model, settings, meta).check_size()


class Allocator:
    """Specs and sizes of the tensors of a float model at all widths.

    Args:
        model (nn.Module): The float model.
        settings (QuantizationSettings): With a budget.
        meta (Mapping, optional): What :func:`psaq_mm.save` will be given. Defaults to None.
    """

    def __init__(self, model: nn.Module, settings: QuantizationSettings,
                 meta: Optional[Mapping[str, Any]] = None) -> None:
        self.model, self.settings, self.meta = model, settings, meta
        adapter = find_adapter(model)
        self.plan = plan_quantization(model, settings, adapter)
        kinds, free = kinds_in(model, settings, adapter), FreeTensors(settings)
        self.specs: Specs = {
            (name, role): {bits: replace(spec_at_width(settings, bits, name, role, kinds(name)),
                                         granularity=spec.granularity)
                           for bits in settings.candidate_bits}
            if free.has(name, role, kinds(name)) else {spec.bits: spec}
            for name, roles in self.plan.items() for role, spec in roles.items()}

    def check_size(self) -> None:
        """Raise if nothing can be chosen, or ``target_size`` is out of reach."""
        free = {role == 'weight' for (_, role), specs in self.specs.items() if len(specs) > 1}
        if True not in free:
            raise UserError(f'quantization.{self.settings.budget}: no weight is free to have '
                            'other bits: candidate_bits has one width, or other settings pin all')
        if self.settings.target_size is None:
            return
        low, high = (self._file_bytes(pick) for pick in (min, max))
        target = size_in_bytes(self.settings.target_size)
        assert target is not None
        if not low <= target <= high:
            few, many = self.settings.candidate_bits[0], self.settings.candidate_bits[-1]
            what = f'below the smallest possible, {-(-low // 10**4) / 100:.2f} MB with {few}' \
                if target < low else \
                f'above the largest possible, {high // 10**4 / 100:.2f} MB with {many}'
            raise UserError(f'quantization.target_size={self.settings.target_size} is {what} bits '
                            'for all modules that may have others')

    def _file_bytes(self, pick: Callable[[Mapping[int, Any]], int]) -> int:
        plan: Plan = {name: dict(roles) for name, roles in self.plan.items()}
        for (name, role), specs in self.specs.items():
            plan[name][role] = specs[pick(specs)]
        # The manifest holds the settings, of which only overrides can be long.
        return planned_bytes(self.model, plan, self.settings.overrides, self.meta)

    def measure(self, images: Tensor, seed: int, batch_size: int,
                progress: Optional[Callable[[int], None]] = None) -> List[TensorGroup]:
        """The loss of each group of tensors at each width; arguments are those of
        :func:`allocate`."""
        student = copy.deepcopy(self.model)
        apply_plan(student, self.plan)
        return measure_sensitivity(student, images, self.specs, seed, batch_size,
                                   progress=progress)

    def choose(self, groups: Sequence[TensorGroup]) -> Allocation:
        """The bits with the smallest loss within the budget, or the smallest size for
        ``max_drop``.

        Raises:
            UserError: If none keep to it.
        """
        settings = self.settings
        losses = [dict(group.losses) for group in groups]
        for group, values in zip(groups, losses):
            if not any(values.values()):  # no output depends on it, as far as outputs are compared
                kept = self._own_bits(group)
                print_log(f'no compared output depends on {group.tensors[0][0]} '
                          f'({group.tensors[0][1]}): it keeps {kept} bits', logger='current')
                values.clear()
                values[kept] = 0.
        fewest = sum(self._bytes(group, min(group.losses)) for group in groups)
        groups = tuple(replace(group, losses=values) for group, values in zip(groups, losses))
        limits = [self._mean(groups, False, settings.activation.bits)]
        if settings.mean_bits is not None:
            limits.append(self._mean(groups, True, settings.mean_bits))
        sizes = [{bits: self._bytes(group, bits) for bits in group.losses} for group in groups]
        objective: Sequence[Mapping[int, float]] = losses
        if settings.target_size is not None:
            target = size_in_bytes(settings.target_size)
            assert target is not None
            limits.append(Limit(sizes, target - self._file_bytes(min) + fewest))
        if settings.max_drop is not None:
            limits.append(Limit(losses, settings.max_drop / 100))
            objective = sizes
        chosen = choose_bits(objective, limits)
        if chosen is None:
            raise UserError(self._out_of_reach(losses, limits))
        return Allocation(self._settings_of(groups, chosen), groups, tuple(chosen))

    def _own_bits(self, group: TensorGroup) -> int:
        name, role = group.tensors[0]
        bits = self.plan[name][role].bits
        return bits if bits in group.losses else max(group.losses)

    @staticmethod
    def _mean(groups: Sequence[TensorGroup], weights: bool, mean: float) -> 'Limit':
        """Limit of the mean bits of the weights, or activations, that may have others."""
        free = [group.is_weight == weights and len(group.losses) > 1 for group in groups]
        return Limit([{bits: bits * group.elements * chosen for bits in group.losses}
                      for group, chosen in zip(groups, free)],
                     mean * sum(group.elements for group, chosen in zip(groups, free) if chosen))

    def _bytes(self, group: TensorGroup, bits: int) -> int:
        """Bytes of the weights of a group in a checkpoint; none for activations."""
        return sum(packed_bytes(self.model.get_submodule(name).get_parameter('weight').numel(),
                                bits)
                   for name, role in group.tensors if role == 'weight')

    def _out_of_reach(self, losses: Sequence[Mapping[int, float]],
                      limits: Sequence['Limit']) -> str:
        settings = self.settings
        if settings.max_drop is None:
            return (f'quantization.{settings.budget}: no choice of bits keeps to it, with '
                    f'activations of {settings.activation.bits} bits on the average')
        best = choose_bits(losses, limits[:1])
        assert best is not None
        least = 100 * sum(values[bits] for values, bits in zip(losses, best))
        more = ', or more bits to activations (quantization.activation.bits)' \
            if settings.activation.bits < max(settings.candidate_bits) else ''
        return (f'quantization.max_drop={settings.max_drop:g} is below the smallest possible, '
                f'{1.006 * least:.3g} % with activations of {settings.activation.bits} bits on '
                f'the average: give more{more}')  # rounded up

    def _settings_of(self, groups: Sequence[TensorGroup], chosen: Choice) -> QuantizationSettings:
        """The settings with the chosen bits, and without a budget."""
        settings = self.settings
        changes: Dict[str, Dict[str, Any]] = {}
        for group, bits in zip(groups, chosen):
            for name, role in group.tensors:
                old, new = (spec.to_dict() for spec in (self.plan[name][role],
                                                        self.specs[name, role][bits]))
                # What was set under this very name is replaced: then all is written down.
                changed = {key: value for key, value in new.items()
                           if value != old[key] or name in settings.overrides}
                if len(self.specs[name, role]) > 1:
                    changes.setdefault(name, {})[role] = {**changed, 'bits': bits}
        overrides = {pattern: value for pattern, value in settings.overrides.items()
                     if pattern not in changes}
        for name in self.plan:  # the last word, in the order of the model
            if name in changes:
                overrides[name] = {**settings.overrides.get(name, {}), **changes[name]}
        return without_budget(settings, overrides=overrides)


class Limit(NamedTuple):
    """A sum over groups that must not exceed a bound.

    Args:
        costs (list[dict[int, float]]): Bits to what a group adds, for each group.
        most (float): The bound.
    """
    costs: Sequence[Mapping[int, float]]
    most: float

    @property
    def spare(self) -> float:
        """float: How far the smallest sum stays below the bound."""
        return self.most - sum(min(costs.values()) for costs in self.costs)

    def extra(self, group: int, bits: int) -> float:
        """What these bits of a group add to the smallest sum."""
        return self.costs[group][bits] - min(self.costs[group].values())

    def keeps(self, chosen: Choice) -> bool:
        """Whether groups of these bits stay within the bound."""
        return sum(costs[bits] for costs, bits in zip(self.costs, chosen)) <= self.most


def choose_bits(objective: Sequence[Mapping[int, float]],
                limits: Sequence[Limit]) -> Optional[Choice]:
    """The bits of each group with the smallest sum of an objective, by an exact solver.

    A mixed-integer linear program: a variable of 0 or 1 for each group and width.

    Args:
        objective (list[dict[int, float]]): Bits to what a group adds, for each group.
        limits (list[Limit]): Of the same groups and bits.

    Returns:
        list[int], optional: Bits of each group; None if no choice is within the limits.

    Raises:
        UserError: If the solver fails for another reason.
    """
    spare = [limit.spare for limit in limits]
    if min(spare) < 0:
        return None
    # Solvers take a sum for kept that is a little over. So what no choice can have is left out,
    # and sums are parts of what is to spare; if need be once more, for a little less.
    at = [(group, bits) for group, values in enumerate(objective) for bits in values
          if all(limit.extra(group, bits) <= most for limit, most in zip(limits, spare))]
    one_each = np.zeros((len(objective), len(at)))
    one_each[[group for group, _ in at], range(len(at))] = 1
    cost = np.array([objective[group][bits] for group, bits in at], dtype=float)
    shares = np.array([[limit.extra(group, bits) / (most or 1.) for group, bits in at]
                       for limit, most in zip(limits, spare)])
    failure = ''
    for allowed in (1., 1 - 1e-6, 1 - 1e-5, 1 - 1e-4):
        with _silent():
            found = milp(cost / max(cost.max(initial=0.), 1e-300), integrality=np.ones(len(at)),
                         bounds=Bounds(0, 1), options=dict(mip_rel_gap=1e-4),
                         constraints=[LinearConstraint(one_each, 1, 1),
                                      LinearConstraint(shares, -np.inf, allowed)])
        if found.x is None:
            if found.status == INFEASIBLE and not failure:
                return None
            failure = found.message
            continue
        chosen = [0] * len(objective)
        for (group, bits), share in zip(at, found.x):
            if share > 0.5:
                chosen[group] = bits
        if all(limit.keeps(chosen) for limit in limits):
            return chosen
        failure = 'what it finds is a little over the budget'
    raise UserError('scipy.optimize.milp, which chooses the bits, failed (' + failure.strip()
                    + '): give another budget or other candidate_bits')


@contextmanager
def _silent() -> Iterator[None]:
    """Within the block, nothing is printed: some versions of the solver leave traces there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
