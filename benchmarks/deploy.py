# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Latency of exported models in engines, beside torch and the peers' own int8.

Backbones Swin-T and Swin-S, a whole UperNet Swin-T, and backbone, neck and RPN
of a Mask R-CNN Swin-T, random weights (which cost the same time as trained
ones), one image, all sides in turn in one run:

    OMP_NUM_THREADS=1 python benchmarks/deploy.py --threads 1
    OMP_NUM_THREADS=2 python benchmarks/deploy.py --threads 2 --engines openvino
    OMP_NUM_THREADS=1 python benchmarks/deploy.py --cases 'swin-s 800x1344' --brief  # less memory

The peers are NNCF (`model_type=TRANSFORMER`) in OpenVINO, and onnxruntime's
quantize_static (QDQ) and quantize_dynamic, each from the host's model as
torch.onnx exports it; so are the engines' fp32 and bf16. Needs
`pip install '.[deploy]' nncf`.
"""
import argparse
import copy
import inspect
import io
import logging
import os
import platform
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from deploy_figures import MEASURED, PEERS, full_table, keep, name_of
from experiment import RANGES_ALONE, experiment
from peers import openvino_peers, quantize_static, size_of
from timing import interleave, median_ratio
from torch import nn

import psaq_mm
from psaq_mm.deploy.adaptive_pool import replace_adaptive_pools
from psaq_mm.deploy.export import export_graphs
from psaq_mm.deploy.exportable_ops import ATTENTION_ROLES
from psaq_mm.deploy.graphs import Graphs
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.runtime.engines import ENGINES

Side = Callable[[], Any]

CASES: Dict[str, Tuple[str, Tuple[int, int]]] = {
    'swin-t 448': ('swin-t', (448, 448)),
    'swin-t 800x1344': ('swin-t', (800, 1344)),
    'swin-s 448': ('swin-s', (448, 448)),
    'swin-s 800x1344': ('swin-s', (800, 1344)),
    'upernet swin-t 512': ('upernet', (512, 512)),
    'mask-rcnn swin-t 800x1344': ('mask-rcnn', (800, 1344)),
}


WHOLE = {'upernet': 'upernet_swin_t_w8a8.py', 'mask-rcnn': 'mask_rcnn_swin_t_w8a8.py'}
"""Configs of models with a neck and heads."""


def build(kind: str) -> nn.Module:
    """A float model with random weights."""
    torch.manual_seed(0)
    if kind in WHOLE:
        from psaq_mm.engine import build_float_model, load_config
        configs = Path(__file__).resolve().parents[1] / 'configs'
        model = build_float_model(load_config(configs / WHOLE[kind]))
        model.backbone.init_cfg = None
    else:
        from mmdet.models.backbones import SwinTransformer
        depths = (2, 2, 6, 2) if kind == 'swin-t' else (2, 2, 18, 2)
        model = SwinTransformer(depths=depths, drop_path_rate=0.)
    model.init_weights()
    model.eval()
    return model


class Plain(nn.Module):
    """What becomes a graph, by the host's own modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        replace_adaptive_pools(model)  # torch.onnx has nothing for UperNet's pooling
        self.model = model

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        if hasattr(self.model, 'decode_head'):  # called, so that its nodes bear its name
            return (self.model.decode_head(self.model.extract_feat(images)), )
        return find_subgraph(self.model).run(images)


def plain_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Export the host's model as it is."""
    dynamo = 'dynamo' in inspect.signature(torch.onnx.export).parameters
    options: Any = dict(dynamo=False) if dynamo else {}
    buffer = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(Plain(model), (images, ), buffer, opset_version=17,
                          input_names=['images'], **options)
    path.write_bytes(buffer.getvalue())


