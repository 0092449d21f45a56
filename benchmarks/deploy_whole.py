# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whole detectors, from the pixels of an image to boxes and masks: ours without data beside the
engines' own precisions and peers that saw data.

    OMP_NUM_THREADS=1 python benchmarks/deploy_whole.py                      # the demo detector
    OMP_NUM_THREADS=1 python benchmarks/deploy_whole.py --case mask-rcnn     # Swin-T, 800x1344

The peers, NNCF (`model_type=TRANSFORMER`) in OpenVINO and onnxruntime's quantize_static (QDQ),
get the same detector in float: the host's own backbone, neck and heads, and our NMS and RoIAlign
around them; and real scenes of the demo's training set to calibrate on. Ours gets no image. AP is
that of the demo detector on 120 scenes; the other case has random weights, to be timed. Needs
`pip install '.[deploy]' nncf`.
"""
import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
import torch
from timing import interleave
from torch import nn

import psaq_mm
from psaq_mm.checkpoint import save_json
from psaq_mm.deploy import Graphs, export_graphs
from psaq_mm.deploy.file_info import file_info
from psaq_mm.deploy.hosts import find_subgraph
from psaq_mm.deploy.hosts.detection import ExportableDetections
from psaq_mm.deploy.hosts.whole import WholeGraph
from psaq_mm.deploy.onnx_export import save_onnx, trace
from psaq_mm.engine import build_float_model, init_model, load_config
from psaq_mm.runtime.images import prepare
from psaq_mm.runtime.model import interpret

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / 'demo'
Run = Callable[[np.ndarray], List[np.ndarray]]


class HostTrunk(nn.Module):
    """The host's own backbone and neck."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return tuple(self.model.neck(self.model.backbone(images)))


def plain_onnx(model: nn.Module, size: Tuple[int, int], path: Path) -> None:
    """The float detector, whose backbone is written as the host has it."""
    subgraph: Any = find_subgraph(model, 'model')
    subgraph.exportable = lambda size, batch=1: WholeGraph(
        subgraph._pixels(size), HostTrunk(model), ExportableDetections(model)).eval()
    save_onnx(trace(subgraph, size, 'onnx'), path, {})


def demo() -> Tuple[nn.Module, Tuple[int, int]]:
    """The trained demo detector."""
    return init_model(str(DEMO / 'mask_rcnn_swin_demo_w8a8.py'),
                      str(DEMO / 'mask_rcnn_swin_demo.pth')), (224, 224)


def mask_rcnn() -> Tuple[nn.Module, Tuple[int, int]]:
    """A Mask R-CNN Swin-T with random weights, whose classes differ enough to find objects."""
    config = load_config(ROOT / 'configs' / 'mask_rcnn_swin_t_w8a8.py')
    torch.manual_seed(0)
    model: Any = build_float_model(config)
    model.backbone.init_cfg = None
    model.init_weights()
    with torch.no_grad():
        model.roi_head.bbox_head.fc_cls.weight.mul_(20)
    model.cfg = config
    model.dataset_meta = dict(classes=[f'class {i}' for i in range(80)])
    return model.eval(), (800, 1344)


CASES = {'demo': demo, 'mask-rcnn': mask_rcnn}


def scenes() -> Any:
    import sys
    sys.path.insert(0, str(DEMO))
    import scenes as module
    return module


