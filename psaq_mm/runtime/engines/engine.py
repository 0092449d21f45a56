# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The base class of engines."""
import json
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Tuple, Union

import numpy as np

from psaq_mm.errors import UserError

from ..packages import require_package

INFO_KEY = 'psaq_mm_info'
"""Where a file of a whole model says what it takes and gives, as JSON."""


class Engine:
    """An exported graph that is loaded by an engine.

    Args:
        path (str or Path): The file.
        threads (int, optional): Number of threads; 0 lets the engine choose.
            Defaults to 0.
        precision (str): ``fp32`` or ``bf16``, for what is not in integers.
            Defaults to ``fp32``.
        device (str): What computes, by the engine's name of it. Defaults to
            ``CPU``.

    Raises:
        UserError: If the engine is not installed, cannot read the file, or
            does not have the precision or the device.
    """

    name: ClassVar[str]
    package: ClassVar[str]
    suffix: ClassVar[str]
    """Suffix of its files."""

    format: ClassVar[str]
    """Name of its files' format in ``tools/export.py``."""

    precisions: ClassVar[Tuple[str, ...]] = ('fp32', )

    def __init__(self, path: Union[str, Path], threads: int = 0,
                 precision: str = 'fp32', device: str = 'CPU') -> None:
        if precision not in self.precisions:
            raise UserError(f'{self.name} on a CPU has no {precision}; it has '
                            f'{", ".join(self.precisions)}')
        self.path, self.threads, self.precision = Path(path), threads, precision
        self.device = device.upper()
        self.require_device(device)
        if not self.path.is_file():
            raise UserError(f'{path} does not exist; tools/export.py writes such files')
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

    @classmethod
    def devices(cls) -> List[str]:
        """Return the devices of this machine that the engine can use.

        Raises:
            UserError: If the engine is not installed.
        """
        raise NotImplementedError

    @classmethod
    def require_device(cls, device: str) -> None:
        """Check that the engine has a device.

        Raises:
            UserError: If not, or the engine is not installed.
        """
        known = cls.devices()
        if device.upper().split('.')[0] not in {name.split('.')[0] for name in known}:
            raise UserError(f'device {device}: {cls.name} {cls.version()} has '
                            f'{", ".join(known)} here')

    def _load(self) -> None:
        raise NotImplementedError

    def _info(self) -> str:
        """The text that the file holds as :data:`INFO_KEY`; empty if it holds none."""
        raise NotImplementedError

    def info(self) -> Dict[str, Any]:
        """What the file of a whole model says of its input and results.

        Raises:
            UserError: If it says nothing.
        """
        text = self._info()
        if not text:
            raise UserError(f'{self.path} does not say what it takes and gives: it holds '
                            'features alone, or another tool wrote it. Write it by '
                            'tools/export.py, without --part features')
        found: Dict[str, Any] = json.loads(text)
        return found

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        """Compute the outputs, in the graph's order.

        Args:
            images (np.ndarray): float32, shape (B, C, H, W).

        Returns:
            list[np.ndarray]: float32; labels int64.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Return engine, version, threads and precision in a few words."""
        threads = f'{self.threads} thread{"s" * (self.threads != 1)}' if self.threads else \
            'threads as it likes'
        where = '' if self.device == 'CPU' else f' on {self.device}'
        return (f'{self.name} {self.version()}{where}, {threads}, {self.precision} beside the '
                'integers')
