# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A folder of exported graphs, run by an engine in the place of torch modules."""
import json
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError

from .engines import ENGINES, Engine
from .export import MANIFEST
from .graph_part import Size
from .hosts import graph_part


def read_export(folder: Union[str, Path]) -> Dict[str, Any]:
    """What ``export.json`` of a folder says.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        for graph in manifest['graphs']:
            graph['file'], graph['size']
        manifest['format'], manifest['source'], manifest['output_names']
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); tools/export.py writes such '
                        'a folder') from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is damaged ({error}); export again') from error
    return dict(manifest)


class Graphs:
    """Exported graphs of one model, called with images of any of their sizes.

    Args:
        folder (str or Path): Written by :func:`export_graphs`.
        backend (str): Name of an engine.
        threads (int): Threads of the engine, 0 for as many as it likes.
            Defaults to 0.
        precision (str): ``fp32`` or ``bf16``. Defaults to ``fp32``.
        sha256 (str, optional): Of the checkpoint that the graphs must have
            been made of. Defaults to None: any.

    Raises:
        UserError: If the folder holds none for this engine, or of another
            checkpoint.
    """

    def __init__(self, folder: Union[str, Path], backend: str, threads: int = 0,
                 precision: str = 'fp32', sha256: Optional[str] = None) -> None:
        self.folder, self.engine_class = Path(folder), ENGINES[backend]
        self.threads, self.precision = threads, precision
        self.manifest = read_export(folder)
        if self.manifest['format'] != self.engine_class.format:
            raise UserError(f'{folder} holds graphs of format {self.manifest["format"]}, '
                            f'{backend} runs {self.engine_class.format}; export that')
        if sha256 is not None and self.manifest['source'].get('sha256') != sha256:
            raise UserError(f'{folder} was exported from another checkpoint '
                            f'({self.manifest["source"].get("checkpoint")}); export this one')
        self._files: Dict[Optional[Size], str] = {
            None if g['size'] is None else (g['size'][0], g['size'][1]): g['file']
            for g in self.manifest['graphs']}
        self._engines: Dict[Optional[Size], Engine] = {}
        self.engine(next(iter(self._files)))  # what cannot be loaded fails here, early

    def engine(self, size: Optional[Size]) -> Engine:
        """The engine for images of a size, loaded when first asked for.

        Raises:
            UserError: If no graph takes that size.
        """
        key = size if size in self._files else None
        if key not in self._files:
            assert size is not None
            known = ', '.join(f'{s[0]} x {s[1]}' for s in self._files if s is not None)
            raise UserError(f'{self.folder} has no graph for images of {size[0]} x {size[1]} '
                            f'pixels, only for {known}; export with --size {size[0]} {size[1]} '
                            'too')
        if key not in self._engines:
            self._engines[key] = self.engine_class(self.folder / self._files[key], self.threads,
                                                   self.precision)
        return self._engines[key]

    def __call__(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Args:
            images (Tensor): Normalized, shape (B, C, H, W); the graphs take
                them one by one.

        Returns:
            tuple[Tensor, ...]: The outputs, on the device of the images.
        """
        engine = self.engine((int(images.shape[2]), int(images.shape[3])))
        array = images.detach().float().cpu().contiguous().numpy()
        rows = [engine.run(array[i:i + 1]) for i in range(len(array))]
        return tuple(torch.cat([torch.from_numpy(row[k]) for row in rows]).to(images.device)
                     for k in range(len(rows[0])))

    def describe(self) -> str:
        """Engine, version, threads and precision in a few words."""
        return next(iter(self._engines.values())).describe()

    def install(self, model: nn.Module) -> None:
        """Let a model of the same config run on these graphs, in place.

        Raises:
            UserError: If the model has other outputs.
        """
        part = graph_part(model)
        if list(part.output_names) != self.manifest['output_names']:
            raise UserError(f'{self.folder} holds graphs of another model: outputs '
                            f'{", ".join(self.manifest["output_names"])}, expected '
                            f'{", ".join(part.output_names)}')
        part.install(self)