def ap(run: Run, info: Dict[str, Any], folder: Path) -> Dict[str, float]:
    """Box and mask AP on the demo's validation scenes, by pycocotools."""
    import cv2
    from pycocotools import mask as coding
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = COCO(str(folder / 'val.json'))
    rows = []
    for image in truth.loadImgs(truth.getImgIds()):
        pixels = cv2.imread(str(folder / 'val' / image['file_name']))
        prepared = prepare(pixels, info)
        found = interpret(run(prepared.array), prepared, info, pixels)
        for box, score, label, mask in zip(found.boxes, found.scores, found.labels, found.masks):
            rows.append(dict(
                image_id=image['id'], category_id=truth.getCatIds()[label], score=float(score),
                bbox=[*map(float, box[:2]), *map(float, box[2:] - box[:2])],
                segmentation=coding.encode(np.asfortranarray(mask.astype(np.uint8)))))
    found = {}
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(truth, truth.loadRes(rows), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        found[kind] = round(100 * float(evaluation.stats[0]), 1)
    return found


def openvino_run(graph: Any, threads: int, precision: str) -> Run:
    import openvino
    request = openvino.Core().compile_model(graph, 'CPU', {
        'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': precision,
        'PERFORMANCE_HINT': 'LATENCY', 'NUM_STREAMS': 1}).create_infer_request()

    def run(array: np.ndarray) -> List[np.ndarray]:
        request.infer({0: array})
        return [request.get_output_tensor(i).data.copy() for i in range(3)]

    return run


def onnxruntime_run(path: Path, threads: int) -> Run:
    from psaq_mm.runtime.engines import ENGINES
    return ENGINES['onnxruntime'](path, threads).run


def peers(plain: Path, samples: List[np.ndarray], threads: int, folder: Path,
          engines: List[str]) -> Tuple[Dict[str, Run], Dict[str, Path]]:
    """The engines' own precisions, and the peers' int8."""
    runs: Dict[str, Run] = {}
    files: Dict[str, Path] = {}
    if 'openvino' in engines:
        import nncf
        import openvino
        source = openvino.Core().read_model(str(plain))
        openvino.save_model(source, str(folder / 'plain.xml'), compress_to_fp16=False)
        runs['openvino fp32'] = openvino_run(source, threads, 'f32')
        runs['openvino bf16'] = openvino_run(source, threads, 'bf16')
        files['openvino fp32'] = folder / 'plain.xml'
        start = time.time()
        peer = nncf.quantize(source, nncf.Dataset(samples), subset_size=len(samples),
                             model_type=nncf.ModelType.TRANSFORMER)
        print(f'nncf: {time.time() - start:.0f} s on {len(samples)} images', flush=True)
        openvino.save_model(peer, str(folder / 'nncf.xml'), compress_to_fp16=False)
        runs['openvino nncf'] = openvino_run(peer, threads, 'f32')
        runs['openvino nncf + bf16'] = openvino_run(peer, threads, 'bf16')
        files['openvino nncf'] = folder / 'nncf.xml'
    if 'onnxruntime' in engines:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Samples(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = list(samples[:32])

            def get_next(self) -> Any:
                return {'image': self.left.pop()} if self.left else None

        runs['onnxruntime fp32'] = onnxruntime_run(plain, threads)
        files['onnxruntime fp32'] = plain
        try:
            quant_pre_process(str(plain), str(folder / 'prepared.onnx'), skip_symbolic_shape=True)
            quantize_static(str(folder / 'prepared.onnx'), str(folder / 'static.onnx'), Samples(),
                            quant_format=QuantFormat.QDQ, per_channel=True)
            runs['onnxruntime quantize_static'] = onnxruntime_run(folder / 'static.onnx', threads)
            runs['onnxruntime quantize_static'](samples[0])
            files['onnxruntime quantize_static'] = folder / 'static.onnx'
        except Exception as error:  # what it writes may not run
            runs.pop('onnxruntime quantize_static', None)
            print(f'quantize_static fails: {" ".join(str(error).split())[:200]}', flush=True)
    return runs, files


def size_of(path: Path) -> float:
    weights = path.with_suffix('.bin')
    return (path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)) / 1e6


def measure(args: argparse.Namespace, folder: Path) -> List[Dict[str, Any]]:
    """All sides of a case."""
    model, size = CASES[args.case]()
    runs: Dict[str, Run] = {}
    files: Dict[str, Path] = {}
    plain = folder / 'plain.onnx'
    plain_onnx(model, size, plain)
    info = file_info(find_subgraph(model, 'model'), size, model.dataset_meta['classes'],
                     model.cfg)
    if args.case == 'demo':
        scenes().write_split('val', folder, args.images)
        samples = [scenes().render(i)[0].transpose(2, 0, 1)[None].astype(np.float32)
                   for i in range(args.samples)]
    else:
        draw = np.random.default_rng(0)
        samples = [draw.integers(0, 256, (1, 3, *size)).astype(np.float32)
                   for _ in range(args.samples)]
    recipe = psaq_mm.Recipe.shipped('w8a8')
    for scope in args.scopes:
        student = quantized(model, recipe, scope, samples, args) if args.checkpoint is None else \
            init_model(str(DEMO / 'mask_rcnn_swin_demo_w8a8.py'), args.checkpoint)
        for engine, target in (('openvino', 'openvino'), ('onnxruntime', 'onnx')):
            if engine not in args.engines:
                continue
            out = folder / f'{engine}_{scope}'
            export_graphs(student, out, target, [size], part='model', config=model.cfg,
                          classes=model.dataset_meta['classes'], least_share=0.)
            name = f'{engine} ours, {scope}'
            loaded = Graphs(out, engine, args.threads).engine(size)
            runs[name], files[name] = loaded.run, loaded.path
            print(f'{name}: exported', flush=True)
            if engine == 'openvino':
                runs[f'{name} + bf16'] = Graphs(out, engine, args.threads, 'bf16').engine(size).run
        if args.case == 'demo' and args.simulation:
            runs[f'torch simulated, {scope}'] = torch_run(student)
    more, named = peers(plain, samples, args.threads, folder, args.engines)
    runs.update(more)
    files.update(named)
    if args.simulation:
        runs['torch fp32'] = torch_run(model)
    seconds = interleave({name: (lambda run=run: run(samples[0])) for name, run in runs.items()},
                         args.rounds)
    rows = []
    for name, run in runs.items():
        row: Dict[str, Any] = dict(side=name, median_ms=1e3 * statistics.median(seconds[name]))
        for other in ('openvino nncf', 'openvino fp32', 'onnxruntime fp32',
                      'onnxruntime quantize_static'):
            if other in runs and name.split()[0] == other.split()[0]:
                row[f'speed_to_{other}'] = statistics.median(
                    b / a for a, b in zip(seconds[name], seconds[other]))
        if name in files:
            row['megabytes'] = size_of(files[name])
        if args.case == 'demo' and 'bf16' not in name:
            row.update(ap(run, info, folder))
        row['objects'] = len(run(samples[0])[0])
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def torch_run(model: nn.Module) -> Run:
    """The host's own code. It gives masks of the image, and boxes of it as they are here."""
    subgraph: Any = find_subgraph(model, 'model')
    exportable = subgraph.exportable(None)

    def run(array: np.ndarray) -> List[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in exportable(torch.from_numpy(array))]

    return run


def quantized(model: nn.Module, recipe: Any, scope: str, samples: List[np.ndarray],
              args: argparse.Namespace) -> nn.Module:
    """Our W8A8: of the demo by the shipped recipe, without data; else by ranges of noise, which
    cost the same time."""
    settings = recipe.to_dict()
    settings['quantization']['scope'] = scope
    if args.fast:
        settings['synthesis'].update(num_images=4, steps=20)
    recipe = psaq_mm.Recipe.from_dict(settings)
    if args.case == 'demo':
        return psaq_mm.quantize(model, recipe, seed=0)
    settings['quantization']['weight']['rounding'] = 'nearest'
    recipe = psaq_mm.Recipe.from_dict(settings)
    images = torch.cat([torch.from_numpy(s) for s in samples[:1]]) / 64 - 2
    return psaq_mm.calibrate(psaq_mm.prepare(model, recipe.quantization), images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--case', choices=list(CASES), default='demo')
    parser.add_argument('--engines', nargs='+', choices=['openvino', 'onnxruntime'],
                        default=['openvino', 'onnxruntime'])
    parser.add_argument('--scopes', nargs='+', choices=['backbone', 'model'],
                        default=['backbone', 'model'])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--images', type=int, default=120, help='scenes that are evaluated')
    parser.add_argument('--samples', type=int, default=300, help='of the peers')
    parser.add_argument('--fast', action='store_true', help='ours by 4 images of few steps, to '
                        'compare engines and not to be accurate')
    parser.add_argument('--checkpoint', help='ours of the demo, instead of quantizing now; its '
                        'scope is what --scopes names')
    parser.add_argument('--simulation', action='store_true', help='torch too')
    parser.add_argument('--out', type=Path,
                        help='default: benchmarks/measured/deploy_whole_CASE.json')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    out = args.out or ROOT / 'benchmarks' / 'measured' / f'deploy_whole_{args.case}.json'
    os.makedirs(out.parent, exist_ok=True)
    save_json(rows, out)


if __name__ == '__main__':
    main()
