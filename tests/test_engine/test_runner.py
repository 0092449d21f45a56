# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The runner: its phases call the hooks, in order, and only ours."""
import math

import pytest
import torch

from psaq_mm.engine import PSAQHook, PSAQRunner, build_float_model, load_config
from psaq_mm.ops import named_quant_ops
from psaq_mm.registry import HOOKS

OPTIONS = {'synthesis.num_images': 2, 'synthesis.steps': 2, 'synthesis.image_size': 64,
           'log_level': 'WARNING', 'evolution.rounds': 2, 'evolution.sample_steps': 1,
           'evolution.student_steps': 1, 'evolution.batch_size': 2}
BACKBONE = {'quantization.scope': 'backbone'}


@pytest.fixture
def trace():
    """Names of hook points in the order in which they were called."""
    calls = []

    class TraceHook(PSAQHook):
        def before_synthesis(self, runner, synthesizer):
            calls.append('before_synthesis')

        def after_synthesis_step(self, runner, synthesizer, losses):
            calls.append(f'step {synthesizer.step_index}')
            assert losses['total'] == pytest.approx(
                losses['patch_similarity'] + losses['total_variation'], rel=1e-4)

        def after_synthesis(self, runner, synthesizer):
            calls.append('after_synthesis')
            assert runner.images.shape == (2, 3, 64, 64)

        def before_calibration(self, runner, total):
            calls.append(f'before_calibration {total}')

        def after_calibration(self, runner):
            calls.append('after_calibration')

        def before_evolution(self, runner, evolver):
            calls.append('before_evolution')

        def after_evolution_step(self, runner, evolver, losses):
            calls.append(f'evolution {evolver.step_index} {sorted(losses)}')

        def after_evolution(self, runner, evolver):
            calls.append('after_evolution')

        def before_final_ranges(self, runner, total):
            calls.append(f'before_final_ranges {total}')

        def after_final_ranges(self, runner):
            calls.append('after_final_ranges')

        def before_rounding(self, runner, total):
            calls.append(f'before_rounding {total}')

        def after_rounding(self, runner):
            calls.append('after_rounding')

        def after_progress(self, runner, progress):
            if progress.done and progress.phase in ('calibration', 'final_ranges', 'rounding'):
                calls.append(f'{progress.phase} {progress.done}')

        def after_quantize(self, runner):
            calls.append('after_quantize')

    HOOKS.register_module(module=TraceHook, force=True)
    yield calls
    HOOKS.module_dict.pop('TraceHook')


@pytest.fixture
def wide_ranges():
    """Name of a hook after which the student has much to learn: its ranges are doubled."""

    class WideRangesHook(PSAQHook):
        def before_evolution(self, runner, evolver):
            ranges = evolver.student.ranges
            with torch.no_grad():
                ranges.offsets += math.log(2)
            ranges.apply()

    HOOKS.register_module(module=WideRangesHook, force=True)
    yield 'WideRangesHook'
    HOOKS.module_dict.pop('WideRangesHook')