def variants(model: nn.Module, images: torch.Tensor) -> Dict[str, Tuple[nn.Module, Any]]:
    """Name to what is exported as ours, and the roles that are left float.

    W8A8 of the backbone, as in our configs; of a segmentor, its heads too.
    """

    def quantized(scope: str) -> nn.Module:
        return psaq_mm.quantize(model, experiment('w8a8', scope, RANGES_ALONE).recipe,
                                images=images)

    backbone = quantized('backbone')
    found = {'ours': (backbone, ()), 'ours, float attention': (backbone, ATTENTION_ROLES)}
    if find_subgraph(model).modules != 'backbone':
        found['ours, heads too'] = (quantized('model'), ())
    return {**found, 'ours, not quantized': (model, ())}


def timed(variant: str, brief: bool) -> bool:
    """Whether a variant of ours is run, and not only written."""
    return not brief or variant in ('ours', 'ours, heads too')


def rpn_in_torch(model: nn.Module, images: torch.Tensor, threads: int, folder: Path) -> Side:
    """The float model's graph without its RPN, and that in torch."""
    head = model.rpn_head
    features = copy.deepcopy(model)
    del features.rpn_head
    size = tuple(images.shape[2:])
    export_graphs(features, folder, 'openvino', [size])
    graphs = Graphs(folder, 'openvino', threads)

    def run() -> None:
        with torch.no_grad():
            head(graphs(images))

    return run


def side_of(engine: str, path: Path, images: np.ndarray, threads: int,
            precision: str = 'fp32') -> Side:
    """One inference of a file."""
    run = ENGINES[engine](path, threads, precision).run
    return lambda: run(images)


def openvino_sides(model: nn.Module, plain: Path, images: torch.Tensor, threads: int,
                   folder: Path, brief: bool) -> Tuple[Dict[str, Side], Dict[str, float]]:
    """Ours, the engine's own precisions, and NNCF."""
    array = images.numpy()
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randn(images.shape, generator=generator).numpy() for _ in range(2)]
    files = openvino_peers(plain, samples, folder)
    size = tuple(images.shape[2:])
    sizes = {side: size_of(file) for side, file in files.items()}
    sides = {}
    for side, bf16 in zip(files, ('openvino bf16', 'openvino nncf + bf16')):
        sides[side] = side_of('openvino', files[side], array, threads)
        sides[bf16] = side_of('openvino', files[side], array, threads, 'bf16')
    for variant, (source_model, roles) in variants(model, images).items():
        name = f'openvino {variant}'
        out = folder / name.replace(' ', '_').replace(',', '')
        export_graphs(source_model, out, 'openvino', [size], roles)
        for suffix, precision in (('', 'fp32'), (' + bf16', 'bf16')) * timed(variant, brief):
            run = Graphs(out, 'openvino', threads, precision).engine(size)
            sides[name + suffix] = lambda run=run: run.run(array)
        sizes[name] = size_of(next(out.glob('*.xml')))
    if hasattr(model, 'rpn_head') and not brief:
        sides['openvino ours, not quantized, RPN in torch'] = rpn_in_torch(
            model, images, threads, folder / 'without_rpn')
    return sides, sizes


