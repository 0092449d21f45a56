# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a model loses when one of its tensors alone has few bits.

Loss is the relative squared error of the taps (feature maps, outputs of heads). Of a small
change d of a tensor it is the mean of (g . d)^2, where g is the gradient of the taps' product
with a random direction: Hutchinson's estimate of the Gauss-Newton form d^T J^T J d. A few
backward passes give it for all tensors and all widths at once.
"""
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import torch
from mmengine.dist import all_reduce, broadcast_object_list
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.devices import module_device
from psaq_mm.evolution.discrepancy import group_of
from psaq_mm.evolution.views import random_blend, random_zoom
from psaq_mm.modes import evaluating
from psaq_mm.ops import QuantOp, named_quant_ops, named_rotations, quantization_enabled
from psaq_mm.prior import derived_seed
from psaq_mm.processes import indices_of_this_process, stopping_together
from psaq_mm.quantization import Quantizer, QuantSpec
from psaq_mm.recipe import EvolutionSettings

from .calibration import calibrate_ranges, forward_of_scope

TensorName = Tuple[str, str]
"""Module and role."""

Specs = Mapping[TensorName, Mapping[int, QuantSpec]]
"""Tensor to the spec that it would have at each bit width; one width if its bits are pinned."""

PROBES = 4
"""Random directions for each image [choice]: with 8 images losses have a relative standard
deviation of about a quarter, a tenth of what a bit changes."""

VIEWS = EvolutionSettings()
"""Whose ``zoom`` and ``contrast`` the views of images have."""


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that have equal bits, and what the taps lose if they alone have few.

    Args:
        tensors (tuple[tuple[str, str]]): Module and role of each.
        elements (int): Numbers in them; of activations for one image. A tensor that several
            modules read counts once.
        losses (dict[int, float]): Bits to the relative squared error of the taps.
    """
    tensors: Tuple[TensorName, ...]
    elements: int
    losses: Mapping[int, float]

    @property
    def is_weight(self) -> bool:
        """bool: Whether these are weights."""
        return self.tensors[0][1] == 'weight'


