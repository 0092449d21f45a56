# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""One call does all: the order, the state between the steps, and resume."""
import copy
import dataclasses

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from small_models import detector, left_as_it_was, partly_trained, raw_outputs, swin, widen

import psaq_mm
from psaq_mm import Recipe, UserError
from psaq_mm.adapters.tested_size import SizeFound
from psaq_mm.ops import named_quant_ops, ops_to_round
from psaq_mm.pipeline import Pipeline

FEW = dict(synthesis=dict(num_images=3, batch_size=2, image_size=56, steps=2, save_interval=3),
           calibration=dict(image_size=None, batch_size=2))
GAME = dict(FEW, evolution=dict(rounds=2, sample_steps=1, student_steps=2, batch_size=2,
                                save_interval=2, range_lr=0.01),
            reconstruction=dict(steps=2, batch_size=2))
BLOCKS = 4  # of small_models.swin
STEPS = dict(synthesis=2 * 2 * 2, evolution=2 * (1 + 2),
             reconstruction=BLOCKS * 2)  # batches, phases, steps; rounds; blocks


def recipe(*changes):
    result = Recipe.shipped('w4a4').changed(dict(quantization=dict(roles=dict(
        input=dict(rotate=True)))))
    for change in changes:
        result = result.changed(change)
    return result


def assert_same(one, other):
    """Bit by bit, ranges too."""
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.fixture
def lines():
    """What is logged while the test runs."""
    logger, found = MMLogger.get_current_instance(), []
    before, logger.handle = logger.handle, lambda record: found.append(record.getMessage())
    yield found
    logger.handle = before


# What it gives


def test_steps_by_hand_give_the_same_bits():
    """The order that the pipeline keeps, step by step."""
    chosen = recipe(GAME, dict(calibration=dict(image_size=(84, 112))))
    model = widen(swin())
    student = psaq_mm.quantize(model, chosen, seed=3)
    teacher = copy.deepcopy(model)
    images = psaq_mm.synthesize(teacher, chosen.synthesis, seed=3)
    psaq_mm.equalize(teacher, images, chosen.quantization, batch_size=2)
    expected = psaq_mm.calibrate(psaq_mm.prepare(teacher, chosen.quantization), images, 2)
    psaq_mm.evolve(expected, teacher, images, chosen.evolution, chosen.synthesis, seed=3)
    psaq_mm.recalibrate(expected, images, (84, 112), batch_size=2)
    psaq_mm.reconstruct(expected, teacher, images, chosen.reconstruction, seed=3, batch_size=2)
    if ops_to_round(expected):
        psaq_mm.round_weights(expected, images, batch_size=2)
    assert_same(student, expected)
    assert any(op.weight_settled for _, op in named_quant_ops(student))


@pytest.mark.parametrize('build', [partly_trained, detector])
def test_model_is_left_as_it_was(build):
    """In training too: weights, modes, frozen parameters, classes, hooks and attributes."""
    model = build()
    with left_as_it_was(model):
        student = psaq_mm.quantize(model, recipe(FEW))
    assert student is not model and not list(named_quant_ops(model))
    assert list(named_quant_ops(student)) and not any(m.training for m in student.modules())
    with left_as_it_was(model):  # and so a second time
        assert_same(psaq_mm.quantize(model, recipe(FEW)), student)


def test_defaults_are_the_shipped_ones():
    assert Recipe() == Recipe.shipped('w8a8', 'default') == Recipe.shipped()
    assert Recipe.from_dict(Recipe().to_dict()) == Recipe()


def test_seed():
    model = swin()
    one, other = (psaq_mm.quantize(model, recipe(FEW), seed=seed) for seed in (0, 1))
    assert_same(psaq_mm.quantize(model, recipe(FEW)), one)
    with pytest.raises(AssertionError):
        assert_same(one, other)


