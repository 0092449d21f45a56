# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Box and mask AP, float beside data-free, by the two commands of the README.

    python benchmarks/accuracy.py                 # the demo detector
    python benchmarks/accuracy.py --model bccd    # real photographs, if present

Every row comes from tools/quantize.py (a seed each) and tools/test.py, run
here. The float row is evaluated in the same run, on the same images.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

ROOT = Path(__file__).resolve().parents[1]
BCCD = ROOT.parent / 'shared' / 'real' / 'bccd'
MODELS = dict(
    demo=(ROOT / 'demo' / 'mask_rcnn_swin_demo.py', ROOT / 'demo' / 'mask_rcnn_swin_demo.pth'),
    bccd=(BCCD / 'mask_rcnn_swin_bccd.py', BCCD / 'mask_rcnn_swin_bccd.pth'))


def call(log: Path, tool: str, *arguments: str) -> None:
    """Run one of the tools with its output in a log."""
    with log.open('a') as file:
        subprocess.run([sys.executable, str(ROOT / 'tools' / tool), *arguments], check=True,
                       stdout=file, stderr=subprocess.STDOUT)


def evaluate(config: Path, checkpoint: Path, work_dir: Path) -> Dict[str, float]:
    """Metrics of a checkpoint, in points."""
    file = work_dir / f'{checkpoint.parent.name}_{checkpoint.stem}.json'
    call(work_dir / 'log.txt', 'test.py', str(config), str(checkpoint), '--work-dir',
         str(work_dir), '--metrics', str(file))
    metrics = json.loads(file.read_text())['metrics']
    return {k: 100 * metrics[f'coco/{k}_mAP'] for k in ('bbox', 'segm')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', choices=sorted(MODELS), default='demo')
    parser.add_argument('--bases', nargs='+', default=['w8a8'],
                        help='names in configs/_base_, e.g. w8a8 w4a8')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, default=None)
    parser.add_argument('--cfg-options', nargs='+', default=[])
    args = parser.parse_args()
    base_config, checkpoint = MODELS[args.model]
    if not checkpoint.exists():
        sys.exit(f'{checkpoint} is not here: nothing to measure')
    if args.model == 'demo':
        sys.path.insert(0, str(ROOT / 'demo'))
        from scenes import write_split
        write_split('val', ROOT / 'demo' / 'data')
    work_dir = (args.work_dir or ROOT / 'work_dirs' / f'accuracy_{args.model}').resolve()
    work_dir.mkdir(parents=True, exist_ok=True)

    reference = evaluate(base_config, checkpoint, work_dir)
    print(f'{args.model}, seeds {args.seeds}; AP in points: mean (each seed)\n')
    print('| | box AP | mask AP | seconds to quantize |\n|---|---|---|---|')
    print(f'| float | {reference["bbox"]:.1f} | {reference["segm"]:.1f} | |', flush=True)
    for base in args.bases:
        config = work_dir / f'{args.model}_{base}.py'
        config.write_text(f"_base_ = ['{base_config}', 'psaq_mm::_base_/{base}.py']\n")
        metrics: List[Dict[str, float]] = []
        seconds = []
        for seed in args.seeds:
            run = work_dir / f'{base}_seed{seed}'
            options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
            call(work_dir / 'log.txt', 'quantize.py', str(config), str(checkpoint),
                 '--work-dir', str(run), '--seed', str(seed), *options)
            metrics.append(evaluate(config, run / 'quantized.pth', work_dir))
            report = json.loads((run / 'report.json').read_text())
            seconds.append(sum(report['seconds'].values()))
        cells = []
        for key in ('bbox', 'segm'):
            values = [m[key] for m in metrics]
            cells.append(f'{statistics.mean(values):.2f} '
                         f'({", ".join(f"{v:.1f}" for v in values)})')
        print(f'| data-free {base.upper()} | {" | ".join(cells)} '
              f'| {statistics.mean(seconds):.0f} |', flush=True)


if __name__ == '__main__':
    main()
