# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images from a model, which stays as it is."""
import math

import pytest
import torch
from small_models import detector, left_as_it_was, partly_trained, swin
from torch import nn

import psaq_mm
from psaq_mm import SynthesisSettings, UserError
from psaq_mm.prior import PatchSimilarityPrior
from psaq_mm.synthesis import synthesizer

FEW = SynthesisSettings(num_images=3, batch_size=2, image_size=56, steps=2)


def test_images():
    made = psaq_mm.synthesize(swin(), FEW)
    assert made.shape == (3, 3, 56, 56) and not made.requires_grad
    assert made.min() >= 0 and made.max() <= 255  # a backbone alone has no normalization
    assert made.std() > 0.1


def test_images_are_in_the_range_of_the_detector():
    made = psaq_mm.synthesize(detector(), SynthesisSettings(
        num_images=3, batch_size=2, image_size=56, steps=2, lr=100.))
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    for channel in range(3):
        values = made[:, channel]
        assert float(values.min()) == pytest.approx(-mean[channel] / std[channel])
        assert float(values.max()) == pytest.approx((255 - mean[channel]) / std[channel])


def test_seed():
    model = swin()
    first, second = (psaq_mm.synthesize(model, FEW, seed=3) for _ in range(2))
    torch.rand(5)  # the global generator plays no part
    assert torch.equal(first, second)
    assert torch.equal(psaq_mm.synthesize(model, FEW, seed=3), first)
    other = psaq_mm.synthesize(model, FEW, seed=4)
    assert all(not torch.equal(a, b) for a, b in zip(first, other))
    assert torch.equal(psaq_mm.synthesize(model, FEW), psaq_mm.synthesize(model, FEW, seed=0))


def test_seeds_share_no_image():
    """Image i of a seed is none of another seed, whatever its number."""
    model = swin()
    made = torch.cat([psaq_mm.synthesize(model, FEW, seed=seed) for seed in range(3)])
    assert len({image.numpy().tobytes() for image in made}) == 9


def test_size_follows_the_model():
    """The smallest size that leaves windows of 3 tokens without padding, at strides 4 and 2."""
    made = psaq_mm.synthesize(swin(window_size=3),
                              SynthesisSettings(num_images=1, batch_size=1, steps=1))
    assert made.shape == (1, 3, 24, 24)


def test_model_is_left_as_it_was():
    model = partly_trained()
    with left_as_it_was(model):
        first = psaq_mm.synthesize(model, FEW)
        assert torch.equal(psaq_mm.synthesize(model, FEW), first)  # no dropped paths
    assert model.stages[1].blocks[0].with_cp


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize('after', [1, 4, 7])
def test_model_is_left_as_it_was_when_interrupted(error, after):
    model = partly_trained()
    calls = []

    def progress(losses):
        calls.append(losses)
        if len(calls) == after:
            raise error('stop')

    with left_as_it_was(model), pytest.raises(error):
        psaq_mm.synthesize(model, FEW, progress=progress)
    assert len(calls) == after
    assert model.stages[1].blocks[0].with_cp


def test_model_is_left_as_it_was_when_it_fails(monkeypatch):
    model = partly_trained()

    def fail(self, state):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(PatchSimilarityPrior, '__call__', fail)
    with left_as_it_was(model), pytest.raises(RuntimeError, match='out of memory'):
        psaq_mm.synthesize(model, FEW)


def test_model_with_nan():
    model = swin()
    model.stages[1].blocks[1].attn.w_msa.qkv.bias.data[3] = math.nan
    with pytest.raises(FloatingPointError, match='not finite at step 0: patch_similarity nan'):
        psaq_mm.synthesize(model, FEW)


def test_gradients_may_be_off():
    model = swin()
    expected = psaq_mm.synthesize(model, FEW)
    with torch.no_grad():
        assert torch.equal(psaq_mm.synthesize(model, FEW), expected)


def test_progress():
    calls = []
    psaq_mm.synthesize(swin(), FEW, progress=calls.append)
    assert len(calls) == 2 * 2 * 2  # batches, phases, steps
    for losses in calls:
        assert set(losses) == {'patch_similarity', 'total_variation', 'total'}
        assert losses['total'] == pytest.approx(
            losses['patch_similarity'] + losses['total_variation'], rel=1e-6)


def test_steps_by_hand():
    model = swin()
    with synthesizer(model, FEW, seed=2) as images:
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        while not images.done:
            images.step()
    assert torch.equal(images.images, psaq_mm.synthesize(model, FEW, seed=2))


def test_shares_are_the_whole():
    """What two processes make apart is what one makes, to rounding."""
    model, parts = swin(), []
    for indices in ((0, 1), (2, )):
        with synthesizer(model, FEW, seed=2, indices=indices) as images:
            while not images.done:
                images.step()
            parts.append(images.images)
    torch.testing.assert_close(torch.cat(parts), psaq_mm.synthesize(model, FEW, seed=2),
                               rtol=1e-4, atol=1e-3)


def test_wrong_settings_and_models():
    with pytest.raises(UserError, match='steps must be a positive integer'):
        SynthesisSettings(steps=0)
    with pytest.raises(UserError, match="Did you mean 'num_images'"):
        SynthesisSettings.from_dict(dict(images=4))
    model = partly_trained()
    with left_as_it_was(model), pytest.raises(UserError, match='needs BatchNorm statistics'):
        psaq_mm.synthesize(model, SynthesisSettings.from_dict(
            dict(priors=dict(norms=dict(type='BatchNormPrior')))))
    with pytest.raises(UserError, match='is Linear; expected a Swin Transformer'):
        psaq_mm.synthesize(nn.Linear(2, 2), FEW)
