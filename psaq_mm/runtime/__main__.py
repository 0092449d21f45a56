# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Find what is in images by an exported model, without torch.

    python -m psaq_mm.runtime model.xml photos/
    psaq_mm infer model.xml photos/
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Optional, Sequence

import cv2

from psaq_mm.errors import UserError

from .engines import add_engine_options
from .images import find_files, picture_paths
from .model import Model


def parse_args(arguments: Optional[Sequence[str]], program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program, description='Find what is in images by an exported model: a picture for '
        'each, and predictions.json.')
    parser.add_argument('file', help='.xml or .onnx file of a whole model, by tools/export.py')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files, and folders of '
                        'them, which are searched with their subfolders')
    parser.add_argument('--out-dir', metavar='DIR', default='infer',
                        help='where to write (default: infer)')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='least score of a detection (default: 0.3)')
    add_engine_options(parser)
    parser.add_argument('--shrink', action='store_true', help='let images be made smaller than '
                        'the model was tested on, where a graph of one size needs it')
    return parser.parse_args(arguments)


def progress(items: Sequence[Any]) -> Iterator[Any]:
    """Yield items, and show on a terminal how many are done."""
    start = time.monotonic()
    for index, item in enumerate(items):
        yield item
        if sys.stderr.isatty() and len(items) > 1:
            done = index + 1
            left = (time.monotonic() - start) / done * (len(items) - done)
            bar = '#' * (30 * done // len(items))
            print(f'\r{bar:<30} {done}/{len(items)} images, {left:.0f} s left ', end='',
                  file=sys.stderr, flush=True)
    if sys.stderr.isatty() and len(items) > 1:
        print(file=sys.stderr)


def write(path: Path, data: bytes) -> None:
    """Write a file whole, or not at all."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path} could not be written ({error.strerror})') from error
    finally:
        temporary.unlink(missing_ok=True)


def infer(args: argparse.Namespace) -> None:
    """Do what the command line asks."""
    images = find_files(args.images)
    pictures = picture_paths(images, args.out_dir)
    model = Model(args.file, args.threads, args.precision, args.device, shrink=args.shrink)
    out = Path(args.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--out-dir {out} cannot be made ({error.strerror})') from error
    rows: List[Any] = []
    failed: List[str] = []
    pairs: Iterable[Any] = progress(list(zip(images, pictures)))
    for image, picture in pairs:
        try:
            found = model(image)
        except UserError as error:  # the others are not to be lost
            failed.append(str(error))
            continue
        write(picture, cv2.imencode('.png', found.draw(args.score_thr))[1].tobytes())
        rows.append(dict(image=str(image), picture=picture.name,
                         predictions=found.plain(args.score_thr)))
    if rows:
        write(out / 'predictions.json', (json.dumps(rows, indent=1) + '\n').encode())
    if failed:
        more = '; ...' if len(failed) > 3 else ''
        rest = f'; the others are done, in {out}' if rows else ''
        raise UserError(f'{"; ".join(failed[:3])}{more} ({len(failed)} of {len(images)} images'
                        f'{rest})')
    print(f'{out}: {len(images)} picture(s) and predictions.json, by {model.engine.describe()}')


def main(arguments: Optional[Sequence[str]] = None, program: str = 'psaq_mm.runtime') -> None:
    """Run the command line; exit status 2 and one line for a :class:`UserError`."""
    args = parse_args(arguments, program)
    try:
        infer(args)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)


if __name__ == '__main__':
    main()
