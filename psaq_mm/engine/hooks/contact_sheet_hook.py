# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Show the images that were made."""
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Union

import torch
from mmengine.dist import is_main_process
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from psaq_mm.checkpoint import save_bytes
from psaq_mm.evolution import Evolver
from psaq_mm.registry import HOOKS
from psaq_mm.synthesis import Synthesizer

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


def contact_sheet(images: Tensor, lower: Tensor, upper: Tensor, rgb: bool,
                  columns: int = 4) -> bytes:
    """A PNG with all images side by side.

    Images are normalized, of shape (N, C, H, W); ``lower`` and ``upper`` of shape (1, C, 1, 1)
    are pixels 0 and 255. Their channels are RGB, else BGR.
    """
    pixels = ((images.cpu() - lower) / (upper - lower)).clamp(0, 1)
    if pixels.shape[1] == 3 and not rgb:
        pixels = pixels.flip(1)
    grid = make_grid(pixels[:, :3], nrow=columns, padding=4, pad_value=1.)
    file = io.BytesIO()
    to_pil_image((grid * 255).round().to(torch.uint8)).save(file, format='PNG')
    return file.getvalue()


@HOOKS.register_module()
class ContactSheetHook(PSAQHook):
    """Writes ``<work-dir>/synthetic.png``, the images of the prior, and
    ``evolution.png``: a row of them, and a row for each round that follows. Of images that
    were given it shows nothing.

    Args:
        columns (int): Images in a row. Defaults to 4.
    """

    def __init__(self, columns: int = 4) -> None:
        self.columns = columns
        self._rows: Dict[int, Tensor] = {}

    def state_dict(self) -> Dict[str, Any]:
        return dict(rows=dict(self._rows))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._rows = dict(state['rows'])

    def after_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        self._save(runner, runner.images, synthesizer, 'synthetic.png')

    def before_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        if not runner.pipeline.sources['own']:
            self._rows[0] = evolver.buffer.first[:self.columns].clone()  # not a view of all

    def after_evolution_step(self, runner: 'PSAQRunner', evolver: Evolver,
                             losses: Dict[str, float]) -> None:
        if 'round' in losses and self._rows and evolver.settings.sample_steps \
                and is_main_process():
            row = evolver.step_index // evolver.steps_per_round
            self._rows[row] = evolver.buffer.newest[:self.columns].clone()

    def after_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        if len(self._rows) > 1:
            rows = [row for row in self._rows.values() if len(row) == self.columns]
            self._save(runner, torch.cat(rows or list(self._rows.values())), evolver,
                       'evolution.png')

    def _save(self, runner: 'PSAQRunner', images: Tensor, source: Union[Evolver, Synthesizer],
              name: str) -> None:
        if not is_main_process():
            return
        sheet = contact_sheet(images, source.lower.cpu(), source.upper.cpu(),
                              runner.adapter.is_rgb(runner.teacher), self.columns)
        path = Path(runner.work_dir) / name
        save_bytes(sheet, path)
        runner.logger.info(f'images: {path}')