def onnxruntime_sides(model: nn.Module, plain: Path, images: torch.Tensor, threads: int,
                      folder: Path, brief: bool) -> Tuple[Dict[str, Side], Dict[str, float]]:
    """Ours, the engine's own precision, and its two quantizers."""
    from onnxruntime.quantization import quantize_dynamic
    array = images.numpy()
    generator = torch.Generator().manual_seed(1)
    # one sample: with two, Swin-S at 800x1344 takes more than 24 GiB
    static = quantize_static(plain, [torch.randn(images.shape, generator=generator).numpy()],
                             folder)
    dynamic = folder / 'dynamic.onnx'
    quantize_dynamic(str(folder / 'prepared.onnx'), str(dynamic), per_channel=True)
    sides = {'onnxruntime fp32': side_of('onnxruntime', plain, array, threads),
             'onnxruntime quantize_static': side_of('onnxruntime', static, array, threads)}
    try:
        sides['onnxruntime quantize_dynamic'] = side_of('onnxruntime', dynamic, array, threads)
    except Exception as error:  # it may write operators that it does not have
        print(f'quantize_dynamic does not run: {str(error)[:200]}')
    sizes = {'onnxruntime fp32': size_of(plain), 'onnxruntime quantize_static': size_of(static),
             'onnxruntime quantize_dynamic': size_of(dynamic)}
    size = tuple(images.shape[2:])
    for variant, (source_model, roles) in variants(model, images).items():
        name = f'onnxruntime {variant}'
        out = folder / name.replace(' ', '_').replace(',', '')
        export_graphs(source_model, out, 'onnx', [size], roles)
        if timed(variant, brief):
            run = Graphs(out, 'onnxruntime', threads).engine(size)
            sides[name] = lambda run=run: run.run(array)
        sizes[name] = size_of(next(out.glob('*.onnx')))
    return sides, sizes


def torch_sides(model: nn.Module, images: torch.Tensor) -> Dict[str, Side]:
    """Torch in fp32, and in bf16 by autocast."""
    subgraph = find_subgraph(model)

    def run(enabled: bool) -> None:
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            subgraph.run(images)

    return {'torch fp32': lambda: run(False), 'torch bf16': lambda: run(True)}


def measure(case: str, engines: List[str], threads: int, rounds: int,
            brief: bool) -> List[Dict[str, Any]]:
    """All sides of a case, in turn; prints a table."""
    kind, size = CASES[case]
    model = build(kind)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = folder / 'plain.onnx'
        plain_onnx(model, images, plain)
        sides, sizes = torch_sides(model, images), {}
        for engine, make in (('openvino', openvino_sides), ('onnxruntime', onnxruntime_sides)):
            if engine in engines:
                more, bytes_of = make(model, plain, images, threads, folder, brief)
                sides.update(more)
                sizes.update(bytes_of)
        seconds = interleave(sides, rounds)
    rows = []
    for side in sides:
        engine = side.split()[0]
        fp32, peer = f'{engine} fp32', PEERS.get(engine)
        megabytes = sizes.get(side)
        rows.append(dict(
            case=case, side=side, threads=threads, rounds=rounds,
            median=statistics.median(seconds[side]),
            p90=float(np.quantile(seconds[side], .9)),
            to_torch=median_ratio(seconds, side, 'torch fp32'),
            to_fp32=median_ratio(seconds, side, fp32),
            to_peer=median_ratio(seconds, side, peer) if peer else None,
            megabytes=megabytes,
            # torch's exporter may write weights twice: ours does not
            size_to_fp32=megabytes / sizes[f'{engine} ours, not quantized']
            if megabytes else None))
    print(f'\n## {name_of((case, threads))}\n\n{full_table(rows)}', flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', nargs='+', choices=list(CASES), default=list(CASES))
    parser.add_argument('--engines', nargs='+', choices=['openvino', 'onnxruntime'],
                        default=['openvino', 'onnxruntime'])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--core', type=int, default=0, help='first CPU core to run on')
    parser.add_argument('--rounds', type=int, default=11)
    parser.add_argument('--brief', action='store_true', help='run of ours only what is quantized '
                        'as a whole: neither float attention nor float')
    parser.add_argument('--measured', type=Path, default=MEASURED, metavar='FILE',
                        help='where figures are kept, for deploy_figures.py')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)
    os.sched_setaffinity(0, set(range(args.core, args.core + args.threads)))
    torch.set_num_threads(args.threads)
    import onnxruntime
    import openvino
    print(f'{platform.processor() or platform.machine()}, torch {torch.__version__}, openvino '
          f'{openvino.__version__}, onnxruntime {onnxruntime.__version__}')
    for case in args.cases:
        keep(args.measured, measure(case, args.engines, args.threads, args.rounds, args.brief))


if __name__ == '__main__':
    main()
