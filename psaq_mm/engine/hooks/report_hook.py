# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write down what a run did."""
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

import torch
from torch import Tensor

from psaq_mm.adapters import TapRecord
from psaq_mm.checkpoint import save_bytes, save_json, size_of_quantized
from psaq_mm.evolution import Evolver
from psaq_mm.ops import named_quant_ops
from psaq_mm.peak_memory import forget_peak, peak_bytes
from psaq_mm.registry import HOOKS
from psaq_mm.report.page import Picture, report_page
from psaq_mm.student import Reconstructor, measure_each_alone, measure_sqnr, scope_of
from psaq_mm.synthesis import Synthesizer
from psaq_mm.version import __version__

from ..dataset_meta import read_dataset_meta
from ..inference import Predictor, compare_predictions, input_pipeline, read_rgb, summary
from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


def describe_modules(model: torch.nn.Module, sqnr: Dict[str, float],
                     sensitivity: Dict[str, float]) -> List[Dict[str, Any]]:
    """One entry for each quantized module: its tensors, its SQNR and its sensitivity.

    Returns:
        list[dict]: ``name``, ``op``, ``sqnr_db`` (None where it is infinite
        or was not measured), ``sensitivity`` (None where it was not measured)
        and ``tensors``: for each role ``bits``, ``symmetric``,
        ``granularity``, ``ranges`` (how many), and ``lower`` and ``upper``,
        the outermost ends of all of them.
    """
    entries = []
    for name, op in named_quant_ops(model):
        tensors = {}
        for role, quantizer in op.quantizers.items():
            lower, upper = quantizer.range()
            tensors[role] = dict(bits=quantizer.spec.bits, symmetric=quantizer.spec.symmetric,
                                 granularity=quantizer.spec.granularity,
                                 ranges=lower.numel(), lower=float(lower.min()),
                                 upper=float(upper.max()))
        value = sqnr.get(name, math.nan)
        entries.append(dict(name=name, op=type(op).__name__,
                            sqnr_db=round(value, 2) if math.isfinite(value) else None,
                            sensitivity=float(f'{sensitivity[name]:.4g}')
                            if name in sensitivity else None,
                            tensors=tensors))
    return entries


def describe_allocation(runner: 'PSAQRunner') -> Dict[str, Any]:
    """``allocation`` if bits were chosen for a budget: the ``budget``, mean bits of ``weights``
    and ``activations`` that could have others, the error of the outputs, ``predicted`` and
    ``measured`` as a fraction of their power, and ``groups`` as of :meth:`Allocation.describe`."""
    found = runner.pipeline.allocation
    if found is None:
        return {}
    return dict(allocation=dict(
        budget=runner.pipeline.recipe.quantization.budget, predicted=found.predicted,
        measured=runner.pipeline.measured, weights=round(found.mean_bits(True), 4),
        activations=round(found.mean_bits(False), 4), groups=found.describe()))


def loaded_versions() -> Dict[str, str]:
    """Versions of Python, psaq_mm and the host libraries that are in use."""
    hosts = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm')
    found = {name: str(sys.modules[name].__version__) for name in hosts if name in sys.modules}
    return dict(python=platform.python_version(), psaq_mm=__version__, **found)


