# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The peak of this process's memory, from a moment on."""
import contextlib
import re
from pathlib import Path
from typing import Dict, Optional

import torch

STATUS = Path('/proc/self/status')


def resident_bytes(key: str = 'VmHWM') -> Optional[int]:
    """Resident memory of this process: its peak, or with ``VmRSS`` what it is now.

    Returns:
        int, optional: Bytes; None where the system does not tell.
    """
    found = re.search(rf'{key}:\s+(\d+) kB', STATUS.read_text()) if STATUS.exists() else None
    return None if found is None else 1024 * int(found.group(1))


def forget_peak() -> None:
    """Let peaks begin anew with what is in use now."""
    with contextlib.suppress(OSError):
        Path('/proc/self/clear_refs').write_text('5')
    if torch.cuda.is_initialized():  # asking would take memory of a GPU that is not used
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> Dict[str, int]:
    """Peaks since :func:`forget_peak`: ``process``, and of its tensors on a GPU ``gpu``, each in
    bytes; what the system does not tell is left out."""
    process = resident_bytes()
    peaks = {} if process is None else dict(process=process)
    if torch.cuda.is_initialized():
        peaks['gpu'] = torch.cuda.max_memory_allocated()
    return peaks
