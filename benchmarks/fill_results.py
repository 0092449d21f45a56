# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Put the output of commands into docs/results.md, where it names them.

    python benchmarks/fill_results.py

Each block of that file from ``<!-- python benchmarks/NAME.py ... -->`` to
``<!-- end -->`` gets what the command prints, without its first line.
"""
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'docs' / 'results.md'
BLOCK = re.compile(r'(<!-- (python benchmarks/[^>]*?) -->\n).*?(<!-- end -->)', re.DOTALL)


def output_of(command: str) -> str:
    """What a command prints after its first line."""
    words = [sys.executable, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.split('\n', 1)[1].strip('\n')


def main() -> None:
    text = RESULTS.read_text()
    filled = BLOCK.sub(lambda m: f'{m[1]}\n{output_of(m[2])}\n\n{m[3]}', text)
    RESULTS.write_text(filled)


if __name__ == '__main__':
    main()
