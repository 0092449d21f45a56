# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A folder of exported graphs, which an engine runs instead of torch modules."""
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.runtime.engines import ENGINES, Engine
from psaq_mm.runtime.export_manifest import read_export

from .hosts import find_subgraph
from .subgraph import Size


class Graphs:
    """The exported graphs of one model, for images of any of their sizes.

    Args:
        folder (str or Path): What :func:`export_graphs` wrote.
        backend (str): Name of an engine.
        threads (int): Threads of the engine; 0 lets it choose. Defaults to 0.
        precision (str): ``fp32`` or ``bf16``. Defaults to ``fp32``.
        sha256 (str, optional): Digest of the checkpoint from which the graphs
            must have been made. Defaults to None: any.
        device (str): The engine's device. Defaults to ``CPU``.

    Raises:
        UserError: If a file is missing or damaged, or the graphs are for
            another engine or of another checkpoint.
    """

    def __init__(self, folder: Union[str, Path], backend: str, threads: int = 0,
                 precision: str = 'fp32', sha256: Optional[str] = None,
                 device: str = 'CPU') -> None:
        self.folder, self.engine_class = Path(folder), ENGINES[backend]
        self.threads, self.precision, self.device = threads, precision, device
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
        self.engine(next(iter(self._files)))  # a graph that cannot be loaded fails early

    def engine(self, size: Optional[Size]) -> Engine:
        """Return the engine for images of a size; load it at the first call.

        Args:
            size (tuple[int, int], optional): Height and width.

        Raises:
            UserError: If no graph accepts that size.
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
                                                   self.precision, self.device)
        return self._engines[key]

    def whole(self, size: Size) -> Tuple[Engine, Dict[str, Any]]:
        """Return the engine of a whole model for images of a size: of that size, of all sizes,
        or the smallest that such an image can be padded to; and what its file says.

        Args:
            size (tuple[int, int]): Height and width.

        Raises:
            UserError: If no graph accepts that size.
        """
        larger = [known for known in self._files
                  if known is not None and known[0] >= size[0] and known[1] >= size[1]]
        if size not in self._files and None not in self._files and larger:
            size = min(larger, key=lambda known: known[0] * known[1])
        engine = self.engine(size)
        return engine, engine.info()

    def __call__(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Run the graph on each image of a batch.

        Args:
            images (Tensor): Normalized, shape (B, C, H, W).

        Returns:
            tuple[Tensor, ...]: The outputs, on the device of the images.
        """
        engine = self.engine((int(images.shape[2]), int(images.shape[3])))
        array = images.detach().float().cpu().contiguous().numpy()
        rows = [engine.run(array[i:i + 1]) for i in range(len(array))]
        return tuple(torch.cat([torch.from_numpy(row[k]) for row in rows]).to(images.device)
                     for k in range(len(rows[0])))

    def describe(self) -> str:
        """Return engine, version, threads and precision in a few words."""
        return next(iter(self._engines.values())).describe()

    def install(self, model: nn.Module) -> None:
        """Make a model of the same config run on these graphs, in place.

        Args:
            model (nn.Module): On any device, in any mode.

        Raises:
            UserError: If the model has other outputs.
        """
        if self.manifest.get('part') == 'model':
            raise UserError(f'{self.folder} holds a whole model, which needs no other; run it by '
                            'psaq_mm.runtime.Model, or export with --part features')
        subgraph = find_subgraph(model)
        subgraph.for_sizes(list(self._files))
        if list(subgraph.output_names) != self.manifest['output_names']:
            raise UserError(f'{self.folder} holds graphs of another model: outputs '
                            f'{", ".join(self.manifest["output_names"])}, expected '
                            f'{", ".join(subgraph.output_names)}')
        subgraph.install(self)
