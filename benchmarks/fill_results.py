# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put the output of commands into README.md and docs/, where these name them.

    python benchmarks/fill_results.py [FILE.md ...]

Each block from ``<!-- python FOLDER/NAME.py ... -->`` to ``<!-- end -->`` gets what the
command prints, without its first line. A command that fails, as for a model that is not here,
leaves its block as it is.
"""
import contextlib
import io
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import List, Match

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'(<!-- (python (?:benchmarks|docs)/[^>]*?) -->\n).*?(<!-- end -->)', re.DOTALL)


def pages() -> List[Path]:
    """README and all pages of docs/."""
    return [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def fill(block: Match[str]) -> str:
    """A block with what its command prints after the first line. All commands run in this
    process, so that torch is imported once."""
    printed, sys.argv = io.StringIO(), shlex.split(block[2])[1:]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
        if stop.code:
            print(f'left as it was: {block[2]} ({stop.code})', file=sys.stderr)
            return block[0]
    table = printed.getvalue().split('\n', 1)[1].strip('\n')
    return f'{block[1]}\n{table}\n\n{block[3]}'


def main() -> None:
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    os.chdir(ROOT)
    for page in chosen:
        text = page.read_text()
        filled = BLOCK.sub(fill, text)
        if filled != text:
            page.write_text(filled)


if __name__ == '__main__':
    main()
