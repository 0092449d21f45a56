# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images of one's own in the place of synthetic ones."""
import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer

import psaq_mm
from psaq_mm import UserError, pipeline, saved_run
from psaq_mm.checkpoint import load_checkpoint_file
from psaq_mm.synthesis import mosaics

RECIPE = psaq_mm.Recipe().changed(dict(
    synthesis=dict(num_images=3, batch_size=2, image_size=56, steps=2),
    calibration=dict(image_size=None), evolution=dict(batch_size=2)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SwinTransformer(embed_dims=16, depths=(2, 2), num_heads=(1, 2), strides=(4, 2),
                           out_indices=(0, 1))


def same(a, b):
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


def test_synthetic_images_from_outside_give_the_same_student(model):
    images = psaq_mm.synthesize(model, RECIPE.synthesis, seed=3)
    student = psaq_mm.quantize(model, RECIPE, seed=3, images=images)
    assert same(student, psaq_mm.quantize(model, RECIPE, seed=3))
    assert not same(student, psaq_mm.quantize(model, RECIPE, seed=3, images=images.flip(0) / 2))


def test_no_step_of_the_prior_is_taken(model):
    phases = []
    psaq_mm.quantize(model, RECIPE, images=torch.randn(3, 3, 56, 56),
                     progress=lambda p: phases.append(p.phase))
    assert set(phases) == {'calibration', 'rounding'}


class Stop(Exception):
    pass


def test_resume(model, tmp_path):
    recipe = RECIPE.changed(dict(evolution=dict(rounds=2, student_steps=3)))
    images, file = torch.randn(3, 3, 56, 56), tmp_path / 'state.pth'
    expected = psaq_mm.quantize(model, recipe, images=images)

    def stop(progress):
        if (progress.phase, progress.done) == ('evolution', 4):
            raise Stop

    with pytest.raises(Stop):
        psaq_mm.quantize(model, recipe, images=images, progress=stop, state_file=file)
    steps = []
    student = psaq_mm.quantize(
        model, recipe, images=images, state_file=file, resume=True,
        progress=lambda p: steps.append(p.done) if p.phase == 'evolution' else None)
    assert steps == [4, 5, 6] and same(student, expected)
    for others in (images + 1, None):
        with pytest.raises(UserError, match='another images'):
            psaq_mm.quantize(model, recipe, images=others, state_file=file, resume=True)


def test_mixed(model):
    """Synthetic images are those of a run without others, as mosaics."""
    own = torch.randn(2, 3, 56, 84)
    made = mosaics(psaq_mm.synthesize(model, RECIPE.synthesis, seed=3), (56, 84))
    assert made.shape == (2, 3, 56, 84)
    student = psaq_mm.quantize(model, RECIPE, seed=3, images=own, mix=True)
    assert same(student, psaq_mm.quantize(model, RECIPE, images=torch.cat([own, made])))
    assert not same(student, psaq_mm.quantize(model, RECIPE, images=own))
    with pytest.raises(UserError, match='mix=True needs the images'):
        psaq_mm.quantize(model, RECIPE, mix=True)


def test_mixed_resumed(model, tmp_path):
    recipe = RECIPE.changed(dict(evolution=dict(rounds=1, student_steps=2),
                                 synthesis=dict(save_interval=1)))
    own, file = torch.randn(2, 3, 56, 84), tmp_path / 'state.pth'
    expected = psaq_mm.quantize(model, recipe, images=own, mix=True)
    for phase in ('synthesis', 'evolution'):
        def stop(progress, phase=phase):
            if (progress.phase, progress.done) == (phase, 1):
                raise Stop

        with pytest.raises(Stop):
            psaq_mm.quantize(model, recipe, images=own, mix=True, progress=stop,
                             state_file=file, resume=phase == 'evolution')
    state = load_checkpoint_file(file)  # no pixel of one's own is in it
    assert 'game' in state and state['game']['buffer'] == dict(later=[], newest=None)
    for others, mix in ((own + 1, True), (own, False), (None, False)):
        with pytest.raises(UserError, match='another images'):
            psaq_mm.quantize(model, recipe, images=others, mix=mix, state_file=file, resume=True)
    student = psaq_mm.quantize(model, recipe, images=own, mix=True, state_file=file, resume=True)
    assert same(student, expected)


def test_larger_images_make_smaller_batches(model):
    """As many pixels as 8 synthetic ones of 56 x 56 have."""
    done = []
    psaq_mm.quantize(model, RECIPE, images=torch.randn(5, 3, 112, 112),
                     progress=lambda p: done.append(p.done) if p.phase == 'calibration' else None)
    assert done == [0, 2, 4, 5]


@pytest.mark.parametrize('images, match', [
    ([1, 2], 'list'), (torch.zeros(3, 56, 56), r'shape \(N, C, H, W\)'),
    (torch.zeros(0, 3, 56, 56), 'at least 1'), (torch.zeros(2, 3, 56, 56).long(), 'float'),
    (torch.zeros(2, 1, 56, 56), 'takes images of 3 channels, got 1'),
    (torch.full((2, 3, 56, 56), float('nan')), 'not finite')])
def test_refused_images(model, images, match):
    with pytest.raises(UserError, match=match):
        psaq_mm.quantize(model, RECIPE, images=images)


def test_refused_size():
    model = SwinTransformer(pretrain_img_size=56, embed_dims=16, depths=(1, 1), num_heads=(1, 1),
                            strides=(4, 2), out_indices=(0, 1), use_abs_pos_embed=True)
    with pytest.raises(UserError, match='the size of the images must make 196 patches'):
        psaq_mm.quantize(model, RECIPE, images=torch.zeros(1, 3, 28, 28))


# What is refused before any work, and what works in unusual surroundings


def test_inference_mode(model):
    """Nothing would have gradients in it; the student is that of outside."""
    recipe = RECIPE.changed(dict(evolution=dict(rounds=1, student_steps=1)))
    with torch.inference_mode():
        images = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
        student = psaq_mm.quantize(model, recipe, images=images)
        made = psaq_mm.quantize(model, RECIPE)
    assert same(student, psaq_mm.quantize(model, recipe, images=images.clone()))
    assert same(made, psaq_mm.quantize(model, RECIPE))
    assert not any(value.is_inference() for value in student.state_dict().values())


def test_images_of_another_channel_count(model):
    student = psaq_mm.prepare(model, psaq_mm.QuantizationSettings(channel_limit=None))
    with pytest.raises(UserError, match='calibrate: the model takes images of 3 channels, got 4'):
        psaq_mm.calibrate(student, torch.zeros(1, 4, 56, 56))


def test_no_model(tmp_path):
    for step in (lambda: psaq_mm.load(None, tmp_path / 'a.pth'), lambda: psaq_mm.prepare(None),
                 lambda: psaq_mm.save(None, tmp_path / 'a.pth'), lambda: psaq_mm.quantize(None),
                 lambda: psaq_mm.calibrate(None, torch.zeros(1, 3, 56, 56))):
        with pytest.raises(UserError, match='model must be a module .*, got NoneType'):
            step()


def test_no_file(model):
    with pytest.raises(TypeError, match='not NoneType'):
        psaq_mm.load(model, None)


def test_progress_that_cannot_be_called(model):
    images = torch.zeros(1, 3, 56, 56)
    for step in (lambda: psaq_mm.quantize(model, RECIPE, progress=3),
                 lambda: psaq_mm.synthesize(model, RECIPE.synthesis, progress=3),
                 lambda: psaq_mm.calibrate(psaq_mm.prepare(model, psaq_mm.QuantizationSettings(
                     channel_limit=None)), images, progress=3)):
        with pytest.raises(TypeError, match='progress must be a function, got 3'):
            step()


def test_game_after_rounding(model):
    images = torch.rand(1, 3, 56, 56)
    student = psaq_mm.calibrate(psaq_mm.prepare(model, psaq_mm.QuantizationSettings(
        channel_limit=None)), images)
    psaq_mm.round_weights(student, images)
    other = psaq_mm.prepare(model, psaq_mm.QuantizationSettings(channel_limit=None))
    other.load_state_dict(student.state_dict())
    for rounded in (student, other):
        with pytest.raises(UserError, match='psaq_mm.evolve comes before psaq_mm.round_weights'):
            psaq_mm.evolve(rounded, model, images)


def test_no_advice_on_options_from_python(model, tmp_path, monkeypatch):
    lines = []
    for module in (pipeline, saved_run):
        monkeypatch.setattr(module, 'print_log', lambda line, **kwargs: lines.append(line))
    psaq_mm.quantize(model, RECIPE, resume=True, state_file=tmp_path / 'state.pth')
    assert 'nothing to resume' in lines[0] and '--' not in ''.join(lines)
