# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.models.backbones.swin import SwinTransformer
from mmengine.logging import MMLogger

from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating
from psaq_mm.prior import AttentionRecord, PriorTerm, TeacherRecord, derived_seed
from psaq_mm.recipe import SynthesisSettings
from psaq_mm.registry import PRIORS
from psaq_mm.synthesis import Synthesizer, learning_rate_factor, share_of
from psaq_mm.synthesis.teacher import float_teacher

LOWER = torch.tensor([-2., -1., 0.]).view(1, 3, 1, 1)
UPPER = torch.tensor([2., 3., 0.5]).view(1, 3, 1, 1)
# Three images in two batches of two phases of three steps.
SMALL = dict(num_images=3, batch_size=2, image_size=28, steps=3, shifts=(15, 30), warmup=0.34,
             priors=dict(patch_similarity=dict(type='PatchSimilarityPrior'),
                         total_variation=dict(type='TotalVariationPrior', weight=0.1)))
TOTAL = 12


def attention(images):
    """A stand-in for a network: its output is the windows' pixels."""
    windows = images.unfold(2, 7, 7).unfold(3, 7, 7)  # (B, 3, rows, columns, 7, 7)
    tokens = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, 49, 1, 3)
    return TeacherRecord(attention=[AttentionRecord(output=tokens)])


def synthesizer(seed=0, run=attention, indices=None, **changes):
    settings = SynthesisSettings.from_dict({**SMALL, **changes})
    return Synthesizer(settings, run, LOWER, UPPER, seed, indices=indices)


def finish(images):
    while not images.done:
        images.step()
    return images


@pytest.fixture(scope='module')
def uninterrupted():
    return finish(synthesizer())


def assert_same(one, other):
    assert one.images.shape == other.images.shape
    assert torch.equal(one.images, other.images)
    assert one.losses == other.losses
    assert one.step_index == other.step_index == TOTAL
    assert one.seed == other.seed


@pytest.mark.parametrize('num_images, batch_size, expected', [
    (1, 8, [1]), (8, 8, [8]), (9, 8, [8, 1]), (16, 8, [8, 8]), (3, 1, [1, 1, 1]),
    (5, 2, [2, 2, 1]),
])
def test_batches(num_images, batch_size, expected):
    images = synthesizer(num_images=num_images, batch_size=batch_size, steps=1,
                         shifts=(15, 30, 5), image_size=7)
    assert images.total_steps == 3 * len(expected)
    finish(images)
    assert [len(batch) for batch in images.finished] == expected


# The schedule


@pytest.mark.parametrize('steps, warmup, expected', [
    (1, 0., [1.]),
    (4, 0., [1., 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4]),
    (10, 0.2, [0.5, 1., 1., 0.5 * (1 + math.cos(math.pi / 8))]),
    (6, 0.5, [1 / 3, 2 / 3, 1., 1., 0.75, 0.25]),
    (5, 1., [0.2, 0.4, 0.6, 0.8, 1.]),
])
def test_learning_rate_factor(steps, warmup, expected):
    factors = [learning_rate_factor(step, steps, warmup) for step in range(len(expected))]
    assert factors == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('steps', [1, 2, 7, 500])
@pytest.mark.parametrize('warmup', [0., 0.2, 0.5, 1.])
def test_learning_rate_factor_is_in_its_range(steps, warmup):
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.


def test_learning_rate_and_phases():
    """Each phase starts with a fresh Adam at the bottom of the rise."""
    images = synthesizer(lr=0.5, steps=4, warmup=0.5, num_images=1)
    rates, states = [], []
    while not images.done:
        images.step()
        if images.pixels is not None:  # gone after the last step
            rates.append(images.pixels.optimizer.param_groups[0]['lr'])
            states.append(int(images.pixels.optimizer.state[images.current]['step']))
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.25, 0.25, 0.5, 0.5])
    assert states == [1, 2, 3, 4, 1, 2, 3]


# The images


