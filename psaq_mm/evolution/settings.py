# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The ``synthesis`` and ``calibration`` sections of a config."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from psaq_mm.errors import UserError
from psaq_mm.prior import PriorTerm
from psaq_mm.registry import PRIORS
from psaq_mm.sections import build_section, nearest


def _positive_int(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f'{key} must be a positive integer, got {value!r}')
    return value


def _number(value: Any, key: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) \
            or not low <= value <= high:
        raise UserError(f'{key} must be a number from {low:g} to {high:g}, got {value!r}')
    return float(value)


def _default_priors() -> Dict[str, Any]:
    return dict(patch_similarity=dict(type='PatchSimilarityPrior'),
                total_variation=dict(type='TotalVariationPrior'))


@dataclass
class SynthesisSettings:
    """How images are made from the float model.

    Args:
        num_images (int): Number of images. Defaults to 8.
        batch_size (int): Images made at a time. Defaults to 8.
        image_size (int or tuple[int, int]): Side, or (height, width), in
            pixels. Multiples of 224 leave Swin's windows without padding.
            Defaults to 224.
        steps (int): Adam steps in each phase. Defaults to 100 [choice; V1
            takes 500].
        shifts (tuple[int]): One phase for each entry: the largest random
            roll, in pixels for a side of 224. Defaults to (15, 30) [v1].
        lr (float): Peak learning rate of the pixels. Defaults to 0.25 [v1].
        betas (tuple[float, float]): Adam's. Defaults to (0.5, 0.9) [v1].
        warmup (float): Fraction of each phase in which the learning rate
            rises; it then falls as a cosine. Defaults to 0.2 [v1].
        flip (float): Probability of a horizontal flip. Defaults to 0.5 [v1].
        priors (dict): Name to config of a loss term of the PRIORS registry,
            each with its ``weight``. Defaults to the patch similarity and
            the total variation. ``None`` as a value drops a term.
        save_interval (int): Steps between two saved states, for --resume.
            Defaults to 50.
    """
    num_images: int = 8
    batch_size: int = 8
    image_size: Union[int, Sequence[int]] = 224
    steps: int = 100
    shifts: Sequence[int] = (15, 30)
    lr: float = 0.25
    betas: Sequence[float] = (0.5, 0.9)
    warmup: float = 0.2
    flip: float = 0.5
    priors: Mapping[str, Any] = field(default_factory=_default_priors)
    save_interval: int = 50

    def __post_init__(self) -> None:
        for key in ('num_images', 'batch_size', 'steps', 'save_interval'):
            _positive_int(getattr(self, key), key)
        size = self.image_size
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2:
            raise UserError('image_size must be a positive integer or (height, width), '
                            f'got {size!r}')
        for side in sides:
            _positive_int(side, 'image_size')
        if not isinstance(self.shifts, (list, tuple)) or not self.shifts:
            raise UserError(f'shifts must be a non-empty list of pixels, got {self.shifts!r}')
        for shift in self.shifts:
            _number(shift, 'shifts', 0, 224)
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise UserError(f'betas must be two numbers, got {self.betas!r}')
        for beta in self.betas:
            _number(beta, 'betas', 0, 0.99999)
        _number(self.lr, 'lr', 1e-8, 1e3)
        _number(self.warmup, 'warmup', 0, 1)
        _number(self.flip, 'flip', 0, 1)
        self.build_priors()

    @property
    def size(self) -> Tuple[int, int]:
        """tuple[int, int]: Height and width of the images."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        return int(self.image_size[0]), int(self.image_size[1])

    def batches(self) -> List[int]:
        """Sizes of the batches that make ``num_images``."""
        whole, rest = divmod(self.num_images, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest else [])

    @property
    def total_steps(self) -> int:
        """int: Steps of all phases of all batches."""
        return len(self.batches()) * len(self.shifts) * self.steps

    def build_priors(self) -> Dict[str, PriorTerm]:
        """Fresh loss terms, by their name in the config."""
        if not isinstance(self.priors, Mapping):
            raise UserError(f'priors must be a dict of named terms, got {self.priors!r}')
        terms: Dict[str, PriorTerm] = {}
        for name, config in self.priors.items():
            if config is None or name == '_scope_':
                continue
            where = f'priors.{name}'
            if not isinstance(config, Mapping) or 'type' not in config:
                raise UserError(f"{where} must be a dict with a 'type', got {config!r}")
            if name == 'total':
                raise UserError(f'{where}: the sum of all terms is called that; give the term '
                                'another name')
            if not isinstance(config['type'], str):
                raise UserError(f'{where}.type must be the name of a term, '
                                f'got {config["type"]!r}')
            arguments = {k: v for k, v in config.items() if k not in ('type', '_scope_')}
            cls = PRIORS.get(config['type'])
            if cls is None:
                known = sorted(PRIORS.module_dict)
                raise UserError(f'{where}.type: {config["type"]!r} is not registered.'
                                f'{nearest(config["type"], known)} '
                                f'Known: {", ".join(known)}')
            try:
                terms[name] = cls(**arguments)
            except TypeError as error:
                raise UserError(f'{where}: {error}') from error
        if not terms:
            raise UserError('priors is empty: nothing would drive the images')
        return terms

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'SynthesisSettings':
        """Build from the ``synthesis`` section of a config."""
        return build_section(cls, values, 'synthesis')


@dataclass
class CalibrationSettings:
    """How the student's ranges are set.

    Args:
        batch_size (int): Images in a forward pass. Defaults to 8.
    """
    batch_size: int = 8

    def __post_init__(self) -> None:
        _positive_int(self.batch_size, 'batch_size')

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'CalibrationSettings':
        """Build from the ``calibration`` section of a config."""
        return build_section(cls, values, 'calibration')
