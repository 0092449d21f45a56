# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Blocks of the student learn, one after the other, to give what the float model's give.

BRECQ (Li et al., 2021, arXiv 2102.05426) reconstructs block by block; QDrop (Wei et al., 2022,
arXiv 2203.05740) leaves elements float at random meanwhile, so that what is learned does not
hang on the rounding errors of a few images.
"""
import math
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmengine.dist import broadcast
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.devices import module_device
from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating
from psaq_mm.ops import QuantOp
from psaq_mm.prior import derived_seed
from psaq_mm.recipe import ReconstructionSettings
from psaq_mm.recipe.checks import check_progress
from psaq_mm.synthesis import learning_rate_factor

from .history import history_of, note, require_pair
from .range_learner import RangeLearner

MAX_IMAGES = 32
"""Images that one block learns from, drawn for each: memory does not grow with their number
[choice]."""


class Passage(NamedTuple):
    """What went through a block, on the CPU.

    Args:
        inputs (Tensor): Its first argument for all images, the images first.
        outputs (Tensor): What it gave, likewise.
        others (tuple): Its other arguments.
        keywords (dict): Those by name.
    """
    inputs: Tensor
    outputs: Tensor
    others: Tuple[Any, ...]
    keywords: Dict[str, Any]


class _Reached(Exception):
    """Ends a forward pass: what comes later is not needed."""


def passage(block: nn.Module, images: Tensor, forward: Callable[[Tensor], Any],
            batch_size: int) -> Passage:
    """Run a model on images as far as a block, without gradients.

    Args:
        block (nn.Module): Within the model; its first argument and its output are tensors with
            the images first.
        images (Tensor): Shape (N, C, H, W).
        forward (Callable): Runs the model on a batch of them.
        batch_size (int): Images in a batch.
    """
    found: List[Passage] = []

    def note(module: nn.Module, args: Any, keywords: Dict[str, Any], output: Tensor) -> None:
        found.append(Passage(args[0].cpu(), output.cpu(), args[1:], keywords))
        raise _Reached

    with torch.no_grad(), block.register_forward_hook(note, with_kwargs=True):
        for batch in images.split(batch_size):
            with suppress(_Reached):
                forward(batch)
    return Passage(torch.cat([part.inputs for part in found]),
                   torch.cat([part.outputs for part in found]), *found[0][2:])


def mixed(one: Tensor, other: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A tensor whose elements are those of ``other`` with a probability of ``share``, else those
    of ``one``."""
    if share == 0:
        return one
    return torch.where(torch.empty_like(one).bernoulli_(share, generator=generator).bool(),
                       other, one)


@contextmanager
def leaving_float(ops: List[QuantOp], share: float, generator: torch.Generator) -> Iterator[None]:
    """Within the block, activation quantizers leave elements as they are at random, wherever
    gradients are taken.

    Args:
        ops (list[QuantOp]): Whose quantizers.
        share (float): Probability that an element is left float.
        generator (torch.Generator): Source of the draws.
    """

    def mix(quantizer: nn.Module, args: Any, output: Tensor) -> Optional[Tensor]:
        return mixed(output, args[0], share, generator) if torch.is_grad_enabled() else None

    with ExitStack() as hooks:
        for op in ops:
            for role, quantizer in op.quantizers.items():
                if role != 'weight':
                    hooks.enter_context(quantizer.register_forward_hook(mix))
        yield


