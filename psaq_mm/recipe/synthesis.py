# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How images are made from the float model: the ``synthesis`` section of a recipe."""
from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple, Union

from psaq_mm.errors import UserError
from psaq_mm.prior import PriorTerm
from psaq_mm.registry import PRIORS
from psaq_mm.sections import build_section, nearest

from .checks import check_number, check_positive_int, sides
from .merging import plain_copy


def _default_priors() -> Dict[str, Any]:
    return dict(
        patch_similarity=dict(type='PatchSimilarityPrior', weight=1., form='binned', bins=256),
        total_variation=dict(type='TotalVariationPrior', weight=0.025))


@dataclass(frozen=True)
class SynthesisSettings:
    """How images are made from the float model. The defaults are those of the preset
    ``default``.

    Args:
        num_images (int): Number of images. Defaults to 8.
        batch_size (int): Images made at a time. Defaults to 8.
        image_size (int or tuple[int, int], optional): Side, or (height, width),
            in pixels. Defaults to None: the smallest size that leaves the windows
            of the model's Swin without padding, such as 224 for windows of 7 and
            384 for windows of 12, or the one size that a classifier takes; twice
            or four times that where neck and head cannot be run at it.
        steps (int): Adam steps in each phase. Defaults to 50: twice as many
            earned no accuracy [measured; V1 takes 500].
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
        save_interval (int): Steps between two saved states, to resume from.
            Defaults to 50.
    """
    num_images: int = 8
    batch_size: int = 8
    image_size: Union[None, int, Sequence[int]] = None
    steps: int = 50
    shifts: Sequence[int] = (15, 30)
    lr: float = 0.25
    betas: Sequence[float] = (0.5, 0.9)
    warmup: float = 0.2
    flip: float = 0.5
    priors: Mapping[str, Any] = field(default_factory=_default_priors)
    save_interval: int = 50

    def __post_init__(self) -> None:
        def store(key: str, value: Any) -> None:
            object.__setattr__(self, key, value)

        for key in ('num_images', 'batch_size', 'steps', 'save_interval'):
            check_positive_int(getattr(self, key), key)
        if self.image_size is not None:
            store('image_size', sides(self.image_size,
                                      'None, a positive integer or (height, width)'))
        if not isinstance(self.shifts, (list, tuple)) or not self.shifts:
            raise UserError(f'shifts must be a non-empty list of pixels, got {self.shifts!r}')
        for shift in self.shifts:
            check_number(shift, 'shifts', 0, 224)
        store('shifts', tuple(self.shifts))
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2:
            raise UserError(f'betas must be two numbers, got {self.betas!r}')
        for beta in self.betas:
            check_number(beta, 'betas', 0, 0.99999)
        store('betas', tuple(self.betas))
        check_number(self.lr, 'lr', 1e-8, 1e3)
        check_number(self.warmup, 'warmup', 0, 1)
        check_number(self.flip, 'flip', 0, 1)
        if not isinstance(self.priors, Mapping):
            raise UserError(f'priors must be a dict of named terms, got {self.priors!r}')
        store('priors', plain_copy(self.priors))
        self.build_priors()

    @property
    def size(self) -> Tuple[int, int]:
        """tuple[int, int]: Height and width of the images.

        Raises:
            ValueError: If they follow the model: :func:`psaq_mm.synthesis.sized_for`
                gives settings with the size of one.
        """
        if self.image_size is None:
            raise ValueError('the size of the images follows a model that is not known here')
        return sides(self.image_size, '')

    def require_images_for(self, processes: int) -> None:
        """Raise a :class:`UserError` if some process would have no image to make."""
        if self.num_images < processes:
            raise UserError(f'synthesis.num_images must be at least the {processes} processes, '
                            f'got {self.num_images}')

    def build_priors(self) -> Dict[str, PriorTerm]:
        """Fresh loss terms, by their name in the config."""
        terms: Dict[str, PriorTerm] = {}
        for name, config in self.priors.items():
            if config is None:
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
            arguments = {k: v for k, v in config.items() if k != 'type'}
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
