# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What it costs to check a checkpoint before it is used, beside the load."""
import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict

import torch

from psaq_mm.checkpoint import load_checkpoint_file, save_torch
from psaq_mm.checkpoint.integrity import require_undamaged


def seconds(run: Callable[[], object], rounds: int) -> float:
    """Median wall time of a call; the file is in the page cache."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(path: Path) -> None:
    """The check alone."""
    with open(path, 'rb') as file:
        require_undamaged(file, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--megabytes', type=int, default=200, help='size of the file')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    count = 200  # tensors, as many as a Swin-T detector has
    state: Dict[str, torch.Tensor] = {
        f'layers.{i}.weight': torch.randn(args.megabytes * 250_000 // count) for i in range(count)}
    print('| file | torch.load | check | both, as psaq_mm loads |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'checkpoint.pth'
        for name, save in (('float checkpoint, CRC of each record', torch.save),
                           ('quantized.pth and state.pth, SHA-256', save_torch)):
            save(dict(state_dict=state), path)
            costs = [seconds(run, args.rounds) for run in (
                lambda: torch.load(path, map_location='cpu', weights_only=True),
                lambda: check(path), lambda: load_checkpoint_file(path))]
            print(f'| {name} | ' + ' | '.join(f'{cost:.2f} s' for cost in costs) + ' |')


if __name__ == '__main__':
    main()
