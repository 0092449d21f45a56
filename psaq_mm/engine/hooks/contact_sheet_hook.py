# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Show the images that were made."""
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Union

import numpy as np
import torch
from mmengine.dist import is_main_process
from PIL import Image
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


SHOWN_PARTS = (0, 1 / 8, 1 / 4, 1 / 2, 1)
"""When the images in the making are looked at: parts of the steps that they take."""


def pixels_of(images: Tensor, lower: Tensor, upper: Tensor, rgb: bool) -> Tensor:
    """Normalized images of shape (N, C, H, W) as uint8 RGB of shape (N, 3, H, W).

    ``lower`` and ``upper`` of shape (1, C, 1, 1) are pixels 0 and 255. The channels of the
    images are RGB, else BGR.
    """
    lower, upper = lower.cpu(), upper.cpu()
    pixels = ((images.detach().cpu() - lower) / (upper - lower)).clamp(0, 1)
    if pixels.shape[1] == 3 and not rgb:
        pixels = pixels.flip(1)
    return (pixels[:, :3] * 255).round().to(torch.uint8)


def contact_sheet(pixels: Tensor, columns: int = 4) -> Image.Image:
    """All images of :func:`pixels_of` side by side."""
    return to_pil_image(make_grid(pixels, nrow=columns, padding=4, pad_value=255))


@HOOKS.register_module()
class ContactSheetHook(PSAQHook):
    """Writes ``<work-dir>/synthetic.png``, the images of the prior, and
    ``evolution.png``: a row of them, and a row for each round that follows. Of images that
    were given it shows nothing.

    While they are made, the visualizer gets the images of the first batch now and then, and
    those of each batch and of each round at its end. The report has them too.

    Args:
        columns (int): Images in a row. Defaults to 4.
    """

    def __init__(self, columns: int = 4) -> None:
        self.columns = columns
        self._steps: Dict[int, Tensor] = {}  # pixels of the first batch
        self._rows: Dict[int, Tensor] = {}

    def state_dict(self) -> Dict[str, Any]:
        return dict(rows=dict(self._rows), steps=dict(self._steps))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self._rows, self._steps = dict(state['rows']), dict(state.get('steps', {}))

    def after_synthesis_step(self, runner: 'PSAQRunner', synthesizer: Synthesizer,
                             losses: Dict[str, float]) -> None:
        if not is_main_process():
            return
        settings, step = synthesizer.settings, synthesizer.step_index
        each = settings.steps * len(settings.shifts)
        if step % each and step not in {max(1, int(part * each)) for part in SHOWN_PARTS}:
            return
        current = synthesizer.current
        images = synthesizer.finished[-1] if current is None else current
        pixels = self._pixels(runner, images[:self.columns], synthesizer)
        if step <= each:
            self._steps[step] = pixels
        self._tell(runner, 'synthesis', pixels, step)

    def after_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        pixels = self._pixels(runner, runner.images, synthesizer)
        self._save(runner, pixels, 'synthetic.png', 'The images that the student was made on.')
        if len(self._steps) > 1:
            steps = ', '.join(map(str, self._steps))
            runner.pictures.append((contact_sheet(torch.cat([*self._steps.values()]),
                                                  self.columns),
                                    'How the first of them came about: a row after each of the '
                                    f'steps {steps}.'))

    def before_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        if not runner.pipeline.sources['own']:
            self._rows[0] = evolver.buffer.first[:self.columns].clone()  # not a view of all

    def after_evolution_step(self, runner: 'PSAQRunner', evolver: Evolver,
                             losses: Dict[str, float]) -> None:
        if 'round' in losses and self._rows and evolver.settings.sample_steps \
                and is_main_process():
            row = evolver.step_index // evolver.steps_per_round
            self._rows[row] = evolver.buffer.newest[:self.columns].clone()
            self._tell(runner, 'evolution', self._pixels(runner, self._rows[row], evolver),
                       evolver.step_index)

    def after_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        if len(self._rows) > 1:
            rows = [row for row in self._rows.values() if len(row) == self.columns]
            pixels = self._pixels(runner, torch.cat(rows or list(self._rows.values())), evolver)
            self._save(runner, pixels, 'evolution.png', 'How they evolved: the first row is of '
                       'the prior alone, each that follows of a round against the student.')

    def _pixels(self, runner: 'PSAQRunner', images: Tensor,
                source: Union[Evolver, Synthesizer]) -> Tensor:
        return pixels_of(images, source.lower, source.upper,
                         runner.adapter.is_rgb(runner.teacher))

    def _tell(self, runner: 'PSAQRunner', name: str, pixels: Tensor, step: int) -> None:
        """Hand images to the backends of the visualizer."""
        runner.visualizer.add_image(name, np.asarray(contact_sheet(pixels, self.columns)), step)

    def _save(self, runner: 'PSAQRunner', pixels: Tensor, name: str, words: str) -> None:
        if not is_main_process():
            return
        sheet, file = contact_sheet(pixels, self.columns), io.BytesIO()
        sheet.save(file, format='PNG')
        path = Path(runner.work_dir) / name
        save_bytes(file.getvalue(), path)
        runner.pictures.append((sheet, words))
        runner.logger.info(f'images: {path}')
