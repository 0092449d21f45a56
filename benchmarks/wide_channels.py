# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What channels after LayerNorms that are far wider than the rest cost, and ``channel_limit``.

    python benchmarks/wide_channels.py --model upernet
    python benchmarks/wide_channels.py --table         # what is measured so far

The demo models are small, and their channels about equally wide; those of published
models are not. So one channel in fifty after each LayerNorm, at least one, is made wider
here: the norm's weight and bias of it are multiplied, and the weight of what reads it is
divided by as much. The float model computes what it did. SQNR of the backbone's feature maps
on real test images, the preset ``default``, by 100 steps of the prior in each phase, with and
without ``channel_limit``.
"""
import argparse
import copy
from typing import Dict

import torch
from experiment import (
    ALL_STEPS,
    Changes,
    Experiment,
    Results,
    Subject,
    add_options,
    cell,
    experiment,
    quiet,
)
from torch import nn

FACTORS = (1, 4, 16)
SHARE = 0.02
LIMITS: Dict[str, Changes] = dict(
    without=dict(quantization=dict(channel_limit=None)), default={})


def widen(subject: Subject, factor: float) -> nn.Module:
    """A copy of the float model that computes the same, with some channels wider."""
    model = copy.deepcopy(subject.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for norm_name, reader_name in subject.adapter.norm_readers(model).items():
            norm, reader = model.get_submodule(norm_name), model.get_submodule(reader_name)
            order = torch.randperm(len(norm.get_parameter('weight')), generator=generator)
            chosen = order[:max(1, round(SHARE * len(order)))]
            for parameter in norm.parameters():
                parameter[chosen] *= factor
            reader.get_parameter('weight')[:, chosen] /= factor
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add_options(parser, ['w8a8', 'w4a8', 'w4a4'])
    args = parser.parse_args()
    quiet()
    results = Results(args.measured / f'{args.model}_wide_channels.json')
    subject = Subject(args.model, args.work_dir)

    def experiment_of(limit: str, setting: str, scope: str) -> Experiment:
        return experiment(setting, 'backbone', ALL_STEPS, LIMITS[limit])

    print(f'{args.model}, seeds {args.seeds}: SQNR, mean (lowest to highest seed)\n')
    print('| channels wider by | channel_limit | ' + ' | '.join(s.upper() for s in args.settings)
          + ' |\n' + '|---' * (2 + len(args.settings)) + '|')
    for factor in FACTORS:
        def measure(made: Experiment, seed: int, factor: float = factor) -> Dict[str, float]:
            student, _ = subject.student(made, seed, widen(subject, factor))
            return dict(sqnr=subject.sqnr(student))

        for limit in LIMITS:
            if not args.table:
                results.fill([limit], args.settings, f'{factor}x', args.seeds, experiment_of,
                             measure)
            found = [results.over_seeds(args.seeds, experiment_of(limit, s, ''), limit, s,
                                        f'{factor}x') for s in args.settings]
            cells = [cell(rows, 'sqnr', len(args.seeds)) for rows in found]
            value = experiment_of(limit, 'w8a8', '').recipe.quantization.channel_limit
            print(f'| {factor} | {value} | {" | ".join(cells)} |', flush=True)
    results.print_note()


if __name__ == '__main__':
    main()
