# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A run in a few numbers."""
import statistics
from typing import Any, Dict, List, Mapping, Optional

LAST = {'total': 'last loss of the prior', 'student/discrepancy': 'last loss of the student',
        'round/discrepancy': 'distance after the last round'}
"""Losses whose last values runs are compared by."""


def module_values(report: Mapping[str, Any], key: str) -> List[float]:
    """Values of a key of the modules, where they were measured."""
    return [entry[key] for entry in report['modules'] if entry.get(key) is not None]


def bits_of(report: Mapping[str, Any]) -> str:
    """Such as ``W4A8``: what most of the modules have; means if they were chosen for a budget."""
    chosen = report.get('allocation')
    if chosen:
        return f'W{chosen["weights"]:.1f}A{chosen["activations"]:.1f}'
    weights = [tensor['bits'] for entry in report['modules']
               for role, tensor in entry['tensors'].items() if role == 'weight']
    others = [tensor['bits'] for entry in report['modules']
              for role, tensor in entry['tensors'].items() if role != 'weight']
    return ''.join(f'{letter}{statistics.mode(bits)}'
                   for letter, bits in (('W', weights), ('A', others)) if bits)


def megabytes(count: float) -> str:
    """Bytes as MB."""
    return f'{count / 1e6:.2f} MB'


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 100:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes} min {rest} s' if minutes < 60 else \
        f'{minutes // 60} h {minutes % 60} min'


def figures(report: Mapping[str, Any]) -> Dict[str, Optional[float]]:
    """The numbers that two runs are compared by: name with its unit to value."""
    size, sqnr = report['size'], module_values(report, 'sqnr_db')
    errors = module_values(report, 'sensitivity')
    peaks = [peaks['process'] for peaks in (report.get('memory') or {}).values()
             if 'process' in peaks]
    losses = {words: report['losses'][name][-1] for name, words in LAST.items()
              if report['losses'].get(name)}
    return {
        'quantized modules': len(report['modules']),
        'weights in float, MB': size['float_bytes'] / 1e6,
        'weights stored, MB': size['stored_bytes'] / 1e6,
        'median SQNR of modules, dB': statistics.median(sqnr) if sqnr else None,
        'lowest SQNR of a module, dB': min(sqnr) if sqnr else None,
        'highest sensitivity of a module, %': 100 * max(errors) if errors else None,
        'seconds': sum(report['seconds'].values()),
        'peak memory, MB': max(peaks) / 1e6 if peaks else None,
        **losses}
