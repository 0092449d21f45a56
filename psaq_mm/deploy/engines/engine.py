# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The base class of engines."""
from pathlib import Path
from typing import ClassVar, List, Tuple, Union

import numpy as np

from psaq_mm.errors import UserError

from ..packages import require_package


class Engine:
    """An exported graph that is loaded by an engine, to run on the CPU.

    Args:
        path (str or Path): The file.
        threads (int, optional): Number of threads; 0 lets the engine choose.
            Defaults to 0.
        precision (str): ``fp32`` or ``bf16``, for what is not in integers.
            Defaults to ``fp32``.

    Raises:
        UserError: If the engine is not installed, cannot read the file, or
            does not have the precision.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    suffix: ClassVar[str]
    """Suffix of its files."""

    format: ClassVar[str]
    """Name of its files' format in ``tools/export.py``."""

    precisions: ClassVar[Tuple[str, ...]] = ('fp32', )

    def __init__(self, path: Union[str, Path], threads: int = 0,
                 precision: str = 'fp32') -> None:
        if precision not in self.precisions:
            raise UserError(f'{self.name} on a CPU has no {precision}; it has '
                            f'{", ".join(self.precisions)}')
        self.path, self.threads, self.precision = Path(path), threads, precision
        try:
            self._load()
        except UserError:
            raise
        except Exception as error:  # engines have exceptions of their own
            raise UserError(f'{self.name} {self.version()} cannot load {path}: '
                            f'{" ".join(str(error).split())[:300]}') from error

    @classmethod
    def version(cls) -> str:
        """Return the version of the engine.

        Raises:
            UserError: If the engine is not installed.
        """
        return str(require_package(cls.package).__version__).split('-')[0]

    def _load(self) -> None:
        raise NotImplementedError

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        """Compute the outputs, in the graph's order.

        Args:
            images (np.ndarray): float32, shape (B, C, H, W).

        Returns:
            list[np.ndarray]: float32.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Return engine, version, threads and precision in a few words."""
        threads = f'{self.threads} thread{"s" * (self.threads != 1)}' if self.threads else \
            'threads as it likes'
        return f'{self.name} {self.version()}, {threads}, {self.precision} beside the integers'
