# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put the output of commands into docs/results.md, where it names them.

    python benchmarks/fill_results.py

Each block of that file from ``<!-- python benchmarks/NAME.py ... -->`` to
``<!-- end -->`` gets what the command prints, without its first line. A command that
fails, as for a model that is not here, leaves its block as it is.
"""
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Match

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'docs' / 'results.md'
BLOCK = re.compile(r'(<!-- (python benchmarks/[^>]*?) -->\n).*?(<!-- end -->)', re.DOTALL)


def fill(block: Match[str]) -> str:
    """A block with what its command prints after the first line."""
    words = [sys.executable, *shlex.split(block[2])[1:]]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f'left as it was: {block[2]}', file=sys.stderr)
        return block[0]
    table = done.stdout.split('\n', 1)[1].strip('\n')
    return f'{block[1]}\n{table}\n\n{block[3]}'


def main() -> None:
    RESULTS.write_text(BLOCK.sub(fill, RESULTS.read_text()))


if __name__ == '__main__':
    main()