def test_student_can_be_saved(tmp_path):
    student = psaq_mm.quantize(detector(), recipe(FEW, dict(quantization=dict(scope='model'))))
    psaq_mm.save(student, tmp_path / 'quantized.pth')
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(5)
    other = psaq_mm.load(detector(), tmp_path / 'quantized.pth')
    assert all(torch.equal(a, b) for a, b in zip(raw_outputs(other, images),
                                                 raw_outputs(student, images)))


def test_what_is_wrong_is_said_before_any_step():
    model = swin()
    for chosen, match in (
            (dict(quantization=dict(include='layers.*')), "'layers.*' matches no module"),
            (dict(synthesis=dict(priors=dict(n=dict(type='BatchNormPrior')))),
             'synthesis.priors.n needs BatchNorm statistics'),
            (dict(evolution=dict(rounds=1, taps=dict(_delete_=True, logits=1.))),
             'evolution.taps has weights for none of the groups')):
        with left_as_it_was(model), pytest.raises(UserError, match=match):
            psaq_mm.quantize(model, recipe(FEW, chosen), progress=pytest.fail)
    student = psaq_mm.quantize(model, recipe(FEW))
    with pytest.raises(UserError, match='needs the float model'):
        psaq_mm.quantize(student, recipe(FEW))
    with pytest.raises(UserError, match='resume=True needs the state_file'):
        psaq_mm.quantize(model, recipe(FEW), resume=True)


@pytest.mark.parametrize('arguments, match', [
    (dict(recipe='w4a4'), "must be a psaq_mm.Recipe .*got 'w4a4'"),
    (dict(recipe=dict(synthesis=dict(steps=1))), 'must be a psaq_mm.Recipe'),
    (dict(model=None), 'model must be a module .*got NoneType'),
    (dict(seed=-1), 'seed must be an integer from 0 to 2.32 - 1, got -1'),
    (dict(seed=2**32), 'seed must be'),
    (dict(seed=None), 'seed must be an integer .*got None'),
    (dict(images=torch.zeros(1, 3, 56, 56).half()), 'needs float32 images'),
    (dict(images=torch.zeros(1, 3, 56, 56).double()), 'needs float32 images')])
def test_wrong_arguments(arguments, match):
    with pytest.raises(UserError, match=match):
        psaq_mm.quantize(**{**dict(model=swin(), recipe=recipe(FEW), progress=pytest.fail),
                            **arguments})


def test_state_file_that_cannot_be_written_is_refused_before_any_step(tmp_path):
    (tmp_path / 'file').write_text('')
    for path, match in ((tmp_path, 'is a folder'), (tmp_path / 'file' / 'state.pth', 'file')):
        with pytest.raises(UserError, match=match):
            psaq_mm.quantize(swin(), recipe(FEW), progress=pytest.fail, state_file=path)


def test_size_of_test_images_that_the_model_does_not_take():
    model = swin(use_abs_pos_embed=True, pretrain_img_size=56)
    chosen = recipe(FEW, dict(calibration=dict(image_size='test')))
    with pytest.raises(UserError, match='the size of test images must make 196 patches'):
        psaq_mm.quantize(model, chosen, test_size=(84, 84), progress=pytest.fail)
    psaq_mm.quantize(model, recipe(FEW), test_size=(84, 84))  # not asked for: no matter


# The size of test images


@pytest.mark.parametrize('found, size, expected', [
    (SizeFound((84, 112), "test_dataloader's Resize(scale=(112, 84))"), (84, 112),
     "size of test images: 84x112, from test_dataloader's Resize(scale=(112, 84))"),
    (SizeFound(None, 'the test pipeline does not resize to a size'), (56, 56),
     'the size of test images was not found (the test pipeline does not resize to a size); set '
     'calibration.image_size=(H, W): ranges stay those of images of 56x56')])
def test_size_of_the_last_ranges(found, size, expected, lines):
    pipeline = Pipeline(swin(), recipe(FEW, dict(calibration=dict(image_size='test'))),
                        test_size=found)
    pipeline.run()
    assert pipeline.final_size == size
    assert expected in lines
    last = f'the last ranges are set for images of {size[0]}x{size[1]}'
    assert (last in lines) == (size != (56, 56)) == ('final_ranges' in pipeline.seconds)


