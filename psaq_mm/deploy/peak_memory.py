# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Measure the memory of one side of a benchmark, in a separate process.

    python -m psaq_mm.deploy.peak_memory '{"engine": "openvino", "file": ...}'
"""
import json
import subprocess
import sys
from typing import Any, Callable, Dict, Optional

from psaq_mm.peak_memory import forget_peak, resident_bytes


def added_peak(work: Callable[[], Any]) -> Optional[float]:
    """Measure how much a function raises the peak of resident memory.

    Args:
        work (Callable): The function.

    Returns:
        float, optional: MiB; None where the system does not tell.
    """
    forget_peak()  # that of the imports
    before = resident_bytes('VmRSS')
    if before is None:
        return None
    work()
    return max(0, (resident_bytes() or 0) - before) / 2**20


def peak_in_process(job: Dict[str, Any]) -> Optional[float]:
    """Run :func:`main` on a job in a new process, and return the MiB or None."""
    done = subprocess.run([sys.executable, '-m', __name__, json.dumps(job)], check=True,
                          capture_output=True, text=True)
    value: Optional[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return value


def main(text: str) -> None:
    """Measure one job, and print the MiB or null.

    Args:
        text (str): JSON with ``size``, ``threads`` and ``precision``, and
            either ``engine`` and ``file``, or ``config``, ``options``,
            ``checkpoint``, ``trust``, ``part`` and ``simulated``.
    """
    job = json.loads(text)
    import torch
    torch.set_num_threads(job['threads'])
    images = torch.zeros(1, job['channels'], *job['size'])
    if 'engine' in job:
        from psaq_mm.runtime.engines import ENGINES

        def work() -> None:
            engine = ENGINES[job['engine']](job['file'], job['threads'], job['precision'])
            for _ in range(2):
                engine.run(images.numpy())
    else:
        from psaq_mm.engine import build_model, load_config
        from psaq_mm.ops import unwrap

        from .hosts import find_subgraph
        config = load_config(job['config'], job['options'])

        def work() -> None:
            model = build_model(config, job['checkpoint'], job['trust'])
            subgraph = find_subgraph(model if job['simulated'] else unwrap(model), job['part'])
            with torch.no_grad(), torch.autocast('cpu', torch.bfloat16,
                                                 enabled=job['precision'] == 'bf16'):
                for _ in range(2):
                    subgraph.run(images)
    print(json.dumps(added_peak(work)))


if __name__ == '__main__':
    main(sys.argv[1])
