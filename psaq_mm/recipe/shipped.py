# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The recipes that are shipped, as what they change of the defaults.

A *preset* says how much is done (images, steps, the game), a *base* how many bits
there are. The base comes first, then the preset, then a config's own values.
"""
from typing import Any, Dict, Mapping

EVEN_ATTENTION = dict(type='MAEObserver', min_factor=0.02, candidates=100)
"""Range rule of softmax outputs that shows even attention too, not large weights alone."""

PRESETS: Mapping[str, Mapping[str, Any]] = dict(
    # Images by the prior, ranges set on them, weights rounded by GPTQ.
    default={},
    # Half of the prior's steps.
    fast=dict(synthesis=dict(steps=25)),
    # As PSAQ-ViT V1's released code places quantizers and makes images, with V2's changes:
    # no labels, and the teacher-student game, whose rules V2's abstract does not give
    # (docs/method.md). Naive ranges.
    paper=dict(
        quantization=dict(
            scope='backbone', placement='v1', channel_limit=None, patch_embed_bits=None,
            predictor_bits=None, weight=dict(rounding='nearest'), activation=dict(margin=0.),
            roles=dict(_delete_=True), overrides=dict(_delete_=True)),
        synthesis=dict(
            num_images=32, batch_size=32, steps=500,
            priors=dict(patch_similarity=dict(form='v1', points=10),
                        total_variation=dict(weight=0.05))),
        evolution=dict(rounds=10, sample_steps=50, student_steps=100, batch_size=32,
                       zoom=1., contrast=1.)))


def _width(weight: int, activation: int) -> Dict[str, Any]:
    # Of the backbone: engines have no use for fewer than 8 bits.
    return dict(scope='backbone', weight=dict(bits=weight), activation=dict(bits=activation))


_MOST_INPUTS = dict(type='PercentileObserver', percentile=0.98)
"""Range rule of layers' inputs for 8 integers, once these are alike."""

BASES: Mapping[str, Mapping[str, Any]] = dict(
    # Once rotated and divided by the sizes of tokens, inputs are alike, so that the last layer of
    # attention needs no rule of its own.
    w3a3=dict(quantization=dict(
        scope='backbone', weight=dict(bits=3), activation=dict(bits=3, margin=0.),
        roles=dict(attention=dict(margin=0., granularity='per_token'),
                   input=dict(rotate=True, granularity='per_token', observer=_MOST_INPUTS)),
        overrides={'*attn*.proj': dict(input=dict(observer=_MOST_INPUTS))})),
    # Steps of 4 bits are too coarse to give some away: no margin. Of segmentors softmax
    # outputs are to show even attention too; detectors lose a little by that (docs/results.md).
    w4a4=dict(quantization=dict(
        scope='backbone', weight=dict(bits=4), activation=dict(bits=4, margin=0.),
        roles=dict(attention=dict(margin=0.)),
        overrides={'@segmentor': dict(attention=dict(observer=EVEN_ATTENTION))})),
    w4a8=dict(quantization=_width(4, 8)),
    w6a6=dict(quantization=_width(6, 6)),
    # The whole model: it loses 0.3 points at most, and whole graphs are fast (docs/deploy.md).
    w8a8={})
