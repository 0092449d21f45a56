# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Time a quantized checkpoint in torch and in engines, in one table.

    python tools/benchmark.py configs/mask_rcnn_swin_s_w8a8.py work_dirs/.../quantized.pth \\
        --size 800 1344 --threads 2
"""
import argparse
import copy
import os
import platform
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from mmengine.config import Config

from psaq_mm.checkpoint import ensure_writable_dir, plain, save_json
from psaq_mm.deploy import ENGINES, Graphs, export_graphs
from psaq_mm.deploy.hosts import PARTS, find_subgraph
from psaq_mm.deploy.latency import draw, interleave, pin, summarize, table
from psaq_mm.deploy.parity import lowest_sqnr
from psaq_mm.deploy.peak_memory import peak_in_process
from psaq_mm.engine import PSAQRunner, custom_hooks, init_model, load_config, read_recipe
from psaq_mm.engine.command_line import (
    choose_work_dir,
    hooks_for_test,
    keep_local,
    prepare_for_test,
    require_test_data,
    run_tool,
    tool_parser,
)
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops, unwrap
from psaq_mm.runtime.packages import require_package
from psaq_mm.synthesis import sized_for

METRICS = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'accuracy/top1', 'top1')
"""Metrics that are shown, where there are some."""


def parse_args() -> argparse.Namespace:
    parser = tool_parser(
        'Time a quantized checkpoint in torch and in engines, beside the float model. '
        'Prints a table; writes benchmark.json and benchmark.png to the work directory.',
        config='the config that the checkpoint was quantized with', checkpoint='quantized.pth')
    parser.add_argument('--float-checkpoint', help='evaluate this one too, as the float rows')
    parser.add_argument('--part', choices=PARTS, default='model', help='what is timed: all of the '
                        'model, from pixels to results, or its features (default: model)')
    parser.add_argument('--engines', nargs='+', choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'),
                        help='height and width of the image (default: that of the synthesis)')
    parser.add_argument('--threads', type=int, default=1, help='threads and cores')
    parser.add_argument('--rounds', type=int, default=15, help='measured rounds')
    parser.add_argument('--no-accuracy', action='store_true', help='do not evaluate, '
                        'even if the test data is there')
    return parser.parse_args()


def evaluate(config: Config, checkpoint: str, trust: bool, backend: str = 'torch',
             threads: int = 1, precision: str = 'fp32') -> str:
    """Metrics of a checkpoint by the config's own evaluator, in words."""
    config = copy.deepcopy(config)
    config.load_from, config.trust_checkpoint, config.device = checkpoint, trust, 'cpu'
    config.custom_hooks = hooks_for_test(config, checkpoint, backend, None, threads, precision)
    prepare_for_test(config)
    keep_local(config)
    metrics = plain(PSAQRunner.from_cfg(config).test())
    return ', '.join(f'{key} {metrics[key]:.3f}' for key in METRICS if key in metrics)


def has_test_data(config: Config) -> bool:
    """Whether the config's test data is there; says what is missing if not."""
    try:
        require_test_data(config)
    except UserError as error:
        print(f'no accuracy: {error}')
        return False
    return True


def closeness(graph: Dict[str, Any]) -> Dict[str, Any]:
    """How close a graph is to the simulation."""
    if 'agreement' in graph:
        return dict(agreement=graph['agreement']['share'])
    return dict(sqnr_db=lowest_sqnr(graph['parity']['outputs']))