def test_images(uninterrupted):
    assert uninterrupted.images.shape == (3, 3, 28, 28)
    assert [len(batch) for batch in uninterrupted.finished] == [2, 1]
    assert uninterrupted.done and uninterrupted.total_steps == TOTAL
    assert set(uninterrupted.losses) == {'patch_similarity', 'total_variation', 'total'}
    for step in range(TOTAL):
        losses = {name: values[step] for name, values in uninterrupted.losses.items()}
        total = losses.pop('total')
        assert total == pytest.approx(sum(losses.values()), rel=1e-6)
    assert all(len(values) == TOTAL for values in uninterrupted.losses.values())


@pytest.mark.parametrize('num_images, batch_size', [(1, 1), (1, 4), (4, 2), (5, 2)])
def test_number_of_images(num_images, batch_size):
    images = synthesizer(num_images=num_images, batch_size=batch_size, steps=1, shifts=(5, ))
    sizes = []
    assert images.images.shape == (0, 3, 28, 28)
    while not images.done:
        images.step()
        sizes.append(len(images.images))
    assert len(images.images) == num_images
    assert sizes == [min(batch_size * (i + 1), num_images) for i in range(len(sizes))]


@pytest.mark.parametrize('size', [(28, 56), (56, 28)])
def test_oblong_images(size):
    assert finish(synthesizer(image_size=size, num_images=1)).images.shape == (1, 3, *size)


def test_images_stay_in_the_valid_range():
    images = finish(synthesizer(lr=100.)).images
    for channel, (low, high) in enumerate(zip(LOWER.flatten(), UPPER.flatten())):
        assert images[:, channel].min() == low  # so high a rate reaches the ends
        assert images[:, channel].max() == high


def test_loss_falls():
    priors = dict(total_variation=dict(type='TotalVariationPrior', low=2500, high=2500))
    images = finish(synthesizer(num_images=1, steps=40, shifts=(0, ), lr=0.05, priors=priors))
    values = images.losses['total_variation']
    assert values[-1] < 0.1 * values[0]


def test_seed(uninterrupted):
    assert_same(finish(synthesizer(seed=0)), uninterrupted)
    other = finish(synthesizer(seed=1))
    assert not torch.equal(other.images, uninterrupted.images)
    assert not torch.equal(other.images[:2], uninterrupted.images[:2])


def test_other_random_numbers_do_not_matter(uninterrupted):
    images = synthesizer()
    before = torch.get_rng_state()
    images.step()
    assert torch.equal(torch.get_rng_state(), before)
    while not images.done:
        torch.rand(3)
        images.step()
    assert_same(images, uninterrupted)


def test_gradients_may_be_off_around_it(uninterrupted):
    with torch.no_grad():
        images = finish(synthesizer())
    assert_same(images, uninterrupted)


def test_priors_without_attention_do_not_run_the_model():

    def refuse(batch):
        raise AssertionError('the model was run')

    priors = dict(total_variation=dict(type='TotalVariationPrior'))
    assert len(finish(synthesizer(run=refuse, priors=priors)).images) == 3
    with pytest.raises(AssertionError, match='the model was run'):
        synthesizer(run=refuse).step()


def test_model_runs_once_a_step():
    shapes = []

    def watch(batch):
        shapes.append(tuple(batch.shape))
        return attention(batch)

    finish(synthesizer(run=watch))
    assert shapes == [(2, 3, 28, 28)] * 6 + [(1, 3, 28, 28)] * 6


# Image i depends on the seed and on i