def test_phases_and_hooks(trace, quantization_config, tmp_path):
    config = load_config(quantization_config, {**OPTIONS, **BACKBONE,
                                               'quantization.weight.rounding': 'nearest'})
    config.work_dir = str(tmp_path)
    config.custom_hooks = [dict(type='psaq_mm.QuantizedCheckpointHook'),
                           dict(type='EMAHook'), dict(type='psaq_mm.TraceHook')]
    model = build_float_model(config)
    block = model.backbone.stages[0].blocks[0]
    with torch.no_grad():  # a channel far wider than the others, and the same function
        block.norm1.weight[5] *= 16
        block.norm1.bias[5] *= 16
        block.attn.w_msa.qkv.weight[:, 5] /= 16
    image = torch.randn(1, 3, 100, 72)  # no multiples of 7 windows: zeros pad them
    with torch.no_grad():
        before = model.backbone(image)
    runner = PSAQRunner.for_quantization(config, model, meta={}, seed=3,
                                         source=dict(file='x', sha256='y'), sensitivity_images=0)
    student = runner.quantize()
    sample = ['adversarial_factor', 'discrepancy', 'patch_similarity', 'total', 'total_variation']
    assert trace == ['before_synthesis', 'step 1', 'step 2', 'step 3', 'step 4',
                     'after_synthesis', 'before_calibration 2', 'calibration 2',
                     'after_calibration',
                     'before_evolution',
                     f'evolution 1 {sample}', "evolution 2 ['discrepancy', 'round']",
                     f'evolution 3 {sample}', "evolution 4 ['discrepancy', 'round']",
                     'after_evolution', 'before_final_ranges 3', 'final_ranges 2',
                     'final_ranges 3', 'after_final_ranges', 'after_quantize']
    assert not any(type(hook).__name__ == 'EMAHook' for hook in runner.hooks)
    # The teacher stays float and computes what it did; the student is another model.
    assert not list(named_quant_ops(runner.teacher)) and list(named_quant_ops(student))
    width = runner.teacher.backbone.stages[0].blocks[0].norm1.weight.abs()
    assert width[5] < 4 * width.median()  # channel_limit has narrowed it
    assert torch.equal(student.backbone.stages[0].blocks[0].norm1.weight.abs(), width)
    with torch.no_grad():
        for found, expected in zip(runner.teacher.backbone(image), before):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options, rounded', [
    ({'evolution.rounds': 0, **BACKBONE}, 'backbone'), ({'evolution.rounds': 0}, ''),
    ({'evolution.learn': 'ranges', **BACKBONE}, 'backbone'), ({}, 'roi_head'),
    ({'quantization.weight.rounding': 'nearest', 'evolution.rounds': 0}, None), (BACKBONE, None)])
def test_weights_that_learn_nothing_are_rounded(options, rounded, trace, wide_ranges,
                                                small_config, tmp_path):
    # From doubled ranges two such steps surely lead nearer, so that what was learned is kept.
    config = load_config(small_config, {**OPTIONS, 'evolution.range_lr': 0.3, **options})
    config.work_dir = str(tmp_path)
    config.custom_hooks = [dict(type=f'psaq_mm.{name}') for name in ('TraceHook', wide_ranges)]
    runner = PSAQRunner.for_quantization(config, build_float_model(config), meta={}, seed=3,
                                         source=dict(file='x', sha256='y'), sensitivity_images=0)
    student = runner.quantize()
    game = runner.pipeline.recipe.evolution
    learns = bool(game.rounds) and game.learn == 'both'
    assert [call for call in trace if 'rounding' in call] == (
        [] if rounded is None else ['before_rounding 1', 'rounding 1', 'after_rounding'])
    assert ('rounding' in runner.pipeline.seconds) == (rounded is not None)
    for name, op in named_quant_ops(student):
        quantizer = op.weight_quantizer
        if quantizer is None:
            continue
        before = runner.teacher.get_submodule(name).weight
        if rounded is not None and name.startswith(rounded):
            assert torch.equal(quantizer(op.weight), op.weight), name
        else:
            assert torch.equal(op.weight, before) != learns, name


def test_losses_reach_the_visualizer(small_config, tmp_path):
    """mmengine's local backend keeps them; tensorboard's would plot them."""
    import json
    # mmengine gives the visualizer of a name once in a process, hence another name
    config = load_config(small_config, {**OPTIONS, 'synthesis.steps': 5,
                                        'visualizer.name': 'of_this_test'})
    config.work_dir = str(tmp_path)
    runner = PSAQRunner.for_quantization(config, build_float_model(config), meta={},
                                         source=dict(file='x', sha256='y'), sensitivity_images=0)
    runner.quantize()
    files = list(tmp_path.glob('*/vis_data/scalars.json'))
    assert len(files) == 1
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert rows[-1]['step'] == 10 and rows[-1]['synthesis/patch_similarity'] != 0
