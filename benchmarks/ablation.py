# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which rules of the game earn their cost: the preset ``evolve``, one change at a time.

``game`` is that preset, without ``channel_limit`` and by twice the prior's steps, as all that
is here but ``default``.

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
from typing import Any, Dict, List

from experiment import (
    METRICS,
    MIN_MAX,
    NEAREST,
    NO_GAME,
    NO_PATCH_SIMILARITY,
    STEPS,
    V1_FORM,
    Recipe,
    Results,
    Subject,
    add_options,
    add_test_options,
    bits_of,
    cell,
    measured_file,
    merged,
    metrics_of,
    quiet,
    roi_inputs_as_rest,
    rules_of,
)

EVOLUTION: Dict[str, Dict[str, Any]] = dict(
    game=dict(),
    prior=NO_GAME,
    # what it learns from
    no_views=dict(zoom=1., contrast=1.),
    zoom_alone=dict(contrast=1.),
    contrast_alone=dict(zoom=1.),
    wider_views=dict(zoom=5., contrast=0.1),
    # images that move too, and compete
    compete=dict(sample_steps=5),
    compete_unbounded=dict(sample_steps=5, adversarial_fraction=None),
    fraction_01=dict(sample_steps=5, adversarial_fraction=0.1),
    move_alone=dict(sample_steps=5, adversarial_fraction=0.),
    no_buffer=dict(sample_steps=5, buffer_size=0),
    newest_alone=dict(sample_steps=5, new_fraction=1.),
    # what the student learns
    learn_ranges=dict(learn='ranges'),
    learn_weights=dict(learn='weights'),
    fast_ranges=dict(range_lr=5e-3),
    slow_weights=dict(weight_lr=0.005),
    fast_weights=dict(weight_lr=0.02),
    # where it is compared
    backbone_alone=dict(taps=dict(neck=0., scores=0., deltas=0.)),
    no_neck=dict(taps=dict(neck=0.)),
    no_scores_deltas=dict(taps=dict(scores=0., deltas=0.)),
    with_rois=dict(taps=dict(rois=1.)),
    plain_scores=dict(losses=dict(scores='relative_l1')),
    confident_deltas=dict(losses=dict(deltas='confident_smooth_l1')),
    kl_logits=dict(losses=dict(logits='softmax_kl')),
    squared=dict(losses=dict(backbone='relative_l2', neck='relative_l2',
                             scores='relative_l2', deltas='relative_l2')),
    # cost
    half_steps=dict(student_steps=10),
    double_steps=dict(student_steps=40))

IMAGES: Dict[str, Dict[str, Any]] = dict(
    prior_10_points=V1_FORM,
    prior_1024_bins=dict(priors=dict(patch_similarity=dict(
        type='PatchSimilarityPrior', weight=1.0, form='binned', bins=1024))),
    no_patch_similarity=NO_PATCH_SIMILARITY,
    prior_half_steps=STEPS['default'],
    prior_double_steps=dict(steps=200),
    images_4=dict(num_images=4),
    images_16=dict(num_images=16))
"""Changes of the images, with the game as it is."""

LABELS = dict(prior_10_points='v1', no_patch_similarity='tv')
"""Variants whose images ``accuracy.py`` makes too; of the others, their name."""

EIGHT = dict(weight=dict(bits=8), activation=dict(bits=8))


def softmax_range_by(observer: str) -> Dict[str, Any]:
    """Another rule for softmax outputs, with the arguments that the bases give it."""
    return dict(roles=dict(attention=dict(
        observer=dict(type=observer, min_factor=0.02, candidates=100))))


QUANTIZER: Dict[str, Dict[str, Any]] = dict(
    min_max_inputs=dict(roles=dict(input=MIN_MAX)),
    squared_attention=softmax_range_by('MSEObserver'),
    absolute_attention=softmax_range_by('MAEObserver'),
    min_max_attention=dict(roles=dict(attention=MIN_MAX)),
    percentile_everywhere=dict(overrides={
        pattern: dict(input=dict(observer=dict(type='PercentileObserver', percentile=0.999)))
        for pattern in ('*attn*.proj', '*patch_embed*')}),
    percentile_99=dict(roles=dict(input=dict(observer=dict(percentile=0.99)))),
    percentile_999=dict(roles=dict(input=dict(observer=dict(percentile=0.999)))),
    no_margin=dict(activation=dict(margin=0.), roles=dict(attention=dict(margin=0.))),
    patch_embed_as_rest=dict(patch_embed_bits=None),
    # scope model
    predictors_as_rest=dict(predictor_bits=None),
    neck_in_8_bits=dict(overrides={'neck*': EIGHT}),
    box_head_in_8_bits=dict(overrides={'*bbox_head*': EIGHT}),
    mask_head_in_8_bits=dict(overrides={'*mask_head*': EIGHT}),
    backbone_in_8_bits=dict(overrides={'backbone*': EIGHT}),
    roi_heads_in_8_bits=dict(overrides={'@roi_head': EIGHT}),
    roi_weights_in_8_bits=dict(overrides={'@roi_head': dict(weight=dict(bits=8))}),
    roi_inputs_in_8_bits=dict(overrides={'@roi_head': dict(activation=dict(bits=8))}),
    gptq=dict(weight=dict(rounding='gptq')))
