# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The demo: quantize the embedded detector without data, and compare.

Renders the validation scenes, quantizes to 8 bits, evaluates the float and
the quantized detector, and prints one table.

    python demo/run.py
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict

from scenes import write_split

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / 'tools'


def call(tool: str, *arguments: str) -> float:
    """Run one of the tools, its output shown.

    Returns:
        float: Wall seconds.
    """
    start = time.perf_counter()
    subprocess.run([sys.executable, str(TOOLS / tool), *arguments], check=True)
    return time.perf_counter() - start


def evaluate(config: Path, checkpoint: Path, work_dir: Path) -> Dict[str, float]:
    """AP of a checkpoint by tools/test.py, with its wall seconds."""
    file = work_dir / f'{checkpoint.stem}_metrics.json'
    seconds = call('test.py', str(config), str(checkpoint), '--work-dir', str(work_dir),
                   '--metrics', str(file), '--cfg-options', 'log_level=WARNING')
    return dict(json.loads(file.read_text())['metrics'], seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--config', type=Path, default=HERE / 'mask_rcnn_swin_demo_w8a8.py')
    parser.add_argument('--checkpoint', type=Path, default=HERE / 'mask_rcnn_swin_demo.pth')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    args = parser.parse_args()
    print('rendering the validation scenes ...', flush=True)
    write_split('val', HERE / 'data')
    quantized = args.work_dir / 'quantized.pth'
    print('quantizing, without any of them ...', flush=True)
    seconds = call('quantize.py', str(args.config), str(args.checkpoint), '--work-dir',
                   str(args.work_dir), '--cfg-options', 'log_level=WARNING')
    rows = {}
    for name, checkpoint in (('float', args.checkpoint), ('quantized', quantized)):
        print(f'evaluating the {name} detector ...', flush=True)
        rows[name] = (evaluate(args.config, checkpoint, args.work_dir), checkpoint)

    size = json.loads((args.work_dir / 'report.json').read_text())['size']
    print(f'\n{"":10} {"box AP":>7} {"mask AP":>8} {"weights MB":>11} {"file MB":>8} '
          f'{"test s":>7}')
    for name, (metrics, checkpoint) in rows.items():
        weights = size['float_bytes' if name == 'float' else 'stored_bytes'] / 1e6
        print(f'{name:10} {100 * metrics["coco/bbox_mAP"]:7.1f} '
              f'{100 * metrics["coco/segm_mAP"]:8.1f} {weights:11.2f} '
              f'{checkpoint.stat().st_size / 1e6:8.2f} {metrics["seconds"]:7.0f}')
    print(f'\nquantized in {seconds:.0f} s from the checkpoint alone')
    print('weights MB: those of the quantized modules, with their scales')
    print('quantization is simulated in float here; tools/export.py brings it to int8 engines')
    print(f'images that it made: {args.work_dir / "synthetic.png"}')
    print(f'what it did:         {args.work_dir / "report.html"}')


if __name__ == '__main__':
    main()
