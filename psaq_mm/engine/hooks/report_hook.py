# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write down what a run did."""
import math
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List

import torch

from psaq_mm.checkpoint import save_json, size_of_quantized
from psaq_mm.evolution import Evolver
from psaq_mm.ops import named_quant_ops
from psaq_mm.registry import HOOKS
from psaq_mm.student import Reconstructor, measure_sqnr
from psaq_mm.synthesis import Synthesizer
from psaq_mm.version import __version__

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


def describe_modules(model: torch.nn.Module, sqnr: Dict[str, float]) -> List[Dict[str, Any]]:
    """One entry for each quantized module: its tensors and its SQNR.

    Returns:
        list[dict]: ``name``, ``op``, ``sqnr_db`` (None where it is infinite
        or was not measured) and ``tensors``: for each role ``bits``,
        ``symmetric``, ``granularity``, ``ranges`` (how many), and ``lower``
        and ``upper``, the outermost ends of all of them.
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
                            tensors=tensors))
    return entries


def loaded_versions() -> Dict[str, str]:
    """Versions of Python, psaq_mm and the host libraries that are in use."""
    hosts = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm')
    found = {name: str(sys.modules[name].__version__) for name in hosts if name in sys.modules}
    return dict(python=platform.python_version(), psaq_mm=__version__, **found)


@HOOKS.register_module()
class ReportHook(PSAQHook):
    """Writes ``<work-dir>/report.json``.

    Args:
        sqnr_images (int): Images that SQNR is measured on. Defaults to 4.
    """

    priority = 'LOW'

    def __init__(self, sqnr_images: int = 4) -> None:
        self.sqnr_images = sqnr_images
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
        sqnr = measure_sqnr(runner.model, runner.images[:self.sqnr_images],
                            runner.forward_student)
        # What follows region proposals gets other inputs once quantized.
        sqnr = {k: v for k, v in sqnr.items()
                if not runner.adapter.runs_on_proposals(runner.model, k)}
        size = size_of_quantized(runner.model)
        seconds = dict(runner.pipeline.seconds, report=time.perf_counter() - start)
        report = dict(
            modules=describe_modules(runner.model, sqnr),
            losses={k: [round(v, 6) for v in values] for k, values in self._losses.items()},
            seconds={k: round(v, 3) for k, v in seconds.items()},
            size=size,
            images=runner.images_used,
            seed=runner.run_seed,
            config=runner.cfg.filename,
            settings=runner.pipeline.recipe.to_dict(),
            checkpoint=runner.source,
            device=str(runner.device),
            versions=loaded_versions())
        path = Path(runner.work_dir) / 'report.json'
        save_json(report, path)
        runner.logger.info(f'report: {path}')
