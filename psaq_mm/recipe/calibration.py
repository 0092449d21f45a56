# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""How ranges are set: the ``calibration`` section of a recipe."""
from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

from psaq_mm.sections import build_section

from .checks import check_positive_int, sides


@dataclass(frozen=True)
class CalibrationSettings:
    """How the student's ranges are set. The defaults are those of the preset ``default``.

    Args:
        batch_size (int): Images of the synthesis' size in a forward pass;
            fewer if they are larger. Defaults to 8.
        image_size (str or int or tuple[int, int], optional): Size at which
            the last ranges are set: ``test`` for that of the config's test
            pipeline, or side or (height, width) in pixels. Images of
            another size become mosaics of it. None for their own size.
            Defaults to ``test``.
    """
    batch_size: int = 8
    image_size: Union[None, str, int, Sequence[int]] = 'test'

    def __post_init__(self) -> None:
        check_positive_int(self.batch_size, 'batch_size')
        if self.image_size is not None and self.image_size != 'test':
            object.__setattr__(self, 'image_size', sides(
                self.image_size, "'test', None, a positive integer or (height, width)"))

    @property
    def size(self) -> Optional[Tuple[int, int]]:
        """tuple[int, int], optional: Height and width, if given in pixels."""
        if self.image_size is None or isinstance(self.image_size, str):
            return None
        return sides(self.image_size, '')

    @classmethod
    def from_dict(cls, values: Optional[Mapping[str, Any]]) -> 'CalibrationSettings':
        """Build from the ``calibration`` section of a config."""
        return build_section(cls, values, 'calibration')
