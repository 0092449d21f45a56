# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The rules of the teacher-student game: the ``evolution`` section of a recipe."""
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from psaq_mm.errors import UserError
from psaq_mm.sections import build_section, is_integer, nearest

from .checks import check_number, check_positive_int
from .merging import plain_copy

TAP_GROUPS = ('backbone', 'neck', 'scores', 'deltas', 'rois', 'logits')
LEARN = ('ranges', 'weights', 'both')


def _taps() -> Dict[str, float]:
    return dict(backbone=1., neck=1., scores=1., deltas=1., logits=1., rois=0.)


@dataclass(frozen=True)
class EvolutionSettings:
    """How images and student evolve against each other. The defaults are those of the
    preset ``default``, which plays no game.

    Args:
        rounds (int): Rounds of sample steps and student steps; 0 for no game.
            Defaults to 0: beyond GPTQ it earned no accuracy [measured].
        student_steps (int): Steps of the student in a round; 0 leaves it as
            calibrated. Defaults to 20.
        batch_size (int): Images in a step. Defaults to 4.
        taps (dict): Group to its weight in the discrepancy. Groups:
            ``backbone``, ``neck``, ``scores`` and ``deltas`` (of the RPN, or
            of a single-stage head), ``rois`` (RoI heads on the teacher's
            regions), ``logits`` (of segmentors and classifiers); those
            that a model does not have are left out. Defaults to 1 for all
            but ``rois``.
        zoom (float): Largest magnification of the images that the student
            learns from; 1 leaves them as they are. Defaults to 3.
        contrast (float): Least contrast of these, of 1; blended with plain
            colours for the rest. Defaults to 0.2.
        learn (str): ``ranges``, ``weights`` (and biases) or ``both``.
            Defaults to ``both``.
        weight_lr (float): Peak learning rate of weights and biases, as a
            fraction of the step between two integers of the layer's weight,
            so that one rate fits all widths. Defaults to 0.01.
        range_lr (float): Peak learning rate of ranges, as a fraction of
            the scale. Defaults to 1e-3; 5e-3 clips what synthetic images do
            not show [measured].
        patience (int): Rounds in which the discrepancy may rise one after
            the other before the game ends. Defaults to 3.
        save_interval (int): Steps between two saved states, to resume from.
            Defaults to 100.
        sample_steps (int): Steps of the images in a round; 0 leaves them as
            the prior made them. Defaults to 0. What follows is of these
            steps, which only the preset ``paper`` has: they earned nothing
            that we could measure.
        adversarial_weight (float): Factor of -log(1 + D) in the loss of the
            images. Defaults to 1.
        adversarial_fraction (float, optional): Bound of that term's gradient,
            as a fraction of the norm of the prior's, for each image; 0 for a
            game without a competitor, None for no bound. Defaults to 0.3.
        sample_lr (float): Peak learning rate of the pixels in a round.
            Defaults to 0.05.
        buffer_size (int): Images of past rounds that are kept besides the
            first ones; 0 learns from the newest alone. Defaults to 32.
        new_fraction (float): Fraction of a batch taken from the newest
            images. Defaults to 0.5.

    Raises:
        UserError: If a value is outside of what is described here.
    """
    rounds: int = 0
    student_steps: int = 20
    batch_size: int = 4
    taps: Mapping[str, float] = field(default_factory=_taps)
    zoom: float = 3.
    contrast: float = 0.2
    learn: str = 'both'
    weight_lr: float = 0.01
    range_lr: float = 1e-3
    patience: int = 3
    save_interval: int = 100
    sample_steps: int = 0
    adversarial_weight: float = 1.
    adversarial_fraction: Optional[float] = 0.3
    sample_lr: float = 0.05
    buffer_size: int = 32
    new_fraction: float = 0.5

    def __post_init__(self) -> None:
        for key in ('batch_size', 'patience', 'save_interval'):
            check_positive_int(getattr(self, key), key)
        for key in ('rounds', 'sample_steps', 'student_steps', 'buffer_size'):
            value = getattr(self, key)
            if not is_integer(value) or value < 0:
                raise UserError(f'{key} must be an integer of at least 0, got {value!r}')
        if self.rounds and not self.sample_steps + self.student_steps:
            raise UserError('rounds of no steps: set sample_steps or student_steps, or rounds=0')
        for key, low, high in (('adversarial_weight', 0, 1e6), ('sample_lr', 0, 1e3),
                               ('new_fraction', 0, 1), ('zoom', 1, 16), ('contrast', 0, 1),
                               ('weight_lr', 0, 1), ('range_lr', 0, 1)):
            check_number(getattr(self, key), key, low, high)
        if self.adversarial_fraction is not None:
            check_number(self.adversarial_fraction, 'adversarial_fraction', 0, 1e6)
        if self.learn not in LEARN:
            raise UserError(f'learn must be one of {", ".join(LEARN)}, got {self.learn!r}')
        if not isinstance(self.taps, Mapping):
            raise UserError(f'taps must be a dict of groups, got {self.taps!r}')
        object.__setattr__(self, 'taps', plain_copy(self.taps))
        for group, weight in self.taps.items():
            if group not in TAP_GROUPS:
                raise UserError(f'unknown key taps.{group}.{nearest(str(group), TAP_GROUPS)} '
                                f'Known keys: {", ".join(TAP_GROUPS)}')
            check_number(weight, f'taps.{group}', 0, 1e6)
        if not any(self.taps.values()):
            raise UserError('taps has no weight above 0: teacher and student are compared nowhere')

    def chosen_groups(self, available: Sequence[str]) -> Tuple[str, ...]:
        """Groups with a weight, of those that a model has.

        Raises:
            UserError: If there is none.
        """
        chosen = tuple(group for group in available if self.taps.get(group))
        if not chosen:
            raise UserError('evolution.taps has weights for none of the groups of this model: '
                            + ', '.join(available))
        return chosen

    def require_learnable(self, weights: bool) -> None:
        """Raise a :class:`UserError` if only weights are to be learned, and none is quantized."""
        if self.learn == 'weights' and not weights:
            raise UserError("evolution.learn='weights', but no weight is quantized; set it to "
                            "'ranges', or let quantization.placement and include have weights")

    def require_even_batches(self, processes: int) -> None:
        """Raise a :class:`UserError` if processes cannot split a batch of the game evenly."""
        if self.rounds and self.batch_size % processes:
            even = -(-self.batch_size // processes) * processes
            raise UserError(f'evolution.batch_size must be a multiple of the {processes} '
                            f'processes, got {self.batch_size}; try {even}')

    @property
    def competes(self) -> bool:
        """bool: Whether the images are drawn to where the student fails."""
        return bool(self.adversarial_weight) and self.adversarial_fraction != 0

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'EvolutionSettings':
        """Build from the ``evolution`` section of a config."""
        return build_section(cls, values, 'evolution')