def main() -> None:
    args = parse_args()
    config = load_config(args.config, args.cfg_options)
    custom_hooks(config)  # wrong ones fail early
    recipe = read_recipe(config)
    if args.rounds < 1 or min(args.size or [1]) < 1:
        raise UserError('--rounds and --size must be positive')
    for name in args.engines:
        require_package(ENGINES[name].package)
    pin(args.threads)
    model = init_model(config, args.checkpoint, trust=args.trust_checkpoint,
                       averaged=args.averaged, prefix=args.prefix)
    if next(named_quant_ops(model), None) is None:
        raise UserError(f'{args.checkpoint} is not quantized; expected what tools/quantize.py '
                        'writes')
    size = tuple(args.size or sized_for(model, recipe.synthesis).size)
    config.work_dir = choose_work_dir(args.work_dir, config)
    ensure_writable_dir(config.work_dir)
    accuracy = not args.no_accuracy and has_test_data(config)

    channels = find_subgraph(model, args.part).channels
    generator = torch.Generator().manual_seed(0)
    images = (255 * torch.rand(1, channels, *size, generator=generator)).round() \
        if args.part == 'model' else torch.randn(1, channels, *size, generator=generator)
    floating = unwrap(copy.deepcopy(model))
    job: Dict[str, Any] = dict(size=size, channels=channels, threads=args.threads)
    about = dict(job, part=args.part, config=args.config, options=args.cfg_options,
                 checkpoint=args.checkpoint, trust=args.trust_checkpoint)
    sides: Dict[str, Callable[[], Any]] = {}
    jobs: Dict[str, Dict[str, Any]] = {}
    tests: Dict[str, Dict[str, Any]] = {}
    megabytes: Dict[str, float] = {}
    close: Dict[str, Dict[str, Any]] = {}

    def add_torch(name: str, of: torch.nn.Module, precision: str, simulated: bool) -> None:
        subgraph = find_subgraph(of, args.part)

        def run() -> None:
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16,
                                                 enabled=precision == 'bf16'):
                subgraph.run(images)

        sides[name], jobs[name] = run, dict(about, precision=precision, simulated=simulated)

    add_torch('torch fp32', floating, 'fp32', False)
    if args.part == 'features':  # mmcv's NMS knows no bf16
        add_torch('torch bf16', floating, 'bf16', False)
    add_torch('torch simulated int8', model, 'fp32', True)
    tests['torch simulated int8'] = dict(checkpoint=args.checkpoint)
    if args.float_checkpoint:
        tests['torch fp32'] = dict(checkpoint=args.float_checkpoint)
    for name in args.engines:
        engine = ENGINES[name]
        for kind, source in (('float', floating), ('int8', model)):
            folder = Path(config.work_dir) / f'benchmark_{kind}_{engine.format}'
            manifest = export_graphs(source, folder, engine.format, [size], part=args.part,
                                     least_share=0.)
            for precision in engine.precisions:
                side = f'{name} {precision}' if kind == 'float' else \
                    f'{name} int8' + (' + bf16' if precision == 'bf16' else '')
                run = Graphs(folder, name, args.threads, precision).engine(size)
                sides[side] = lambda run=run: run.run(images.numpy())
                jobs[side] = dict(job, engine=name, precision=precision, file=str(run.path))
                megabytes[side] = manifest['graphs'][0]['bytes'] / 1e6
                close[side] = closeness(manifest['graphs'][0])
                if kind == 'int8':
                    tests[side] = dict(checkpoint=args.checkpoint, backend=name,
                                       threads=args.threads, precision=precision)
    print(f'timing {len(sides)} sides ...', flush=True)
    rows = summarize(interleave(sides, args.rounds), 'torch fp32')
    for row in rows:
        side = row['side']
        row.update(megabytes=megabytes.get(side), **close.get(side, {}),
                   peak_mib=peak_in_process(jobs[side]))
        if accuracy and side in tests:
            row['metric'] = evaluate(config, trust=args.trust_checkpoint, **tests[side])
    write(args, config, size, rows)


def write(args: argparse.Namespace, config: Config, size: Any, rows: List[Dict[str, Any]]) -> None:
    """Print the table, and save it and its picture."""
    versions = ', '.join([f'torch {torch.__version__}',
                          *(f'{name} {ENGINES[name].version()}' for name in args.engines)])
    title = f'{Path(args.config).stem}, {size[0]} x {size[1]}, {args.threads} thread(s)'
    folder = Path(config.work_dir)
    save_json(dict(config=args.config, checkpoint=args.checkpoint, size=list(size),
                   threads=args.threads, rounds=args.rounds, versions=versions,
                   machine=platform.machine(), cores=os.cpu_count(), rows=rows),
              folder / 'benchmark.json')
    draw(rows, title, folder / 'benchmark.png')
    print(f'\n{title}; {versions}\n\n{table(rows)}\n\nwritten: {folder / "benchmark.json"}, '
          f'{folder / "benchmark.png"}')


if __name__ == '__main__':
    run_tool(main)
