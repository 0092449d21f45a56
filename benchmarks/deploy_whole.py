# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
r"""Whole models, from the pixels of an image to results: ours without data beside the engines'
own precisions and peers that saw data.

    python benchmarks/deploy_whole.py                             # the demo detector, one thread
    python benchmarks/deploy_whole.py --cases bccd segmentor
    python benchmarks/deploy_whole.py --cases mask-rcnn-t --threads 1 2 --scopes model \
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
import os
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
from psaq_mm.deploy.agreement import sums_in_another_order
from psaq_mm.deploy.file_info import file_info
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.hosts.detection import ExportableDetections
from psaq_mm.deploy.hosts.whole import WholeGraph
from psaq_mm.deploy.latency import pin
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


class Side(NamedTuple):
    """A graph, and how an engine computes what is not in integers."""
    file: Path
    precision: str = 'fp32'


Points = Dict[str, List[float]]
"""Side to its metrics on the test set."""

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


def peers(plain: Path, samples: List[np.ndarray], folder: Path, engines: List[str]) \
        -> Dict[str, Side]:
    """The engines' own precisions, and the peers' int8."""
    sides: Dict[str, Side] = {}
    if 'openvino' in engines:
        for side, file in openvino_peers(plain, samples, folder).items():
            sides[side] = Side(file)
        for side, bf16 in zip(tuple(sides), ('openvino bf16', 'openvino nncf + bf16')):
            sides[bf16] = Side(sides[side].file, 'bf16')
    if 'onnxruntime' in engines:
        sides['onnxruntime fp32'] = Side(plain)
        try:
            static = quantize_static(plain, samples[:32], folder)
            ENGINES['onnxruntime'](static).run(samples[0])
            sides['onnxruntime quantize_static'] = Side(static)
        except Exception as error:  # what it writes may not run
            print(f'quantize_static fails: {" ".join(str(error).split())[:200]}', flush=True)
    return sides


def ours(case: Case, args: argparse.Namespace, seed: int, folder: Path) \
        -> Tuple[Dict[str, Side], Points]:
    """Our graphs, of each scope and for each engine, and the metrics of the simulation."""
    simulated: Points = {}
    sides: Dict[str, Side] = {}
    for scope in args.scopes:
        student = quantized(case, scope, seed)
        for engine, target in (('openvino', 'openvino'), ('onnxruntime', 'onnx')):
            if engine not in args.engines:
                continue
            out = folder / f'{engine}_{scope}_{seed}'
            export_graphs(student, out, target, [case.size], part='model', config=case.model.cfg,
                          classes=case.model.dataset_meta['classes'], least_share=0.)
            side = f'{engine} ours, {scope}'
            sides[side] = Side(Graphs(out, engine).engine(case.size).path)
            print(f'{side}: exported', flush=True)
            if engine == 'openvino':
                sides[f'{side} + bf16'] = Side(sides[side].file, 'bf16')
        if case.subject is not None:
            simulated[f'torch simulation, {scope}'] = points(case.subject, student)
            for order in range(args.other_sums):
                with sums_in_another_order(student, order):
                    found = points(case.subject, student)
                print(f'torch simulation, {scope}, sums in another order: {found}', flush=True)
    return sides, simulated


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
    return [METRICS[key][1] * found[key] for key in METRICS if key in found]


def tested(case: Case, sides: Dict[str, Side]) -> Points:
    """The metrics of each graph of a trained model."""
    found: Points = {}
    if case.subject is None:
        return found
    info = file_info(find_subgraph(case.model, 'model'), case.size,
                     case.model.dataset_meta['classes'], case.model.cfg)
    for side, (file, precision) in sides.items():
        graph: Any = OneGraph(ENGINES[side.split()[0]](file, precision=precision).run, info)
        found[side] = points(case.subject, GraphModel(graph))
        print(side, found[side], flush=True)
    return found


def quantized(case: Case, scope: str, seed: int) -> nn.Module:
    """Our W8A8: of a trained model by the shipped recipe, without data; else by ranges of noise,
    which cost the same time."""
    if case.subject is not None:
        return case.subject.student(experiment('w8a8', scope), seed)[0]
    settings = psaq_mm.Recipe.shipped('w8a8').changed(dict(quantization=dict(
        scope=scope, channel_limit=None, weight=dict(rounding='nearest')))).quantization
    return psaq_mm.calibrate(psaq_mm.prepare(case.model, settings),
                             torch.from_numpy(case.samples[0]) / 64 - 2)


def timed(case: Case, sides: Dict[str, Side], threads: int, rounds: int) -> List[Dict[str, Any]]:
    """A row for float in torch and for each side, at one number of threads."""
    pin(threads)
    image = case.samples[0]
    runs: Dict[str, Run] = {
        side: ENGINES[side.split()[0]](file, threads, precision).run
        for side, (file, precision) in sides.items()}
    host: Any = find_subgraph(case.model, 'model')
    with torch.no_grad():
        seconds = interleave({
            'torch fp32': lambda: host.run(torch.from_numpy(image)),
            **{side: (lambda run=run: run(image)) for side, run in runs.items()}}, rounds)
    rows: List[Dict[str, Any]] = [
        dict(side='torch fp32', median=statistics.median(seconds['torch fp32']))]
    for side, run in runs.items():
        engine, file = side.split()[0], sides[side].file
        row: Dict[str, Any] = dict(side=side, median=statistics.median(seconds[side]),
                                   to_torch=median_ratio(seconds, side, 'torch fp32'))
        for key, other in (('to_peer', PEERS[engine]), ('to_fp32', f'{engine} fp32')):
            if other in runs:
                row[key] = median_ratio(seconds, side, other)
        if side.endswith('ours, model'):
            row['runtime_share'] = runtime_share(file, threads, image, rounds)
        if sides[side].precision == 'fp32':
            row['megabytes'] = size_of(file)
            row['size_to_fp32'] = row['megabytes'] / size_of(sides[f'{engine} fp32'].file)
            row['peak_mib'] = peak_in_process(dict(
                engine=engine, file=str(file), threads=threads, precision='fp32',
                size=case.size, channels=3))
        row['objects'] = len(run(image)[0])
        rows.append(row)
    return rows


def measure(name: str, args: argparse.Namespace, folder: Path) -> List[Dict[str, Any]]:
    """All sides of a case: tested, our own of each seed, and timed at each number of threads."""
    case = trained(TRAINED[name], args.samples, args.work_dir) if name in TRAINED else \
        untrained(*UNTRAINED[name])
    print(f'{name}: {len(case.samples)} images of {case.size} for the peers', flush=True)
    plain_onnx(case.model, case.size, folder / 'plain.onnx')
    sides = peers(folder / 'plain.onnx', case.samples, folder, args.engines)
    metrics = [tested(case, sides)]
    for seed in reversed(args.seeds if case.subject is not None else args.seeds[:1]):
        own, simulated = ours(case, args, seed, folder)
        metrics += [simulated, tested(case, own)]
    sides = {**own, **sides}  # times are of the first seed
    means = {side: [round(statistics.mean(values), 1) for values in zip(
        *(found[side] for found in metrics if side in found))]
        for found in metrics for side in found}
    rows: List[Dict[str, Any]] = [dict(side=side, threads=args.threads[0], points=means[side])
                                  for side in means if side not in sides]
    cores = os.sched_getaffinity(0)
    for threads in sorted(args.threads, reverse=True):  # threads of a pool stay on their cores
        os.sched_setaffinity(0, cores)
        for row in timed(case, sides, threads, args.rounds):
            rows.append(dict(threads=threads, **row))
            if row['side'] in means and threads == args.threads[0]:
                rows[-1]['points'] = means[row['side']]
            print(json.dumps(rows[-1]), flush=True)
    os.sched_setaffinity(0, cores)
    return [dict(case=name, **row) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', nargs='+', choices=[*TRAINED, *UNTRAINED], default=['demo'])
    parser.add_argument('--engines', nargs='+', choices=list(PEERS), default=list(PEERS))
    parser.add_argument('--scopes', nargs='+', choices=['backbone', 'model'],
                        default=['backbone', 'model'])
    parser.add_argument('--threads', type=int, nargs='+', default=[1], help='in turn')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of our images, for '
                        'trained models: metrics are means, times are of the first')
    parser.add_argument('--other-sums', type=int, default=0, help='test the simulation so many '
                        'times more, with sums in another order: what rounding alone does')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--samples', type=int, default=300, help='of the peers, if there are '
                        'as many; with random weights 1')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs' / 'accuracy')
    parser.add_argument('--measured', type=Path, default=MEASURED_WHOLE, metavar='FILE')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)
    for name in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            keep(args.measured, measure(name, args, Path(folder)), WHOLE)


if __name__ == '__main__':
    main()