class Reconstructor:
    """Lets one block after the other learn, one Adam step at a time.

    Loss is the squared error of the block's output, relative to the mean square of the float
    block's. Weights, LayerNorms and ranges of activations learn, by the straight-through
    estimator; a layer's learning rate is relative to the step between two integers of its
    weight. With several processes all learn the same, and keep what the first one has.
    :meth:`state_dict` holds what is left of finished blocks: a restored run goes on with the
    next block, with the same bits on the CPU.

    Args:
        student (nn.Module): Calibrated; changed in place.
        teacher (nn.Module): The float model that it is a copy of.
        images (Tensor): Normalized images of shape (N, C, H, W).
        settings (ReconstructionSettings): The rules.
        seed (int): Seed of all randomness. Defaults to 0.
        batch_size (int): Images in a forward pass of the model. Defaults to 8.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, images: Tensor,
                 settings: ReconstructionSettings, seed: int = 0, batch_size: int = 8) -> None:
        self.student, self.teacher, self.images = student, teacher, images
        self.settings, self.seed, self.batch_size = settings, seed, batch_size
        self.adapter = find_adapter(student)
        self.device = module_device(student)
        self.blocks = self.adapter.blocks(student)
        self.step_index = 0
        self.losses: Dict[str, List[float]] = {}
        """dict[str, list[float]]: Name of a block to the loss of each of its steps."""

    @property
    def total_steps(self) -> int:
        """int: Steps of all blocks."""
        return len(self.blocks) * self.settings.steps

    @property
    def done(self) -> bool:
        """bool: Whether all blocks have learned."""
        return self.step_index >= self.total_steps

    @property
    def between_blocks(self) -> bool:
        """bool: Whether no block is in the middle of its steps."""
        return self.step_index % self.settings.steps == 0

    def step(self) -> Dict[str, float]:
        """Take one step of the block whose turn it is.

        Returns:
            dict[str, float]: ``block_error``: the loss before the step.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        number, step = divmod(self.step_index, self.settings.steps)
        if step == 0:
            self._begin(number)
        value = self._step(step)
        if not math.isfinite(value):
            raise FloatingPointError(f'the loss of {self.blocks[number]} is {value:g}; lower '
                                     'reconstruction.weight_lr and norm_lr')
        self.losses.setdefault(self.blocks[number], []).append(value)
        self.step_index += 1
        if self.between_blocks:
            self._end()
        return dict(block_error=value)

    def _begin(self, number: int) -> None:
        name = self.blocks[number]
        self._generator = torch.Generator(self.device).manual_seed(derived_seed(self.seed, number))
        cpu = torch.Generator().manual_seed(derived_seed(self.seed, number))
        images = self.images[torch.randperm(len(self.images), generator=cpu)[:MAX_IMAGES]]
        self._block = self.student.get_submodule(name)
        self._expected, self._seen = (
            passage(model.get_submodule(name), images,
                    lambda batch, model=model: self.adapter.forward_backbone(  # type: ignore
                        model, batch.to(self.device)), self.batch_size)
            for model in (self.teacher, self.student))
        self._scale = float(self._expected.outputs.square().mean()) or 1.
        self._ops = [op for op in self._block.modules() if isinstance(op, QuantOp)]
        groups = parameter_groups(self._block, self._ops, self.settings)
        self._parameters = [p for group in groups for p in group['params']]
        self._quantizers = [quantizer for op in self._ops
                            for role, quantizer in op.quantizers.items()
                            if role != 'weight' and self.settings.range_lr]
        self._ranges = RangeLearner(self._quantizers)
        groups.append(dict(params=[self._ranges.offsets], peak=self.settings.range_lr))
        self._optimizer = torch.optim.Adam(groups)

    def _step(self, step: int) -> float:
        count = len(self._seen.inputs)
        at = torch.randperm(count, generator=self._generator, device=self.device)
        at = at[:self.settings.batch_size].cpu()
        inputs, floats, outputs = (values[at].to(self.device) for values in (
            self._seen.inputs, self._expected.inputs, self._expected.outputs))
        for group in self._optimizer.param_groups:
            group['lr'] = group['peak'] * learning_rate_factor(step, self.settings.steps, 0.)
        with torch.enable_grad(), _learning(self._parameters, self._ranges), \
                leaving_float(self._ops, self.settings.drop, self._generator):
            given = self._block(mixed(inputs, floats, self.settings.drop, self._generator),
                                *self._seen.others, **self._seen.keywords)
            loss = (given - outputs).square().mean() / self._scale
            value = float(loss.detach())
            if math.isfinite(value):
                loss.backward()
                self._ranges.collect_gradients()
                self._optimizer.step()
                self._ranges.apply()
            self._optimizer.zero_grad(set_to_none=True)
        return value

    def _end(self) -> None:
        for tensor in (*self._parameters, *self._ranges.tensors):
            broadcast(tensor.data)
        for op in self._ops if self.settings.weight_lr else ():
            op.weight_settled = op.weight_quantizer is not None
        for quantizer in self._quantizers:
            quantizer.learned = True
        self._note(self.blocks[self.step_index // self.settings.steps - 1])
        del self._block, self._expected, self._seen, self._ops, self._optimizer
        del self._parameters, self._quantizers, self._ranges

    def state_dict(self) -> Dict[str, Any]:
        """What is left of finished blocks: tensors and plain values."""
        done = self.step_index // self.settings.steps
        return dict(step_index=done * self.settings.steps,
                    losses={name: list(self.losses[name]) for name in self.blocks[:done]},
                    blocks=[{name: value.cpu().clone() for name, value in
                             self.student.get_submodule(block).state_dict().items()}
                            for block in self.blocks[:done]])

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.step_index = state['step_index']
        self.losses = {name: list(values) for name, values in state['losses'].items()}
        for name, saved in zip(self.blocks, state['blocks']):
            self.student.get_submodule(name).load_state_dict(saved)
            self._note(name)

    def _note(self, block: str) -> None:
        """Note that a block has learned."""
        note(self.student, reconstructed=(*history_of(self.student).reconstructed, block))


@contextmanager
def _learning(parameters: List[nn.Parameter], ranges: RangeLearner) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(True)
    ranges.require_grad(True)
    try:
        yield
    finally:
        ranges.require_grad(False)
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def parameter_groups(block: nn.Module, ops: List[QuantOp],
                     settings: ReconstructionSettings) -> List[Dict[str, Any]]:
    """What a block learns beside ranges, as groups of an optimizer with their ``peak`` rate.

    Args:
        block (nn.Module): With quantized ops.
        ops (list[QuantOp]): Those.
        settings (ReconstructionSettings): Learning rates; what has none does not learn.
    """
    groups: List[Dict[str, Any]] = []
    for op in ops if settings.weight_lr else []:
        if op.weight_quantizer is not None:
            own = [p for p in (op.weight, op.bias) if isinstance(p, nn.Parameter)]
            step = float(op.weight_quantizer.scale.detach().mean())
            groups.append(dict(params=own, peak=settings.weight_lr * step))
    norms = [p for m in block.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    if norms and settings.norm_lr:
        groups.append(dict(params=norms, peak=settings.norm_lr))
    return groups


@contextmanager
def reconstructor(student: nn.Module, teacher: nn.Module, images: Tensor,
                  settings: ReconstructionSettings, seed: int = 0,
                  batch_size: int = 8) -> Iterator[Reconstructor]:
    """A :class:`Reconstructor`, to be stepped within the block.

    Arguments are those of :func:`reconstruct`. Both models are in evaluation mode inside, and
    as before after it.
    """
    if not settings.steps:
        raise UserError('psaq_mm.reconstruct: reconstruction.steps is 0, so there is nothing to '
                        'do; give it steps such as 60, or leave this step out')
    require_pair(student, teacher, images, 'reconstruct', seed, batch_size)
    with evaluating(student, teacher):
        yield Reconstructor(student, teacher, images, settings, seed, batch_size)


def reconstruct(student: nn.Module, teacher: nn.Module, images: Tensor,
                settings: Optional[ReconstructionSettings] = None, seed: int = 0,
                batch_size: int = 8,
                progress: Optional[Callable[[Dict[str, float]], None]] = None) -> nn.Module:
    """Let the transformer blocks of a student learn, one after the other, in place.

    Args:
        student (nn.Module): From :func:`psaq_mm.calibrate`.
        teacher (nn.Module): The float model that it is a copy of.
        images (Tensor): From :func:`psaq_mm.synthesize`, shape (N, C, H, W).
        settings (ReconstructionSettings, optional): The rules. Defaults to None: the defaults
            with 60 steps.
        seed (int): Seed of all randomness. Defaults to 0.
        batch_size (int): Images in a forward pass of the model. Defaults to 8.
        progress (Callable, optional): Called with the losses of each step. Defaults to None.

    Returns:
        nn.Module: The student.

    Raises:
        UserError: If there are no steps, the student is not calibrated, or the teacher is not
            its float model.
        FloatingPointError: If a loss is not finite.
    """
    check_progress(progress)
    settings = settings or ReconstructionSettings(steps=60)
    with reconstructor(student, teacher, images, settings, seed, batch_size) as blocks:
        while not blocks.done:
            losses = blocks.step()
            if progress is not None:
                progress(losses)
    return student