def tap_error(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
    """Squared error of the taps relative to their squares, of each image, shape (B, ): the mean
    over groups of the mean over the taps of a group."""
    total = sum(weight * _energy(given[tap] - expected[tap])
                / _energy(expected[tap]).clamp_min(1e-30)
                for tap, weight in _tap_weights(expected).items())
    assert isinstance(total, Tensor)
    return total


def _energy(values: Tensor) -> Tensor:
    """Sum of squares of each image, float32."""
    return values.detach().float().flatten(1).square().sum(1)


def _tap_weights(taps: Mapping[str, Tensor]) -> Dict[str, float]:
    """The share of each tap that holds anything; they add up to 1."""
    groups: Dict[str, List[str]] = {}
    for tap, value in taps.items():
        if value.numel():
            groups.setdefault(group_of(tap), []).append(tap)
    return {tap: 1 / len(groups) / len(members) for members in groups.values()
            for tap in members}


def measure_tap_error(student: nn.Module, teacher: nn.Module, images: Tensor) -> float:
    """:func:`tap_error` of a student, the mean over images of all processes."""
    adapter, device = find_adapter(student), module_device(student)
    groups = adapter.tap_groups(teacher)
    total = torch.zeros(2, device=device)
    with torch.no_grad(), evaluating(student, teacher), stopping_together():
        for index in indices_of_this_process(len(images)):
            image = images[index:index + 1]
            expected = adapter.forward_taps(teacher, image.to(device), groups)
            given = adapter.forward_taps(student, image.to(device), groups, expected.regions)
            total += torch.stack([tap_error(expected.taps, given.taps).sum(), total.new_ones(())])
    all_reduce(total)
    return float(total[0] / total[1])


def measure_sensitivity(student: nn.Module, images: Tensor, specs: Specs, seed: int = 0,
                        batch_size: int = 8, probes: int = PROBES, views: bool = True,
                        progress: Optional[Callable[[int], None]] = None) -> List[TensorGroup]:
    """What the taps of a model lose when one tensor alone is quantized, at several widths.

    With several processes each runs its part of the images, and all get the same.

    Args:
        student (nn.Module): With quantized ops and the float model's weights. Its ranges are
            changed.
        images (Tensor): Normalized images of shape (N, C, H, W), which ranges are set on.
        specs (Mapping): Every quantized tensor, as module and role, to bits to spec.
        seed (int): Seed of the random directions. Defaults to 0.
        batch_size (int): Images in a forward pass that sets ranges. Defaults to 8.
        probes (int): Random directions for each image. Defaults to 4.
        views (bool): Whether losses are measured on a view of each image, as the student of a
            game sees: photographs are plainer than images of the prior, and bits that are chosen
            by these alone keep less of them [measured]. Defaults to True.
        progress (Callable, optional): Called with 1 after each image. Defaults to None.

    Returns:
        list[TensorGroup]: In the order of the model, weights and activations. Layers that read
        one tensor have one group of inputs, and of weights if they are linear: engines compute
        these as one.

    Raises:
        UserError: If a tensor is not used, or its values are not finite.
    """
    quantizers = _calibrated_quantizers(student, images, specs, batch_size)
    meter = _Meter(student, quantizers)
    adapter, device = find_adapter(student), module_device(student)
    groups = adapter.tap_groups(student)
    lower, upper = (end.to(device) for end in adapter.valid_range(student))
    for module in student.modules():  # recomputed activations would be seen twice
        if getattr(module, adapter.recompute_flag, False):
            setattr(module, adapter.recompute_flag, False)
    with evaluating(student, gradients=True), quantization_enabled(student, False), meter, \
            stopping_together():
        for index in indices_of_this_process(len(images)):
            generator = torch.Generator().manual_seed(derived_seed(seed, index))
            image = images[index:index + 1].to(device)
            if views:
                image = random_blend(random_zoom(image, VIEWS.zoom, generator), VIEWS.contrast,
                                     lower, upper, generator)
            image = image.detach().requires_grad_()
            with torch.enable_grad():
                record = adapter.forward_taps(student, image, groups)
                for probe in range(probes):
                    product = _random_product(record.taps, generator)
                    product.backward(retain_graph=probe < probes - 1)
                    meter.finish_probe()
            meter.finish_image()
            if progress is not None:
                progress(1)
    return meter.groups(probes * len(images))


def _random_product(taps: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Product of the taps of one image with a random direction, whose gradient's product with
    a change of a tensor has :func:`tap_error` as the mean of its square."""
    total = None
    for tap, weight in _tap_weights(taps).items():
        value = taps[tap]
        direction = torch.randn(value.shape, generator=generator).to(value.device)
        factor = (weight / _energy(value).sum().clamp_min(1e-30)).sqrt()
        part = factor * (value.float() * direction).sum()
        total = part if total is None else total + part
    assert total is not None
    return total


def _calibrated_quantizers(student: nn.Module, images: Tensor, specs: Specs,
                           batch_size: int) -> Dict[TensorName, Dict[int, Quantizer]]:
    """A quantizer with a range for each tensor and width."""
    ops = dict(named_quant_ops(student))
    found: Dict[TensorName, Dict[int, Quantizer]] = {tensor: {} for tensor in specs}
    with forward_of_scope(student, 'calibration') as forward:
        for index in range(max(map(len, specs.values()))):
            for (name, role), by_bits in specs.items():
                if index < len(by_bits):
                    bits, spec = list(by_bits.items())[index]
                    op = ops[name]
                    op.quantizers[role] = found[name, role][bits] = Quantizer(
                        spec, op.roles[role], role == 'attention').to(module_device(student))
            calibrate_ranges(student, images, forward, batch_size)
    return found


class _Meter(ExitStack):
    """Hooks on the quantizers of a student whose quantization is off, within the block."""

    def __init__(self, student: nn.Module,
                 quantizers: Dict[TensorName, Dict[int, Quantizer]]) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.ops: Dict[str, QuantOp] = dict(named_quant_ops(student))
        self._rotations = [rotation for _, rotation in named_rotations(student)]
        self._parameters = list(student.parameters())
        device = module_device(student)
        self._products = {t: torch.zeros(len(by_bits), device=device)
                          for t, by_bits in quantizers.items()}
        self._squares = {t: torch.zeros_like(p, dtype=torch.float64)
                         for t, p in self._products.items()}
        self._elements = dict.fromkeys(quantizers, 0)
        self._inputs: List[Tuple[Tensor, TensorName]] = []
        self._unrotated: List[Tuple[Tensor, Tensor]] = []
        self._readers: Dict[TensorName, TensorName] = {}

    def __enter__(self) -> '_Meter':
        super().__enter__()
        for name, role in self.quantizers:
            if role == 'weight':
                self._elements[name, role] = self.ops[name].weight.numel()
            else:
                self.enter_context(self.ops[name].quantizers[role].register_forward_hook(
                    self._watch((name, role))))
        for rotation in self._rotations:
            self.enter_context(rotation.register_forward_hook(
                lambda _, args, output: self._unrotated.append((output, args[0]))))
        return self

    def _watch(self, tensor: TensorName) -> Callable[..., None]:
        def note(quantizer: nn.Module, args: Any, output: Tensor) -> None:
            x = args[0]
            self._inputs.append((x, tensor))
            if x.requires_grad:
                values = x.detach()
                output.register_hook(lambda grad: self._add(tensor, values, grad))
        return note

    def _add(self, tensor: TensorName, values: Tensor, grad: Tensor) -> None:
        """Add the product of a gradient with what quantization changes, at each width."""
        flat = grad.detach().reshape(-1)
        with torch.no_grad():
            self._products[tensor] += torch.stack([
                flat @ (q.simulate(values) - values).reshape(-1)
                for q in self.quantizers[tensor].values()])

    def finish_probe(self) -> None:
        """Square the products of one random direction."""
        for (name, role), products in self._products.items():
            weight = self.ops[name].weight if role == 'weight' else None
            if weight is not None and weight.grad is not None:
                self._add((name, role), weight.detach(), weight.grad)
            self._squares[name, role] += products.double().square()
            products.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def finish_image(self) -> None:
        """Note which modules read one tensor, and forget the tensors of an image."""
        first: Dict[int, TensorName] = {}
        read = {id(rotated): id(x) for rotated, x in self._unrotated}
        for x, tensor in self._inputs:
            leader = first.setdefault(read.get(id(x), id(x)), tensor)
            if tensor[1] == leader[1] == 'input' and tensor not in self._readers:
                self._readers[tensor] = self._readers.get(leader, leader)
        if not any(self._elements[tensor] for _, tensor in self._inputs):
            for x, tensor in self._inputs:
                self._elements[tensor] += x.numel()
        self._inputs.clear()
        self._unrotated.clear()

    def groups(self, samples: int) -> List[TensorGroup]:
        """The groups, from the squares of all samples of all processes."""
        for squares in self._squares.values():
            all_reduce(squares)
        found = [self._groups(samples)]
        broadcast_object_list(found)  # numbers of regions differ from image to image
        return found[0]

    def _groups(self, samples: int) -> List[TensorGroup]:
        members: Dict[Any, List[TensorName]] = {}
        for tensor, by_bits in self.quantizers.items():
            name, role = tensor
            leader = self._readers.get((name, 'input'), (name, 'input'))
            key = tensor
            if role == 'input':
                key = leader
            elif role == 'weight' and all(isinstance(self.ops[n], nn.Linear)
                                          for n in (name, leader[0])):
                key = (leader[0], 'weight')
            members.setdefault((key, *by_bits), []).append(tensor)
        found = []
        for (_, *bits), tensors in members.items():
            squares = torch.stack([self._squares[t] for t in tensors]).sum(0)
            counts = [self._elements[t] for t in tensors]
            found.append(TensorGroup(
                tuple(tensors), sum(counts) if tensors[0][1] == 'weight' else max(counts),
                dict(zip(bits, (squares / samples).tolist()))))
        return found
