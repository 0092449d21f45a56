# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
r"""Whole models, from the pixels of an image to results: ours without data beside the engines'
own precisions and peers that saw data.

    OMP_NUM_THREADS=1 python benchmarks/deploy_whole.py                        # the demo detector
    OMP_NUM_THREADS=1 python benchmarks/deploy_whole.py --cases bccd segmentor
    OMP_NUM_THREADS=1 python benchmarks/deploy_whole.py --cases mask-rcnn-t \
        --engines openvino      # then onnxruntime: memory. Rows of all runs add up

The peers, NNCF (`model_type=TRANSFORMER`) in OpenVINO and onnxruntime's quantize_static (QDQ, 32
images), get the same model in float: the host's own backbone, neck and heads, with our NMS and
RoIAlign around them; and real training images to calibrate on. Ours gets no image. Trained models
are evaluated by the evaluator of their config, every graph in the same way: the demo models on 480
scenes, BCCD on its test set. The others have random weights, to be timed. Rows are kept in
`measured/deploy_whole.json`, and printed by `deploy_figures.py`. Needs
`pip install '.[deploy]' nncf`.
"""
import argparse
import copy
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from deploy_figures import MEASURED_WHOLE, PEERS, WHOLE, keep
from experiment import METRICS, PHOTOGRAPHS, Subject, experiment
from peers import openvino_peers, quantize_static, size_of
from timing import interleave, median_ratio
from torch import nn

import psaq_mm
from psaq_mm.deploy import Graphs, export_graphs
from psaq_mm.deploy.adaptive_pool import replace_adaptive_pools
from psaq_mm.deploy.file_info import file_info
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.hosts.detection import ExportableDetections
from psaq_mm.deploy.hosts.whole import WholeGraph
from psaq_mm.deploy.onnx_export import save_onnx, trace
from psaq_mm.deploy.peak_memory import peak_in_process
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.engine.graph_model import GraphModel
from psaq_mm.runtime import Model
from psaq_mm.runtime.engines import ENGINES
from psaq_mm.runtime.images import pad

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[[np.ndarray], List[np.ndarray]]
Size = Tuple[int, int]

TRAINED = dict(demo='demo', cascade='cascade', bccd='bccd', segmentor='upernet')
"""Case to its name in experiment.py."""

UNTRAINED: Dict[str, Tuple[str, Size]] = {
    'mask-rcnn-t': ('mask_rcnn_swin_t_w8a8.py', (800, 1344)),
    'mask-rcnn-s': ('mask_rcnn_swin_s_w8a8.py', (800, 1344)),
    'cascade-t': ('cascade_mask_rcnn_swin_t_w8a8.py', (800, 1344)),
    'upernet-t': ('upernet_swin_t_w8a8.py', (512, 512))}
"""Case to its config, and the size of its images."""


SCENES = 480
"""That demo models are tested on: four times as many as their configs have, as graphs differ by
little."""


class Case(NamedTuple):
    """A float model, raw images of it, and what tests it."""
    model: Any
    size: Size
    samples: List[np.ndarray]
    subject: Optional[Subject]