@HOOKS.register_module()
class ReportHook(PSAQHook):
    """Writes ``<work-dir>/report.json``, and ``report.html`` with pictures of what it says.

    Args:
        sqnr_images (int): Images that SQNR is measured on. Defaults to 4.
        sensitivity_images (int): Images that the sensitivity of each module is measured on: as
            many forward passes as there are modules for each; 0 for none. Defaults to 1.
    """

    priority = 'LOW'

    def __init__(self, sqnr_images: int = 4, sensitivity_images: int = 1) -> None:
        self.sqnr_images = sqnr_images
        self.sensitivity_images = sensitivity_images
        self._losses: Dict[str, List[float]] = {}

    def after_synthesis(self, runner: 'PSAQRunner', synthesizer: Synthesizer) -> None:
        self._losses = synthesizer.losses

    def after_evolution(self, runner: 'PSAQRunner', evolver: Evolver) -> None:
        self._losses = {**self._losses, **evolver.losses}

    def after_reconstruction(self, runner: 'PSAQRunner', reconstructor: Reconstructor) -> None:
        self._losses = {**self._losses, **{f'reconstruction/{name}': values
                                           for name, values in reconstructor.losses.items()}}

    def after_quantize(self, runner: 'PSAQRunner') -> None:
        start = time.perf_counter()
        forget_peak()
        sqnr = measure_sqnr(runner.model, runner.images[:self.sqnr_images],
                            runner.forward_student, runner.teacher)
        # What follows region proposals gets other inputs once quantized.
        sqnr = {k: v for k, v in sqnr.items()
                if not runner.adapter.runs_on_proposals(runner.model, k)}
        sensitivity = self._sensitivity(runner)
        folder, size = Path(runner.work_dir), size_of_quantized(runner.model)
        seconds = dict(runner.pipeline.seconds, report=time.perf_counter() - start)
        files = dict(float=runner.source['file'], quantized=folder / 'quantized.pth')
        report = dict(
            modules=describe_modules(runner.model, sqnr, sensitivity),
            losses={k: [round(v, 6) for v in values] for k, values in self._losses.items()},
            seconds={k: round(v, 3) for k, v in seconds.items()},
            memory=dict(runner.pipeline.memory, report=peak_bytes()),
            size=size,
            file_bytes={kind: os.path.getsize(path) for kind, path in files.items()
                        if os.path.isfile(path)},
            images=runner.images_used,
            images_of_sensitivity=min(self.sensitivity_images, len(runner.images)),
            **describe_allocation(runner),
            seed=runner.run_seed,
            config=runner.cfg.filename,
            command=runner.command,
            settings=runner.pipeline.recipe.to_dict(),
            checkpoint=runner.source,
            device=str(runner.device),
            versions=loaded_versions())
        save_json(report, folder / 'report.json')
        page = report_page(report, runner.pictures, self._shown(runner), runner.bits_picture)
        save_bytes(page.encode('utf-8'), folder / 'report.html')
        runner.logger.info(f'report: {folder / "report.html"}, and report.json')

    def _sensitivity(self, runner: 'PSAQRunner') -> Dict[str, float]:
        """Relative error of the taps when each module alone is quantized."""
        if not self.sensitivity_images:
            return {}
        adapter, student, images = runner.adapter, runner.model, runner.images
        groups = adapter.tap_groups(student) \
            if scope_of(student, adapter) == 'model' else ('backbone', )
        if adapter.fixed_size(student) is None:  # photographs may be large
            height, width = runner.pipeline.recipe.synthesis.size
            images = images[..., :height, :width]

        def forward(model: torch.nn.Module, image: Tensor,
                    regions: Optional[List[Tensor]]) -> TapRecord:
            return adapter.forward_taps(model, image.to(runner.device), groups, regions)

        return measure_each_alone(student, runner.teacher, images[:self.sensitivity_images],
                                  {name: [name] for name, _ in named_quant_ops(student)},
                                  forward)

    def _shown(self, runner: 'PSAQRunner') -> List[Picture]:
        """Predictions on the images that were given for it."""
        if not runner.shown_images:
            return []
        models = {}
        for title, model in (('float', runner.teacher), ('quantized', runner.model)):
            meta = read_dataset_meta(runner.cfg, runner.source_meta, model)
            models[title] = Predictor(model, meta, runner.cfg)
        prepare, pictures = input_pipeline(runner.cfg), []
        for number, path in enumerate(runner.shown_images, 1):
            picture, found = compare_predictions(models, prepare(path), read_rgb(path))
            words = '; '.join(f'{title} {summary(entry)}' for title, entry in found.items())
            pictures.append((picture, f'Image {number}: {words}.'))
        return pictures
