# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What an engine does with a file."""
from pathlib import Path
from typing import ClassVar, List, Tuple, Union

import numpy as np

from psaq_mm.errors import UserError

PRECISIONS = ('fp32', 'bf16')


class Engine:
    """One exported graph, loaded and ready to run on the CPU.

    Args:
        path (str or Path): The file.
        threads (int, optional): Threads; 0 for as many as the engine likes.
            Defaults to 0.
        precision (str): ``fp32`` or ``bf16``: of what is not in integers.
            Defaults to ``fp32``.

    Raises:
        UserError: If the engine is not installed, cannot read the file, or
            does not have the precision.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    suffix: ClassVar[str]
    """What the names of its files end with."""

    format: ClassVar[str]
    """What ``tools/export.py`` calls its files."""

    precisions: ClassVar[Tuple[str, ...]] = ('fp32', )

    def __init__(self, path: Union[str, Path], threads: int = 0,
                 precision: str = 'fp32') -> None:
        if precision not in self.precisions:
            raise UserError(f'{self.name} on a CPU has no {precision}; it has '
                            f'{", ".join(self.precisions)}')
        self.path, self.threads, self.precision = Path(path), threads, precision
        if not self.path.is_file():
            raise UserError(f'{path} does not exist; tools/export.py --format {self.format} '
                            'writes it')
        try:
            self._load()
        except UserError:
            raise
        except Exception as error:  # what an engine raises is its own
            raise UserError(f'{self.name} {self.version()} cannot load {path}: '
                            f'{" ".join(str(error).split())[:300]}') from error

    @classmethod
    def version(cls) -> str:
        """Version of the engine."""
        from ..packages import require_package
        return str(require_package(cls.package).__version__).split('-')[0]

    def _load(self) -> None:
        raise NotImplementedError

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        """Outputs of images, float32 of shape (B, C, H, W), in the graph's order."""
        raise NotImplementedError

    def describe(self) -> str:
        """Engine, version, threads and precision in a few words."""
        threads = f'{self.threads} thread{"s" * (self.threads != 1)}' if self.threads else \
            'threads as it likes'
        return f'{self.name} {self.version()}, {threads}, {self.precision} beside the integers'
