# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Side-by-side timing: interleaved runs, so that both sides see the same noise."""
import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

from psaq_mm.deploy.latency import interleave

__all__ = ['interleave', 'median_ratio', 'peak_memory_mib', 'pin', 'run_in_process',
           'timing_parser']


def pin(core: int) -> None:
    """Run on one core with one thread."""
    import torch
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def median_ratio(seconds: Dict[str, List[float]], side: str, baseline: str) -> float:
    """Median over rounds of one side's time to the baseline's in that round."""
    return statistics.median(a / b for a, b in zip(seconds[side], seconds[baseline]))


def peak_memory_mib() -> float:
    """Peak resident memory of this process since it was started, MiB.

    From /proc: what getrusage reports outlives exec, and so holds the parent's.
    """
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmHWM:\s+(\d+) kB', status).group(1)) / 1024


def run_in_process(script: str, *arguments: str) -> str:
    """Run a script in a process of its own (peak memory is per process) and
    return the last line that it prints."""
    out = subprocess.run([sys.executable, script, *arguments], check=True,
                         stdout=subprocess.PIPE, text=True)
    return out.stdout.strip().splitlines()[-1]


def timing_parser(description: str) -> argparse.ArgumentParser:
    """A parser with ``--core`` and ``--rounds``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--core', type=int, default=0, help='CPU core to run on')
    parser.add_argument('--rounds', type=int, default=7, help='measured rounds')
    return parser