"""Changes of the quantizer, without the game; only with the last are weights not rounded
to nearest."""

WITH_GAME: Dict[str, Dict[str, Any]] = dict(
    absolute_attention_and_game=merged(QUANTIZER['absolute_attention'], NEAREST),
    squared_attention_and_game=merged(QUANTIZER['squared_attention'], NEAREST),
    nearest_and_game=NEAREST)
"""Such changes with the game; what learns nothing in it is rounded to nearest."""


AS_SHIPPED = ('default_but_roi_inputs_as_rest', 'default')
"""Variants that differ from the preset ``default`` in what their names say alone."""


def recipe_of(subject: Subject, variant: str, setting: str, scope: str) -> Recipe:
    """How a variant's student is made."""
    if variant in AS_SHIPPED:
        recipe = subject.shipped('default', setting, scope)
        return recipe if variant == 'default' else roi_inputs_as_rest(recipe)
    changes = IMAGES.get(variant, {})
    rules = EVOLUTION['prior' if variant in QUANTIZER else
                      variant if variant in EVOLUTION else 'game']
    label = LABELS.get(variant, variant) if changes else 'prior'
    fixed_weights = rules.get('rounds') == 0 or rules.get('learn') == 'ranges'
    quantization = merged(bits_of(setting, subject.name), dict(scope=scope, channel_limit=None),
                          NEAREST if fixed_weights else {},
                          {**QUANTIZER, **WITH_GAME}.get(variant, {}))
    return roi_inputs_as_rest(
        subject.recipe(label, quantization, merged(rules_of(setting), rules), changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    variants = [*EVOLUTION, *IMAGES, *QUANTIZER, *WITH_GAME, *AS_SHIPPED]
    add_options(parser, ['w4a4', 'w3a3'])
    add_test_options(parser)
    parser.add_argument('--variants', nargs='+', choices=variants,
                        default=[v for v in variants if not v.endswith('_in_8_bits')])
    parser.add_argument('--no-metrics', action='store_true', help='measure the SQNR alone')
    args = parser.parse_args()
    quiet()
    results = Results(measured_file(args.measured, args.model, args.scenes))
    subject = Subject(args.model, args.work_dir, scenes=args.scenes)
    float_model = results.float_model(subject)

    def recipe(variant: str, setting: str, scope: str) -> Recipe:
        return recipe_of(subject, variant, setting, scope)

    def measure(variant: str, made: Recipe, seed: int) -> Dict[str, float]:
        student, seconds = subject.student(made, seed)
        return dict(subject.evaluate(student, not args.no_metrics), seconds=seconds)

    if not args.table:
        needed = 'sqnr' if args.no_metrics else next(iter(float_model))
        results.fill(args.variants, args.settings, args.scope, args.seeds, recipe, measure, needed)
    keys = metrics_of(float_model)
    print(f'{args.model}, scope `{args.scope}`, seeds {args.seeds}: '
          'mean (lowest to highest seed)\n')
    heads = [f'{METRICS[k][0]} {s.upper()}' for s in args.settings for k in keys]
    print(f'| | {" | ".join(heads)} | seconds |')
    print('|---' * (len(heads) + 2) + '|')
    for variant in args.variants:
        rows: List[Any] = [
            results.over_seeds(args.seeds, recipe(variant, s, args.scope), variant, s, args.scope)
            for s in args.settings]
        seconds = [v['seconds'] for r in rows for v in r]
        if seconds:
            cells = [cell(r, k, len(args.seeds)) for r in rows for k in keys]
            print(f'| {variant} | {" | ".join(cells)} | {sum(seconds) / len(seconds):.0f} |')


if __name__ == '__main__':
    main()
