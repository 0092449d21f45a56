# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The ``synthesis`` and ``calibration`` sections of a config."""
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from psaq_mm.errors import UserError
from psaq_mm.prior import PriorTerm
from psaq_mm.registry import PRIORS
from psaq_mm.sections import build_section, is_integer, nearest


def check_positive_int(value: Any, key: str) -> int:
    """Raise a :class:`UserError` unless a value is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise UserError(f'{key} must be a positive integer, got {value!r}')
    return value


def check_number(value: Any, key: str, low: float, high: float) -> float:
    """Raise a :class:`UserError` unless a value is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) \
            or not low <= value <= high:
        raise UserError(f'{key} must be a number from {low:g} to {high:g}, got {value!r}')
    return float(value)


def _sides(size: Any, expected: str = 'a positive integer or (height, width)') \
        -> Tuple[int, int]:
    """Height and width of an ``image_size``.

    Raises:
        UserError: If it is not as expected.
    """
    sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(is_integer(side) and side > 0 for side in sides):
        raise UserError(f'image_size must be {expected}, got {size!r}')
    return sides[0], sides[1]


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
            check_positive_int(getattr(self, key), key)
        _sides(self.image_size)
        if not isinstance(self.shifts, (list, tuple)) or not self.shifts:
            raise UserError(f'shifts must be a non-empty list of pixels, got {self.shifts!r}')
        for shift in self.shifts:
            check_number(shift, 'shifts', 0, 224)
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise UserError(f'betas must be two numbers, got {self.betas!r}')
        for beta in self.betas:
            check_number(beta, 'betas', 0, 0.99999)
        check_number(self.lr, 'lr', 1e-8, 1e3)
        check_number(self.warmup, 'warmup', 0, 1)
        check_number(self.flip, 'flip', 0, 1)
        self.build_priors()

    @property
    def size(self) -> Tuple[int, int]:
        """tuple[int, int]: Height and width of the images."""
        return _sides(self.image_size)

    def batches(self) -> List[int]:
        """Sizes of the batches that make ``num_images``."""
        whole, rest = divmod(self.num_images, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest else [])

    @property
    def total_steps(self) -> int:
        """int: Steps of all phases of all batches."""
        return len(self.batches()) * len(self.shifts) * self.steps

    def require_images_for(self, processes: int) -> None:
        """Raise if some of several processes would have no image to make.

        Args:
            processes (int): How many there are.

        Raises:
            UserError: If there are fewer images.
        """
        if self.num_images < processes:
            raise UserError(f'synthesis.num_images must be at least the {processes} processes, '
                            f'got {self.num_images}')

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
        batch_size (int): Images of the synthesis' size in a forward pass;
            fewer if they are larger. Defaults to 8.
        image_size (str or int or tuple[int, int], optional): Size at which
            the last ranges are set: ``test`` for that of the config's test
            pipeline, or side or (height, width) in pixels. Images of
            another size become mosaics of it. None for their own size.
            Defaults to None.
    """
    batch_size: int = 8
    image_size: Union[None, str, int, Sequence[int]] = None

    def __post_init__(self) -> None:
        check_positive_int(self.batch_size, 'batch_size')
        if self.image_size is not None and self.image_size != 'test':
            _sides(self.image_size, "'test', None, a positive integer or (height, width)")

    @property
    def size(self) -> Optional[Tuple[int, int]]:
        """tuple[int, int], optional: Height and width, if given in pixels."""
        if self.image_size is None or isinstance(self.image_size, str):
            return None
        return _sides(self.image_size)

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'CalibrationSettings':
        """Build from the ``calibration`` section of a config."""
        return build_section(cls, values, 'calibration')
