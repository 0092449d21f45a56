# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which rules of the game earn their cost: five rounds of the student, one change at a time.

``game`` is that, without ``channel_limit`` and by twice the prior's steps, as all that
is here but ``default`` and ``default_but_roi_inputs_as_rest``.

    python benchmarks/ablation.py                          # all variants, the demo detector
    python benchmarks/ablation.py --variants compete learn_ranges --settings w4a4
    python benchmarks/ablation.py --variants prior predictors_as_rest --scope model --settings w4a4
    python benchmarks/ablation.py --table                  # what is measured so far

Variants of the game and of the images play the game; those of the quantizer are the
prior alone (compare with ``prior``), as ranges show best without a student that learns,
but for ``..._and_game``. Where no weights learn, they are rounded to nearest, so that
variants differ in what their names say alone; only ``gptq`` and ``default`` round them as the
preset does, and ``default`` has its ``channel_limit`` and its half of the prior's steps too.

Every value is kept in benchmarks/measured as soon as it is there, as those of ``accuracy.py``;
a run that was cut off goes on. ``--no-metrics`` measures the SQNR of feature maps on real test
images alone, in seconds instead of a minute.
"""
import argparse
import functools
from typing import Any, Dict, List

from experiment import (
    ALL_STEPS,
    METRICS,
    MIN_MAX,
    NEAREST,
    NO_PATCH_SIMILARITY,
    PLAIN,
    ROI_INPUTS_AS_REST,
    ROUNDS,
    UNLIMITED,
    V1_FORM,
    Changes,
    Experiment,
    Results,
    Subject,
    add_options,
    add_test_options,
    cell,
    experiment,
    measured_file,
    metrics_of,
    quiet,
)


def rules(**values: Any) -> Changes:
    """Changes of the game."""
    return dict(evolution=values)


def images(**values: Any) -> Changes:
    """Changes of the images."""
    return dict(synthesis=values)


def overrides(pattern: str, **values: Any) -> Changes:
    """Changes of the quantizer for some layers."""
    return dict(quantization=dict(overrides={pattern: values}))


def softmax_range_by(**observer: Any) -> Changes:
    """Another rule for softmax outputs, of segmentors too."""
    rule = dict(attention=dict(observer=dict(observer, _delete_=True)))
    return dict(quantization=dict(roles=rule, overrides={'@segmentor': rule}))


GAME: Dict[str, Changes] = dict(
    game={},
    # what it learns from
    no_views=rules(zoom=1., contrast=1.),
    zoom_alone=rules(contrast=1.),
    contrast_alone=rules(zoom=1.),
    wider_views=rules(zoom=5., contrast=0.1),
    # images that move too, and compete
    compete=rules(sample_steps=5),
    compete_unbounded=rules(sample_steps=5, adversarial_fraction=None),
    fraction_01=rules(sample_steps=5, adversarial_fraction=0.1),
    move_alone=rules(sample_steps=5, adversarial_fraction=0.),
    no_buffer=rules(sample_steps=5, buffer_size=0),
    newest_alone=rules(sample_steps=5, new_fraction=1.),
    # what the student learns
    learn_ranges=dict(NEAREST, **rules(learn='ranges')),
    learn_weights=rules(learn='weights'),
    fast_ranges=rules(range_lr=5e-3),
    slow_weights=rules(weight_lr=0.005),
    fast_weights=rules(weight_lr=0.02),
    # where it is compared
    backbone_alone=rules(taps=dict(neck=0., scores=0., deltas=0.)),
    no_neck=rules(taps=dict(neck=0.)),
    no_scores_deltas=rules(taps=dict(scores=0., deltas=0.)),
    with_rois=rules(taps=dict(rois=1.)),
    # cost
    half_steps=rules(student_steps=10),
    double_steps=rules(student_steps=40),
    # the images
    prior_10_points=V1_FORM,
    prior_1024_bins=images(priors=dict(patch_similarity=dict(bins=1024))),
    no_patch_similarity=NO_PATCH_SIMILARITY,
    prior_half_steps=images(steps=50),
    prior_double_steps=images(steps=200),
    images_4=images(num_images=4),
    images_16=images(num_images=16))
"""Changes of a game of five rounds of the student."""

EIGHT = dict(weight=dict(bits=8), activation=dict(bits=8))
SQUARED = dict(type='MSEObserver', min_factor=0.02, candidates=100)
ABSOLUTE = dict(SQUARED, type='MAEObserver')

QUANTIZER: Dict[str, Changes] = dict(
    prior={},
    min_max_inputs=dict(quantization=dict(roles=dict(input=MIN_MAX))),
    squared_attention=softmax_range_by(**SQUARED),
    absolute_attention=softmax_range_by(**ABSOLUTE),
    min_max_attention=softmax_range_by(type='MinMaxObserver'),
    percentile_everywhere=dict(quantization=dict(overrides={
        pattern: dict(input=dict(observer=dict(type='PercentileObserver', percentile=0.999)))
        for pattern in ('*attn*.proj', '@patch_embed')})),
    percentile_99=dict(quantization=dict(roles=dict(input=dict(observer=dict(percentile=0.99))))),
    percentile_999=dict(quantization=dict(roles=dict(input=dict(
        observer=dict(percentile=0.999))))),
    no_margin=dict(quantization=dict(activation=dict(margin=0.),
                                     roles=dict(attention=dict(margin=0.)))),
    patch_embed_as_rest=dict(quantization=dict(patch_embed_bits=None)),
    # scope model
    predictors_as_rest=dict(quantization=dict(predictor_bits=None)),
    neck_in_8_bits=overrides('neck*', **EIGHT),
    box_head_in_8_bits=overrides('*bbox_head*', **EIGHT),
    mask_head_in_8_bits=overrides('*mask_head*', **EIGHT),
    backbone_in_8_bits=overrides('backbone*', **EIGHT),
    roi_heads_in_8_bits=overrides('@roi_head', **EIGHT),
    roi_weights_in_8_bits=overrides('@roi_head', weight=dict(bits=8)),
    roi_inputs_in_8_bits=overrides('@roi_head', activation=dict(bits=8)),
    gptq=dict(quantization=dict(weight=dict(rounding='gptq'))))
"""Changes of the quantizer, without the game; only with the last are weights not rounded
to nearest."""

WITH_GAME: Dict[str, List[Changes]] = dict(
    absolute_attention_and_game=[QUANTIZER['absolute_attention'], NEAREST],
    squared_attention_and_game=[QUANTIZER['squared_attention'], NEAREST],
    nearest_and_game=[NEAREST])
"""Such changes with the game; what learns nothing in it is rounded to nearest."""

AS_SHIPPED: Dict[str, Changes] = dict(
    default_but_roi_inputs_as_rest=ROI_INPUTS_AS_REST,
    # Pixels that the images do not show, black and white, are cut off.
    default_but_pixels_of_images=overrides('@patch_embed', input=dict(
        observer=dict(_delete_=True, type='PercentileObserver', percentile=0.9999))),
    default={})
"""Variants that differ from the preset ``default`` in what their names say alone."""


def experiment_of(variant: str, setting: str, scope: str) -> Experiment:
    """How a variant's student is made."""
    if variant in AS_SHIPPED:
        return experiment(setting, scope, AS_SHIPPED[variant])
    if variant in QUANTIZER:
        return experiment(setting, scope, PLAIN, ALL_STEPS, QUANTIZER[variant])
    changes = WITH_GAME[variant] if variant in WITH_GAME else [GAME[variant]]
    return experiment(setting, scope, UNLIMITED, ALL_STEPS, ROUNDS, *changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    variants = [*GAME, *QUANTIZER, *WITH_GAME, *AS_SHIPPED]
    add_options(parser, ['w4a4', 'w3a3'])
    add_test_options(parser)
    parser.add_argument('--variants', nargs='+', choices=variants,
                        default=[v for v in variants if not v.endswith('_in_8_bits')])
    parser.add_argument('--no-metrics', action='store_true', help='measure the SQNR alone')
    args = parser.parse_args()
    quiet()
    results = Results(measured_file(args.measured, args.model, args.scenes))
    subject = Subject(args.model, args.work_dir, args.scenes)
    float_model = results.float_model(subject)
    if not args.table:
        results.fill(args.variants, args.settings, args.scope, args.seeds, experiment_of,
                     functools.partial(subject.measure, metrics=not args.no_metrics),
                     'sqnr' if args.no_metrics else next(iter(float_model)))
    found = {variant: [results.over_seeds(args.seeds, experiment_of(variant, s, args.scope),
                                          variant, s, args.scope) for s in args.settings]
             for variant in args.variants}
    values = [value for rows in found.values() for of_setting in rows for value in of_setting]
    keys = [k for k in metrics_of(float_model) if any(k in value for value in values)]
    print(f'{args.model}, scope `{args.scope}`, seeds {args.seeds}: '
          'mean (lowest to highest seed)\n')
    heads = [f'{METRICS[k][0]} {s.upper()}' for s in args.settings for k in keys]
    print(f'| | {" | ".join(heads)} | seconds |')
    print('|---' * (len(heads) + 2) + '|')
    for variant, rows in found.items():
        seconds = [v['seconds'] for r in rows for v in r]
        if seconds:
            cells = [cell(r, k, len(args.seeds)) for r in rows for k in keys]
            print(f'| {variant} | {" | ".join(cells)} | {sum(seconds) / len(seconds):.0f} |')
    results.print_note()


if __name__ == '__main__':
    main()