def test_size_of_the_config_of_a_model(lines):
    """As mmdet's and mmseg's ``init_model`` leave it on the model; an argument wins."""
    model = swin()
    chosen = recipe(FEW, dict(calibration=dict(image_size='test')))
    psaq_mm.quantize(model, chosen)
    assert any('was not found (the model has no config); set calibration.image_size' in line
               for line in lines)
    model.cfg = Config(dict(model={}, test_dataloader=dict(dataset=dict(pipeline=[
        dict(type='Resize', scale=(112, 84), keep_ratio=False)]))))
    one = psaq_mm.quantize(model, chosen)
    assert any(line.startswith('size of test images: 84x112') for line in lines)
    other = psaq_mm.quantize(model, recipe(FEW, dict(calibration=dict(image_size=(84, 112)))))
    assert_same(one, other)
    lines.clear()
    psaq_mm.quantize(model, chosen, test_size=(64, 64))
    assert 'the last ranges are set for images of 64x64' in lines
    with pytest.raises(UserError, match='height, width'):
        psaq_mm.quantize(model, chosen, test_size=(64, 0))


# Progress


@pytest.mark.parametrize('changes, phases', [
    ([FEW], ['synthesis', 'calibration', 'rounding']),
    ([FEW, dict(quantization=dict(weight=dict(rounding='nearest')))],
     ['synthesis', 'calibration']),
    ([GAME, dict(calibration=dict(image_size=(84, 112)), evolution=dict(learn='ranges'))],
     ['synthesis', 'calibration', 'evolution', 'final_ranges', 'reconstruction', 'rounding'])])
def test_progress(changes, phases):
    """Phases in order; each counts up to its total."""
    calls = []
    psaq_mm.quantize(swin(), recipe(*changes), progress=calls.append)
    seen = list(dict.fromkeys(call.phase for call in calls))
    assert seen == phases
    assert [call.phase for call in calls] == sorted((call.phase for call in calls),
                                                    key=phases.index)
    for phase in phases:
        of_phase = [call for call in calls if call.phase == phase]
        done, total = [call.done for call in of_phase], of_phase[0].total
        assert done[0] == 0 and done == sorted(set(done)) and done[-1] == total, phase
        assert {call.total for call in of_phase} == {STEPS.get(phase, total)}
        assert not of_phase[0].losses
        assert all(bool(call.losses) == (phase in STEPS) for call in of_phase[1:])
    with pytest.raises(dataclasses.FrozenInstanceError):
        calls[0].done = 0


# Resume


class Stopped(Exception):
    """What a caller's progress callback raises."""


def stop_at(phase, done):
    def progress(call):
        if (call.phase, call.done) == (phase, done):
            raise Stopped
    return progress


@pytest.fixture(scope='module')
def uninterrupted():
    torch.manual_seed(0)
    model = swin()
    chosen = recipe(GAME, dict(calibration=dict(image_size=(84, 112))))
    return model, chosen, psaq_mm.quantize(model, chosen, seed=7)


@pytest.mark.parametrize('phase, done', [
    ('synthesis', 1), ('synthesis', 4), ('synthesis', 5), ('synthesis', 8), ('calibration', 2),
    ('evolution', 1), ('evolution', 3), ('evolution', 4), ('evolution', 6), ('final_ranges', 2),
    ('reconstruction', 1), ('reconstruction', 5)])