@pytest.fixture(scope='module')
def swin():
    """A small Swin, in float64: what differs then is not rounding."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = SwinTransformer(embed_dims=8, depths=(1, 2), num_heads=(1, 2), strides=(4, 2),
                                out_indices=(0, 1), drop_path_rate=0.3)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def images_of_swin(swin, batch_size, indices=None, seed=0, **changes):
    settings = SynthesisSettings.from_dict({**SMALL, **dict(
        num_images=8, image_size=56, batch_size=batch_size), **changes})
    with evaluating(swin), float_teacher(swin, settings) as teacher:
        return finish(Synthesizer(settings, lambda images: teacher(images)[0], LOWER.double(),
                                  UPPER.double(), seed, indices=indices)).images


@pytest.mark.parametrize('form', ['binned', 'v1'])
def test_images_do_not_depend_on_batches_and_processes(form, swin):
    """One process of 8, two of 4, 8 batches of one, and one image alone."""
    rules = dict(priors=dict(SMALL['priors'],
                             patch_similarity=dict(type='PatchSimilarityPrior', form=form)))
    expected = images_of_swin(swin, 8, **rules)
    assert expected.dtype == torch.float64
    assert len({image.numpy().tobytes() for image in expected}) == 8
    halves = torch.cat([images_of_swin(swin, 4, share_of(8, rank, 2), **rules)
                        for rank in range(2)])
    assert torch.equal(halves, images_of_swin(swin, 4, **rules))  # the same batches
    for others in (halves, images_of_swin(swin, 1, **rules), images_of_swin(swin, 3, **rules)):
        torch.testing.assert_close(others, expected, rtol=1e-9, atol=1e-9)
    alone = images_of_swin(swin, 8, [5], **rules)
    torch.testing.assert_close(alone, expected[5:6], rtol=1e-9, atol=1e-9)
    more = images_of_swin(swin, 8, num_images=11, **rules)
    torch.testing.assert_close(more[:8], expected, rtol=1e-9, atol=1e-9)


def test_runs_of_neighbouring_seeds_share_no_image():
    noise = {}
    for seed in range(3):
        images = synthesizer(seed, num_images=4, batch_size=4, lr=1e-8)
        images.step()
        noise[seed] = images.current.detach()
    everything = torch.cat(list(noise.values()))
    distances = torch.cdist(everything.flatten(1), everything.flatten(1))
    assert (distances + 1e3 * torch.eye(12)).min() > 10  # of sqrt(2 * 2352) = 69, before clamping


def test_noise_is_drawn_from_the_seed_of_the_image():
    images = synthesizer(5, num_images=3, batch_size=3, lr=1e-8)
    images.step()
    for index, image in enumerate(images.current.detach()):
        generator = torch.Generator().manual_seed(derived_seed(5, index))
        noise = torch.randn(3, 28, 28, generator=generator)
        expected = torch.minimum(torch.maximum(noise, LOWER[0]), UPPER[0])
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_each_step_has_draws_of_its_own():
    """Other flips and rolls for each image and in each step."""
    seen = []

    def watch(batch):
        seen.append(batch.detach().clone())
        return attention(batch)

    images = synthesizer(run=watch, num_images=4, batch_size=4, steps=4, shifts=(224, ), lr=1e-8)
    finish(images)
    still = images.images
    shifts = set()
    for batch in seen[1:]:
        for image, other in zip(batch, still):
            found = [(flip, i, j) for flip in range(2) for i in range(28) for j in range(28)
                     if torch.allclose((other.flip(-1) if flip else other).roll((i, j), (-2, -1)),
                                       image, atol=1e-6)]
            assert len(found) == 1
            shifts.update(found)
    assert len(shifts) > 9  # of 12
    assert {flip for flip, _, _ in shifts} == {0, 1}


@given(st.integers(1, 40), st.integers(1, 9))
def test_share_of(num_images, processes):
    shares = [share_of(num_images, rank, processes) for rank in range(processes)]
    assert [index for share in shares for index in share] == list(range(num_images))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_state_of_another_share():
    first = synthesizer(indices=range(2))
    first.step()
    with pytest.raises(UserError, match='another share of the run: resume with as many proc'):
        synthesizer(indices=range(1, 3)).load_state_dict(first.state_dict())


@PRIORS.register_module(force=True)
class GivesPrior(PriorTerm):
    """A term of a user's: whatever the test asks."""

    def __init__(self, shape='image', weight=1.):
        super().__init__(weight)
        self.shape = shape

    def __call__(self, state):
        each = state.images.pow(2).mean((1, 2, 3))
        return dict(image=each, batch=each.mean(), column=each[:, None])[self.shape]


def test_scalar_is_shared_equally():
    """A mean over the images, taken as the loss of each, moves them as losses of their own do."""
    each, batch = (finish(synthesizer(priors=dict(mine=dict(type='GivesPrior', shape=shape))))
                   for shape in ('image', 'batch'))
    torch.testing.assert_close(each.images, batch.images, rtol=0, atol=1e-3)
    assert each.losses['mine'] == pytest.approx(batch.losses['mine'], rel=1e-4)


def test_term_of_another_shape():
    images = synthesizer(priors=dict(mine=dict(type='GivesPrior', shape='column')))
    with pytest.raises(UserError, match=r'^synthesis.priors.mine must give one value for each of '
                                        r'the 2 images, or a scalar, got \(2, 1\)$'):
        images.step()