class HostDetector(nn.Module):
    """Backbone and neck of a detector as the host has them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(self.model.neck(self.model.backbone(images)))


class HostSegmentor(HostDetector):
    """A segmentor to its logits, as the host has it."""

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (self.model.decode_head(self.model.backbone(images)), )


class OneGraph:
    """A graph in the place of :class:`Graphs`, for images of any size that it can pad."""

    def __init__(self, run: Run, info: Dict[str, Any]) -> None:
        self.run, self.info = run, info

    def whole(self, size: Size) -> Tuple['OneGraph', Dict[str, Any]]:
        return self, self.info


def plain_onnx(model: Any, size: Size, path: Path) -> None:
    """The float model, whose backbone is written as the host has it."""
    model = copy.deepcopy(model)
    subgraph: Any = find_subgraph(model, 'model')
    pixels = subgraph._pixels(size)
    graph = WholeGraph(pixels, HostSegmentor(model)) if hasattr(model, 'decode_head') else \
        WholeGraph(pixels, HostDetector(model), ExportableDetections(model))
    replace_adaptive_pools(graph)  # which ONNX lacks
    subgraph.exportable = lambda size, batch=1: graph.eval()
    save_onnx(trace(subgraph, size, 'onnx'), path, {})


def trained(name: str, samples: int, work_dir: Path) -> Case:
    """A model with trained weights, and real training images."""
    subject = Subject(name, work_dir, 0 if name in PHOTOGRAPHS else SCENES)
    model: Any = subject.model.eval()
    model.cfg = subject.config
    model.dataset_meta = dict(classes=subject.classes)
    size = subject.test_size.size
    images = [np.ascontiguousarray(image.numpy()[None].astype(np.float32))
              for image in subject.raw_images(samples, 0)]
    info = file_info(find_subgraph(model, 'model'), size, ['object'], model.cfg)
    return Case(model, size, [pad(image, info) for image in images], subject)


def untrained(config: str, size: Size) -> Case:
    """Random weights, and classes that differ enough to find objects."""
    loaded = load_config(ROOT / 'configs' / config)
    torch.manual_seed(0)
    model: Any = build_float_model(loaded)
    model.backbone.init_cfg = None
    model.init_weights()
    heads = getattr(getattr(model, 'roi_head', None), 'bbox_head', [])
    with torch.no_grad():
        for head in heads if isinstance(heads, nn.ModuleList) else [heads] if heads else []:
            head.fc_cls.weight.mul_(20)
    model.cfg = loaded
    model.dataset_meta = dict(classes=[f'class {i}' for i in range(80)])
    image = np.random.default_rng(0).integers(0, 256, (1, 3, *size)).astype(np.float32)
    return Case(model.eval(), size, [image], None)


def peers(plain: Path, samples: List[np.ndarray], threads: int, folder: Path,
          engines: List[str]) -> Tuple[Dict[str, Run], Dict[str, Path]]:
    """The engines' own precisions, and the peers' int8."""
    runs: Dict[str, Run] = {}
    files: Dict[str, Path] = {}
    if 'openvino' in engines:
        files.update(openvino_peers(plain, samples, folder))
        for side, bf16 in zip(tuple(files), ('openvino bf16', 'openvino nncf + bf16')):
            runs[side] = ENGINES['openvino'](files[side], threads).run
            runs[bf16] = ENGINES['openvino'](files[side], threads, 'bf16').run
    if 'onnxruntime' in engines:
        side = 'onnxruntime quantize_static'
        runs['onnxruntime fp32'] = ENGINES['onnxruntime'](plain, threads).run
        files['onnxruntime fp32'] = plain
        try:
            static = quantize_static(plain, samples[:32], folder)
            run = ENGINES['onnxruntime'](static, threads).run
            run(samples[0])
            runs[side], files[side] = run, static
        except Exception as error:  # what it writes may not run
            print(f'quantize_static fails: {" ".join(str(error).split())[:200]}', flush=True)
    return runs, files


def ours(case: Case, args: argparse.Namespace, folder: Path) \
        -> Tuple[Dict[str, Run], Dict[str, Path], List[Dict[str, Any]]]:
    """Our graphs, of each scope and for each engine, and rows of the simulation."""
    simulated: List[Dict[str, Any]] = []
    runs: Dict[str, Run] = {}
    files: Dict[str, Path] = {}
    for scope in args.scopes:
        student = quantized(case, scope)
        for engine, target in (('openvino', 'openvino'), ('onnxruntime', 'onnx')):
            if engine not in args.engines:
                continue
            out = folder / f'{engine}_{scope}'
            export_graphs(student, out, target, [case.size], part='model', config=case.model.cfg,
                          classes=case.model.dataset_meta['classes'], least_share=0.)
            side = f'{engine} ours, {scope}'
            loaded = Graphs(out, engine, args.threads).engine(case.size)
            runs[side], files[side] = loaded.run, loaded.path
            print(f'{side}: exported', flush=True)
            if engine == 'openvino':
                runs[f'{side} + bf16'] = Graphs(out, engine, args.threads, 'bf16') \
                    .engine(case.size).run
        if case.subject is not None:
            simulated.append(dict(side=f'torch simulation, {scope}',
                                  points=points(case.subject, student)))
            print(json.dumps(simulated[-1]), flush=True)
    return runs, files, simulated


def runtime_share(file: Path, threads: int, image: np.ndarray, rounds: int) -> float:
    """The part of a call, from an image to a picture of its results, that is not the engine's:
    preparing the image, masks of full size, drawing. The median over rounds; both times are of
    one call."""
    model, engine_seconds, shares = Model(file, threads), [0.], []
    pixels = np.ascontiguousarray(image[0].transpose(1, 2, 0).astype(np.uint8))
    run = model.engine.run

    def timed(array: np.ndarray) -> List[np.ndarray]:
        start = time.perf_counter()
        outputs = run(array)
        engine_seconds[0] = time.perf_counter() - start
        return outputs

    model.engine.run = timed  # type: ignore[method-assign]
    for _ in range(rounds + 1):
        start = time.perf_counter()
        model(pixels).draw()
        shares.append(1 - engine_seconds[0] / (time.perf_counter() - start))
    return statistics.median(shares[1:])


def points(subject: Subject, model: nn.Module) -> List[float]:
    """The metrics of a test set, in points."""
    found = subject.test(model)
    return [round(METRICS[key][1] * found[key], 1) for key in METRICS if key in found]


def quantized(case: Case, scope: str) -> nn.Module:
    """Our W8A8: of a trained model by the shipped recipe, without data; else by ranges of noise,
    which cost the same time."""
    if case.subject is not None:
        return case.subject.student(experiment('w8a8', scope), 0)[0]
    settings = psaq_mm.Recipe.shipped('w8a8').changed(dict(quantization=dict(
        scope=scope, channel_limit=None, weight=dict(rounding='nearest')))).quantization
    return psaq_mm.calibrate(psaq_mm.prepare(case.model, settings),
                             torch.from_numpy(case.samples[0]) / 64 - 2)


def measure(name: str, args: argparse.Namespace, folder: Path) -> List[Dict[str, Any]]:
    """All sides of a case."""
    case = trained(TRAINED[name], args.samples, args.work_dir) if name in TRAINED else \
        untrained(*UNTRAINED[name])
    print(f'{name}: {len(case.samples)} images of {case.size} for the peers', flush=True)
    runs, files, rows = ours(case, args, folder)
    rows = [dict(case=name, threads=args.threads, **row) for row in rows]
    plain_onnx(case.model, case.size, folder / 'plain.onnx')
    more, named = peers(folder / 'plain.onnx', case.samples, args.threads, folder, args.engines)
    runs.update(more)
    files.update(named)
    sides: Dict[str, Callable[[], Any]] = {
        side: (lambda run=run: run(case.samples[0])) for side, run in runs.items()}
    seconds = interleave(sides, args.rounds)
    info = file_info(find_subgraph(case.model, 'model'), case.size,
                     case.model.dataset_meta['classes'], case.model.cfg)
    for side, run in runs.items():
        engine = side.split()[0]
        row: Dict[str, Any] = dict(case=name, threads=args.threads, side=side,
                                   median=statistics.median(seconds[side]))
        for key, other in (('to_peer', PEERS[engine]), ('to_fp32', f'{engine} fp32')):
            if other in runs:
                row[key] = median_ratio(seconds, side, other)
        if side.endswith('ours, model'):
            row['runtime_share'] = runtime_share(files[side], args.threads, case.samples[0],
                                                 args.rounds)
        if side in files:
            row['megabytes'] = size_of(files[side])
            row['size_to_fp32'] = row['megabytes'] / size_of(files[f'{engine} fp32'])
            row['peak_mib'] = peak_in_process(dict(
                engine=engine, file=str(files[side]), threads=args.threads, precision='fp32',
                size=case.size, channels=3))
        if case.subject is not None:
            row['points'] = points(case.subject, GraphModel(OneGraph(run, info)))  # type: ignore
        row['objects'] = len(run(case.samples[0])[0])
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', nargs='+', choices=[*TRAINED, *UNTRAINED], default=['demo'])
    parser.add_argument('--engines', nargs='+', choices=list(PEERS), default=list(PEERS))
    parser.add_argument('--scopes', nargs='+', choices=['backbone', 'model'],
                        default=['backbone', 'model'])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--samples', type=int, default=300, help='of the peers, if there are '
                        'as many; with random weights 1')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    parser.add_argument('--measured', type=Path, default=MEASURED_WHOLE, metavar='FILE')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            keep(args.measured, measure(name, args, Path(folder)), WHOLE)


if __name__ == '__main__':
    main()
