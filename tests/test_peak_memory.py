# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Peaks of memory, from a moment on."""
import pytest
import torch

from psaq_mm.peak_memory import forget_peak, peak_bytes, resident_bytes


def test_peak_is_of_what_was_in_use():
    if resident_bytes() is None:
        pytest.skip('the system does not tell')
    forget_peak()
    before = resident_bytes('VmRSS')
    torch.ones(2**24)  # 64 MiB, freed at once
    assert peak_bytes()['process'] >= before + 2**25


def test_a_gpu_that_is_not_used_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: False)
    for name in ('reset_peak_memory_stats', 'max_memory_allocated'):
        monkeypatch.setattr(torch.cuda, name, None)  # would start CUDA
    forget_peak()
    assert 'gpu' not in peak_bytes()