def test_terms_that_couple_images_are_named(tmp_path):
    logger = MMLogger.get_instance('coupling', log_file=str(tmp_path / 'log'))
    synthesizer()
    assert 'batches as a whole' not in (tmp_path / 'log').read_text()
    synthesizer(priors=dict(norms=dict(type='BatchNormPrior')))
    assert 'synthesis.priors.norms looks at batches as a whole' in (tmp_path / 'log').read_text()
    assert logger is MMLogger.get_current_instance()


# What goes wrong in a step


def broken_at(step, value):
    """An attention whose output, or whose gradient, is not finite at a step."""
    calls = []

    def run(images):
        calls.append(len(images))
        record = attention(images)
        if len(calls) == step + 1:
            if value == 'gradient':
                record.attention[0].output.register_hook(lambda grad: grad * math.nan)
            else:
                record.attention[0].output = record.attention[0].output * value
        return record

    return run


@pytest.mark.parametrize('value', [math.nan, math.inf, 'gradient'])
@pytest.mark.parametrize('step', [0, 1, 3, 5, 6, 11])
def test_loss_that_is_not_finite(step, value, uninterrupted):
    """It is named, the images are those of the step before, and a second try
    continues as if nothing had been."""
    images = synthesizer(run=broken_at(step, value))
    for _ in range(step):
        images.step()
    before = None if images.current is None else images.current.detach().clone()
    with pytest.raises(FloatingPointError, match=f'not finite at step {step}[:,]') as caught:
        images.step()
    expected = 'the gradient' if value == 'gradient' else 'patch_similarity nan'
    assert expected in str(caught.value)
    assert images.step_index == step
    if before is not None:
        assert torch.equal(images.current.detach(), before)
    assert torch.isfinite(images.images).all()
    assert [len(v) for v in images.losses.values()] == [step] * 3
    assert_same(finish(images), uninterrupted)


@pytest.mark.parametrize('where', ['attention', 'before update', 'after update'])
@pytest.mark.parametrize('step', [0, 2, 3, 5, 6, 11])
def test_interrupted_step(where, step, uninterrupted, monkeypatch):
    """Ctrl-C strikes anywhere; the state is then that of the last whole step."""
    update = torch.optim.Adam.step
    armed = False

    def run(images):
        if armed and where == 'attention':
            raise KeyboardInterrupt
        return attention(images)

    def interrupted_update(self, *args, **kwargs):
        if armed and where == 'before update':
            raise KeyboardInterrupt
        result = update(self, *args, **kwargs)
        if armed and where == 'after update':
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.optim.Adam, 'step', interrupted_update)
    images = synthesizer(run=run)
    for _ in range(step):
        images.step()
    armed = True
    with pytest.raises(KeyboardInterrupt):
        images.step()
    armed = False
    state = through_file(images.state_dict())
    assert state['step_index'] == step
    restored = synthesizer(seed=9)
    restored.load_state_dict(state)
    assert_same(finish(restored), uninterrupted)
    assert_same(finish(images), uninterrupted)


# State


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('steps', range(TOTAL + 1))
def test_restored_run_gives_the_same_bits(steps, uninterrupted):
    """From the start, within a batch, between phases and batches, at the end."""
    first = synthesizer()
    for _ in range(steps):
        first.step()
    second = synthesizer(seed=123)
    second.load_state_dict(through_file(first.state_dict()))
    assert second.step_index == steps
    assert second.done == (steps == TOTAL)
    assert_same(finish(second), uninterrupted)


@pytest.mark.parametrize('steps', [0, 2, 3, 6, 7, TOTAL])
def test_state_is_a_copy(steps, uninterrupted):
    """Later steps of either run do not reach into it."""
    first = synthesizer()
    for _ in range(steps):
        first.step()
    state = first.state_dict()
    kept = copy.deepcopy(state)
    assert_same(finish(first), uninterrupted)
    for _ in range(2):
        second = synthesizer(seed=5)
        second.load_state_dict(state)
        assert_same(finish(second), uninterrupted)
    assert_equal_trees(state, kept)


def assert_equal_trees(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_trees(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_equal_trees(*pair)
    else:
        assert one == other