def test_resumed_run_gives_the_same_bits(phase, done, uninterrupted, tmp_path):
    model, chosen, expected = uninterrupted
    file = tmp_path / 'state.pth'
    with left_as_it_was(model), pytest.raises(Stopped):
        psaq_mm.quantize(model, chosen, 7, progress=stop_at(phase, done), state_file=file)
    calls = []
    student = psaq_mm.quantize(model, chosen, 7, progress=calls.append, state_file=file,
                               resume=True)
    assert_same(student, expected)
    first = {call.phase: call.done for call in reversed(calls)}
    assert first['synthesis'] == (done if phase == 'synthesis' else STEPS['synthesis'])
    assert first['evolution'] == dict(evolution=done, final_ranges=STEPS['evolution'],
                                      reconstruction=STEPS['evolution']).get(phase, 0)
    assert first['reconstruction'] == (done // 2 * 2 if phase == 'reconstruction' else 0)


def test_state_is_saved_now_and_then(uninterrupted, tmp_path):
    """Every save_interval steps, so that a killed run loses no more."""
    model, chosen, expected = uninterrupted
    steps, file = [], tmp_path / 'state.pth'

    def progress(call):
        if file.exists():
            state = torch.load(file, weights_only=True)
            steps.append((state['images']['step_index'],
                          state.get('game', {}).get('step_index'),
                          state.get('blocks', {}).get('step_index')))

    psaq_mm.quantize(model, chosen, 7, progress=progress, state_file=str(file))
    assert list(dict.fromkeys(steps)) == [
        (3, None, None), (6, None, None), (8, None, None), (8, 2, None), (8, 4, None),
        (8, 6, None), (8, 6, 2), (8, 6, 4), (8, 6, 6)]  # after the last block nothing is called


def test_nothing_to_resume(uninterrupted, tmp_path, lines):
    model, chosen, expected = uninterrupted
    student = psaq_mm.quantize(model, chosen, 7, state_file=tmp_path / 'state.pth', resume=True)
    assert any('state.pth; starting from the first step' in line for line in lines)
    assert_same(student, expected)


def test_state_of_another_run(uninterrupted, tmp_path):
    """Of another seed, prior or weights: one line that says so; the file stays."""
    model, chosen, _ = uninterrupted
    file = tmp_path / 'state.pth'
    with pytest.raises(Stopped):
        psaq_mm.quantize(model, chosen, 7, progress=stop_at('evolution', 3), state_file=file)
    before = file.read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm1.bias[0] += 1e-6
    for arguments, match in (
            ((model, chosen, 8), 'with another seed; use the same, or start anew'),
            ((model, chosen.changed(dict(synthesis=dict(lr=0.2))), 7), 'another synthesis;'),
            ((other, chosen, 7), 'with another weights;'),
            ((other, chosen, 8), 'with another seed, weights;')):
        with pytest.raises(UserError, match=match) as caught:
            psaq_mm.quantize(*arguments, progress=pytest.fail, state_file=file, resume=True)
        assert len(str(caught.value).splitlines()) == 1 and str(file) in str(caught.value)
    assert file.read_bytes() == before
    torch.save(dict(state_dict={}), file)
    with pytest.raises(UserError, match='is not the state of a quantization run'):
        psaq_mm.quantize(model, chosen, 7, progress=pytest.fail, state_file=file, resume=True)
    file.write_bytes(before[:1000])
    with pytest.raises(UserError, match='state.pth'):
        psaq_mm.quantize(model, chosen, 7, progress=pytest.fail, state_file=file, resume=True)


@pytest.mark.parametrize('change, name', [
    (dict(evolution=dict(range_lr=0.02)), 'evolution'),
    (dict(quantization=dict(weight=dict(bits=5))), 'quantization')])
def test_images_serve_another_game(change, name, uninterrupted, tmp_path, lines):
    """Where only what comes after them is changed, the images are used, and it says so."""
    model, chosen, _ = uninterrupted
    file = tmp_path / 'state.pth'
    with pytest.raises(Stopped):
        psaq_mm.quantize(model, chosen, 7, progress=stop_at('evolution', 3), state_file=file)
    other, calls = chosen.changed(change), []
    student = psaq_mm.quantize(model, other, 7, progress=calls.append, state_file=file,
                               resume=True)
    assert any(f'another {name}: its images are used, the evolution starts again' in line
               for line in lines)
    assert [call.done for call in calls if call.phase == 'evolution'][0] == 0
    assert [call.done for call in calls if call.phase == 'synthesis'] == [STEPS['synthesis']]
    assert_same(student, psaq_mm.quantize(model, other, 7))
