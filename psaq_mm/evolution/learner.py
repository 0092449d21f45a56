# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The quantized side of the game: what it learns, and one step of it."""
import math
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

import torch
from mmengine.dist import all_reduce_params
from torch import Tensor, nn

from psaq_mm.adapters import TapRecord
from psaq_mm.errors import UserError
from psaq_mm.ops import QuantOp, named_quant_ops
from psaq_mm.processes import stopping_together
from psaq_mm.quantization import Quantizer
from psaq_mm.recipe import EvolutionSettings
from psaq_mm.student.range_learner import RangeLearner

from .discrepancy import discrepancy

Forward = Callable[[Tensor, Optional[List[Tensor]]], TapRecord]


def _unique(tensors: Any) -> List[Any]:
    """Without repetitions, by identity: layers may be shared."""
    return list({id(t): t for t in tensors}.values())


def _by_layer(ops: Iterable[QuantOp]) -> Iterator[Tuple[List[nn.Parameter], float]]:
    """What each layer with a quantized weight learns, that and its bias, and the mean
    step between two integers of the weight; shared parameters once."""
    seen: Set[int] = set()
    for op in ops:
        quantizer = op.weight_quantizer
        if quantizer is None:
            continue
        own = [p for p in op._parameters.values()
               if p is not None and p.is_floating_point() and id(p) not in seen]
        seen.update(map(id, own))
        if own:
            yield own, float(quantizer.scale.detach().mean())


class StudentLearner:
    """A calibrated model that learns to give its teacher's taps.

    What may be learned are the weights and biases of layers whose weight is
    quantized, by the straight-through estimator, and all ranges. A layer's
    learning rate is relative to the step between two integers of its weight:
    one rate fits all widths, and a layer of 8 bits among others of 3 hardly
    moves [choice]. Norms keep their statistics and DropPath is off: the model
    stays in evaluation mode. With several processes gradients are averaged, so
    all hold the same student.

    Args:
        model (nn.Module): Calibrated and switched on.
        forward (Callable): Runs it on images and, if RoI heads are asked, on
            the teacher's regions; gives its taps.
        settings (EvolutionSettings): The rules.

    Raises:
        UserError: If weights alone are to be learned, and none is quantized.
    """

    def __init__(self, model: nn.Module, forward: Forward,
                 settings: EvolutionSettings) -> None:
        self.model, self.forward, self.settings = model, forward, settings
        ops = [op for _, op in named_quant_ops(model)]
        learn = settings.learn
        groups: List[Dict[str, Any]] = [
            dict(params=params, peak=settings.weight_lr * step)
            for params, step in _by_layer(ops if learn != 'ranges' else [])]
        self.weights: List[nn.Parameter] = [p for group in groups for p in group['params']]
        settings.require_learnable(bool(self.weights))
        self.quantizers: List[Quantizer] = _unique(
            q for op in ops for q in op.quantizers.values()) if learn != 'weights' else []
        self.ranges = RangeLearner(self.quantizers)
        groups.append(dict(params=[self.ranges.offsets], peak=settings.range_lr))
        self.optimizer = torch.optim.Adam(groups)

    def require_grad(self, enabled: bool) -> None:
        """Let autograd reach what is learned, or no longer: images alone are
        differentiated faster without."""
        for weight in self.weights:
            weight.requires_grad_(enabled)
        self.ranges.require_grad(enabled)

    def discrepancy(self, teacher: TapRecord, images: Tensor) -> Tensor:
        """D of each image, shape (B,)."""
        if not teacher.taps:
            raise UserError('evolution.taps: the teacher proposes no regions on the images, and '
                            'only rois has a weight; give another group one')
        taps = self.forward(images, teacher.regions).taps
        return discrepancy(teacher.taps, taps, self.settings.taps)

    def step(self, teacher: TapRecord, images: Tensor, factor: float,
             before_update: Callable[[], None]) -> float:
        """Take one step towards the teacher.

        Args:
            teacher (TapRecord): Its taps on the images, without gradient.
            images (Tensor): This process's part of the batch, shape (B, C, H, W).
            factor (float): Of the peak learning rates.
            before_update (Callable): Called when nothing can fail any more
                before the student changes.

        Returns:
            float: D before the step, the mean over the images.

        Raises:
            FloatingPointError: If D or a gradient is not finite; the student
                is then as before.
        """
        with stopping_together():
            loss = self.discrepancy(teacher, images).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f'the discrepancy is {value:g}')
        loss.backward()
        self.ranges.collect_gradients()
        learned: List[Any] = [*self.weights, self.ranges.offsets]
        for tensor in learned:  # a head that saw no region has none
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        gradients = [tensor.grad for tensor in learned]
        all_reduce_params(gradients, op='mean')
        finite = torch.stack([torch.isfinite(g.sum()) for g in gradients if g.numel()])
        if not finite.all():
            self.forget_gradients()
            raise FloatingPointError('a gradient of the student is not finite')
        before_update()
        for group in self.optimizer.param_groups:
            group['lr'] = group['peak'] * factor
        self.optimizer.step()
        self.ranges.apply()
        self.forget_gradients()
        return value

    def forget_gradients(self) -> None:
        """Drop all gradients, those of a step that failed too."""
        for tensor in (*self.weights, *self.ranges.tensors, self.ranges.offsets):
            tensor.grad = None

    def learned(self) -> Dict[str, Any]:
        """A copy of weights and ranges, on the CPU."""
        return dict(weights=[w.detach().cpu().clone() for w in self.weights],
                    ranges=self.ranges.state_dict())

    def restore(self, learned: Dict[str, Any]) -> None:
        """Go back to what :meth:`learned` gave."""
        with torch.no_grad():
            for weight, value in zip(self.weights, learned['weights']):
                weight.copy_(value)
        self.ranges.load_state_dict(learned['ranges'])

    def state_dict(self) -> Dict[str, Any]:
        """All that the next step depends on."""
        return dict(learned=self.learned(), optimizer=self.optimizer.state_dict())

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.restore(state['learned'])
        self.optimizer.load_state_dict(state['optimizer'])
