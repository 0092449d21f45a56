# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put two quantization runs side by side.

    python tools/compare.py work_dirs/one work_dirs/other
"""
import argparse

from psaq_mm.checkpoint import save_bytes
from psaq_mm.engine.command_line import run_tool
from psaq_mm.report import compare_page, differences, read_run
from psaq_mm.report.comparison import names_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Put two quantization runs side by side: a table '
                                     'here, and a page with both in the same charts.')
    for name in 'ab':
        parser.add_argument(name, metavar=name.upper(), help='work directory of '
                            'tools/quantize.py, or its report.json')
    parser.add_argument('--out', default='compare.html', metavar='FILE',
                        help='page to write (default: compare.html)')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    a, b = read_run(args.a), read_run(args.b)
    page = compare_page(a, b)
    numbers, changes = differences(a, b)
    save_bytes(page.encode('utf-8'), args.out)
    rows = [('', *names_of(a, b)), *numbers, *changes]
    widths = [min(40, max(len(row[i]) for row in rows)) for i in range(2)]
    for number, row in enumerate(rows):
        if number == 1 + len(numbers):
            print('\ndone differently')
        print(f'{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}'.rstrip())
    print(f'\n{args.out}')


if __name__ == '__main__':
    run_tool(main)
