# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The game, on the small network of the student's tests and on a Swin."""
import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer
from test_learner import changed, network, quantized, ranges, run_taps, tensors

import psaq_mm
from psaq_mm import evolution
from psaq_mm.adapters import TapRecord
from psaq_mm.errors import UserError
from psaq_mm.evolution import Evolver, StudentLearner, check_evolution
from psaq_mm.evolution.image_buffer import ImageBuffer
from psaq_mm.ops import named_quant_ops
from psaq_mm.prior import AttentionRecord, TeacherRecord, derived_seed, uniform
from psaq_mm.quantization import QuantSpec
from psaq_mm.recipe import EvolutionSettings, QuantizationSettings, SynthesisSettings
from psaq_mm.synthesis import learning_rate_factor
from psaq_mm.synthesis.sample_step import augment, prior_losses

LOWER, UPPER = torch.full((1, 3, 1, 1), -2.), torch.full((1, 3, 1, 1), 2.5)
PRIORS = dict(patch_similarity=dict(type='PatchSimilarityPrior'),
              total_variation=dict(type='TotalVariationPrior', weight=0.004))
SYNTHESIS = dict(image_size=28, shifts=(15, 30), warmup=0.5, priors=PRIORS)
# Two rounds of two steps of the images and three of the student.
SMALL = dict(rounds=2, sample_steps=2, student_steps=3, batch_size=2, weight_lr=0.01,
             range_lr=1e-2, buffer_size=2, patience=5, zoom=1., contrast=1.)
TOTAL = 10


def first_images(count=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 28, 28, generator=generator).clamp(-2., 2.5)


def record_of(images):
    """A stand-in for attention: the windows' pixels."""
    windows = images.unfold(2, 7, 7).unfold(3, 7, 7)  # (B, 3, rows, columns, 7, 7)
    tokens = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, 49, 1, 3)
    return TeacherRecord(attention=[AttentionRecord(output=tokens)])


def game(seed=0, watch=lambda who: None, spoil=lambda who, taps: taps, synthesis=(),
         cls=Evolver, **rules):
    """A game on the small network; ``watch`` hears who runs, ``spoil`` may
    change the taps."""
    net, images = network(), first_images()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    model = quantized(net, images)

    def teacher(batch):
        watch('teacher')
        return record_of(batch), spoil('teacher', run_taps(net, batch))

    def forward(batch, regions):
        watch('student')
        return spoil('student', run_taps(model, batch))

    settings = EvolutionSettings(**{**SMALL, **rules})
    return cls(settings, SynthesisSettings.from_dict({**SYNTHESIS, **dict(synthesis)}), teacher,
               StudentLearner(model, forward, settings), images, LOWER, UPPER, seed)


def play(evolver, count=None):
    steps = 0
    while not evolver.done and steps != count:
        evolver.step()
        steps += 1
    return evolver


@pytest.fixture(scope='module')
def uninterrupted():
    return play(game())


def assert_same(one, other):
    assert one.step_index == other.step_index == TOTAL
    assert one.losses == other.losses
    assert not changed(tensors(one.student.model), tensors(other.student.model))
    assert not changed(ranges(one.student.model), ranges(other.student.model))
    assert torch.equal(one.buffer.images, other.buffer.images)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert_equal_trees(one.best, other.best)


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


# The order of play


def test_game(uninterrupted):
    lengths = {name: len(values) for name, values in uninterrupted.losses.items()}
    sample = ('patch_similarity', 'total_variation', 'total', 'discrepancy',
              'adversarial_factor')
    assert lengths == {**{f'sample/{name}': 4 for name in sample}, 'student/discrepancy': 6,
                       'round/discrepancy': 3}
    assert uninterrupted.done and uninterrupted.total_steps == TOTAL
    assert not uninterrupted.stopped and uninterrupted.consistent


def test_losses_of_each_step():
    evolver, runs = game(), []
    while not evolver.done:
        before = evolver.step_index
        losses = evolver.step()
        assert evolver.step_index == before + 1
        runs.append(sorted(losses))
    sample = ['adversarial_factor', 'discrepancy', 'patch_similarity', 'total', 'total_variation']
    of_a_round = [sample] * 2 + [['discrepancy']] * 2 + [['discrepancy', 'round']]
    assert runs == 2 * of_a_round


def test_who_runs():
    """One pass of each a step, and the measurement of three images in two
    batches before the first round and at the end of each."""
    calls = []
    play(game(watch=calls.append))
    both = ['teacher', 'student']
    assert calls == 2 * both + 2 * (5 * both + 2 * both)


def test_round_is_measured_on_the_first_images():
    def expected(model):
        with torch.no_grad():
            teacher, student = (run_taps(m, first_images()).taps for m in (network(), model))
        return float(sum((teacher[tap] - student[tap]).abs().flatten(1).mean(1)
                         / (teacher[tap].abs().flatten(1).mean(1) + 1e-6)
                         for tap in teacher).mean())

    evolver = game()
    as_calibrated = expected(evolver.student.model)
    play(evolver, 5)
    assert evolver.losses['round/discrepancy'] == [
        pytest.approx(as_calibrated), pytest.approx(expected(evolver.student.model))]
    assert evolver.measure() == evolver.losses['round/discrepancy'][1]


def test_images_of_each_round():
    evolver, rounds = game(rounds=3, buffer_size=4), []
    while not evolver.done:
        evolver.step()
        if evolver.step_index % 5 == 2:
            rounds.append(evolver.buffer.newest)
            assert evolver.pixels is None
            expected = torch.cat([first_images(), *rounds[-2:]])
            assert torch.equal(evolver.buffer.images, expected)
    assert len(rounds) == 3
    for images in rounds:
        assert images.shape == (2, 3, 28, 28) and not images.requires_grad
        assert images.min() >= -2. and images.max() <= 2.5
        start = (images[:, None] - first_images()[None]).abs().flatten(2).amax(2)
        assert (start.min(1).values > 1e-3).all()


def test_images_stay_in_the_valid_range():
    images = play(game(sample_lr=100.), 2).buffer.newest
    assert images.min() == -2. and images.max() == 2.5  # so high a rate reaches the ends


def test_learning_rates():
    """The images' rise and fall in each round; the student's falls through all, each layer's
    from a fraction of the step between two integers of its weight."""
    evolver, of_images, of_student = game(sample_lr=0.2, sample_steps=4), [], []
    steps = [float(op.weight_quantizer.scale.mean())
             for _, op in named_quant_ops(evolver.student.model)]
    while not evolver.done:
        held = evolver.pixels
        evolver.step()
        held = evolver.pixels or held
        if (evolver.step_index - 1) % 7 < 4:
            of_images.append(held.optimizer.param_groups[0]['lr'])
        else:
            of_student.append([group['lr'] for group in
                               evolver.student.optimizer.param_groups])
    assert of_images == pytest.approx(2 * [0.1, 0.2, 0.2, 0.1])
    factors = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert of_student == [pytest.approx([*(0.01 * f * step for step in steps), 1e-2 * f])
                          for f in factors]


def test_only_one_side_moves():
    evolver = game(sample_steps=0)
    play(evolver)
    assert torch.equal(evolver.buffer.images, first_images())
    assert set(evolver.losses) == {'student/discrepancy', 'round/discrepancy'}
    assert evolver.losses['student/discrepancy'][0] > evolver.losses['student/discrepancy'][-1]
    evolver = game(student_steps=0)
    before = tensors(evolver.student.model), ranges(evolver.student.model)
    play(evolver).finish()
    assert not changed(before[0], tensors(evolver.student.model))
    for name, value in ranges(evolver.student.model).items():
        torch.testing.assert_close(value, before[1][name], rtol=1e-6, atol=0.)
    assert len(set(evolver.losses['round/discrepancy'])) == 1


@pytest.mark.parametrize('fraction, new', [(0.5, 2), (1., 4), (0.25, 1)])
def test_batches_of_the_student(fraction, new):
    """So many of the newest images first, then of all there are."""
    evolver = game(rounds=1, student_steps=6, batch_size=4, buffer_size=4,
                   new_fraction=fraction, synthesis=dict(shifts=(0, ), flip=0.))
    run, batches = evolver.teacher, []
    evolver.teacher = lambda batch: (batches.append(batch.clone()), run(batch))[1]
    play(evolver)

    def among(image, images):
        return bool((image == images).flatten(1).all(1).any())

    learned_from = batches[3:9]  # after one measurement and the images' steps, before the next
    for batch in learned_from:
        assert len(batch) == 4
        assert all(among(image, evolver.buffer.newest) for image in batch[:new])
        assert all(among(image, evolver.buffer.images) for image in batch[new:])
    rest = torch.cat([batch[new:] for batch in learned_from])
    assert not len(rest) or any(among(image, first_images()) for image in rest)


def test_views_of_the_student():
    """It learns from parts, magnified, and from paler images; D is measured on the images."""
    rules = dict(rounds=1, sample_steps=0, student_steps=4, batch_size=2,
                 synthesis=dict(shifts=(0, ), flip=0.))

    def batches(**views):
        evolver, seen = game(**rules, **views), []
        run = evolver.teacher
        evolver.teacher = lambda batch: (seen.append(batch.clone()), run(batch))[1]
        play(evolver)
        assert torch.equal(evolver.buffer.images, first_images())
        return seen[2:6], seen[6:]

    plain, measured = batches()
    for views in (dict(zoom=3.), dict(contrast=0.2), dict(zoom=3., contrast=0.2)):
        learned, after = batches(**views)
        assert all(torch.equal(a, b) for a, b in zip(measured, after)) and len(after) == 2
        for a, b in zip(learned, plain):
            assert a.shape == b.shape and not torch.equal(a, b)
            assert a.min() >= -2 and a.max() <= 2.5
        spread = [sum(float(x.std((2, 3)).mean()) for x in xs) for xs in (learned, plain)]
        if 'contrast' in views:
            assert spread[0] < 0.9 * spread[1]


def test_no_rounds():
    evolver = game(rounds=0)
    assert evolver.done and evolver.total_steps == 0


def test_seed(uninterrupted):
    assert_same(play(game(seed=0)), uninterrupted)
    other = play(game(seed=1))
    assert other.losses['sample/total'] != uninterrupted.losses['sample/total']


def test_other_random_numbers_do_not_matter(uninterrupted):
    evolver = game()
    before = torch.get_rng_state()
    evolver.step()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():  # nor whether gradients are off around it
        play(evolver)
    assert_same(evolver, uninterrupted)


# What the images do


def test_without_a_competitor_images_descend_on_the_prior_alone():
    """With torch's Adam and the prior, and no student at all."""
    calls = []
    evolver = play(game(seed=4, watch=calls.append, adversarial_fraction=0, rounds=1,
                        student_steps=0, sample_steps=5, sample_lr=0.1), 4)
    assert calls == 2 * ['teacher', 'student'] + 4 * ['teacher']
    assert set(evolver.losses) == {*(f'sample/{n}' for n in (*PRIORS, 'total')),
                                   'round/discrepancy'}

    synthesis, generator = SynthesisSettings(**SYNTHESIS), torch.Generator().manual_seed(4)
    images = ImageBuffer(first_images(), 2).draw(2, 0., generator).requires_grad_(True)
    seeds = torch.randint(2**63 - 1, (2, ), generator=generator).tolist()
    optimizer = torch.optim.Adam([images], betas=synthesis.betas)
    terms, totals = synthesis.build_priors(), []
    for step in range(4):
        generators = [torch.Generator().manual_seed(derived_seed(s, step)) for s in seeds]
        seen = augment(images, synthesis, 30, uniform(generators, 3))
        loss = prior_losses(terms, seen, record_of(seen), generators, step)['total']
        optimizer.param_groups[0]['lr'] = 0.1 * learning_rate_factor(step, 5, 0.5)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(-2., 2.5)
        totals.append(float(loss.detach().mean()))
    assert evolver.losses['sample/total'] == totals
    assert torch.equal(evolver.pixels.images, images)


def test_a_weight_of_zero_is_no_competitor():
    rules = dict(rounds=1, student_steps=0)
    one = play(game(adversarial_fraction=0, **rules))
    other = play(game(adversarial_weight=0, **rules))
    assert torch.equal(one.buffer.newest, other.buffer.newest)
    assert not torch.equal(one.buffer.newest, play(game(**rules)).buffer.newest)


def test_competing_images_are_where_the_student_fails():
    """The larger its share, the larger D of the images, and the prior's loss."""
    distances, totals = [], []
    for fraction in (0, 1., None):
        evolver = play(game(rounds=1, student_steps=0, sample_steps=15, batch_size=3,
                            adversarial_fraction=fraction, adversarial_weight=100.,
                            synthesis=dict(shifts=(0, ), flip=0.)))
        images = evolver.buffer.newest
        with torch.no_grad():
            taps = run_taps(network(), images)
            distances.append(float(evolver.student.discrepancy(taps, images).mean()))
        totals.append(evolver.losses['sample/total'][-1])
    assert distances[0] * 1.02 < distances[1] * 1.01 < distances[2]
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize('fraction, low, high', [(None, 1., 1.), (1e6, 1., 1.),
                                                 (1e-6, 1e-9, 0.999)])
def test_adversarial_factor(fraction, low, high):
    evolver = play(game(adversarial_fraction=fraction, rounds=1))
    assert all(low <= value <= high for value in evolver.losses['sample/adversarial_factor'])


def test_gradient_of_a_competing_step():
    """The first step of Adam shows its sign: that of prior - log(1 + D)."""
    moved = {}
    for fraction in (0, None):
        evolver = game(adversarial_fraction=fraction, adversarial_weight=3., sample_steps=10,
                       batch_size=3, synthesis=dict(shifts=(0, ), flip=0., warmup=0.))
        evolver.step()
        moved[fraction], seeds = evolver.pixels.images.detach(), evolver.pixels.seeds
    evolver = game(batch_size=3)
    start = evolver.buffer.draw(3, 0., evolver.generator).requires_grad_(True)
    terms = evolver.synthesis.build_priors()
    generators = [torch.Generator().manual_seed(derived_seed(seed, 0)) for seed in seeds]
    uniform(generators, 3)  # flip and roll
    prior = prior_losses(terms, start, record_of(start), generators, 0)['total']
    distance = evolver.student.discrepancy(run_taps(network(), start), start)
    gradient, = torch.autograd.grad((prior - 3. * torch.log1p(distance)).sum(), start)
    inside = (start.detach().abs() < 1.9) & (gradient.abs() > 1e-6)
    assert inside.float().mean() > 0.8
    step = (moved[None] - start.detach())[inside]
    torch.testing.assert_close(step, -0.05 * gradient[inside].sign(), rtol=0.02, atol=1e-4)
    assert not torch.equal(moved[0], moved[None])


# The end of a round


class Scripted(Evolver):
    """Measures what a list says, and remembers the student of each round."""

    script = ()

    def measure(self):
        index = len(self.losses.get('round/discrepancy', ()))
        self.__dict__.setdefault('seen', []).append(
            (tensors(self.student.model), ranges(self.student.model)))
        return self.script[index]


@pytest.mark.parametrize('patience, script, measured, best', [
    (1, [3., 2., 1.], 3, 2), (1, [3., 4., 1.], 2, 0), (2, [3., 4., 5., 1.], 3, 0),
    (2, [3., 2., 4., 5., 1.], 4, 1), (2, [3., 4., 3.5, 4., 3.], 5, 4), (1, [1., 1., 1.], 3, 2),
    (2, [1., 2., 2., 3.], 4, 0), (3, [1., 2., 3., 4., 0.], 4, 0), (3, [1., 2., 3.], 3, 0)])
def test_early_stop_keeps_the_best_student(patience, script, measured, best):
    """The first value is of the calibrated student: it is kept if no round is better."""
    evolver = game(cls=Scripted, rounds=len(script) - 1, patience=patience, sample_steps=0,
                   student_steps=2)
    evolver.script = script
    calibrated = tensors(evolver.student.model), ranges(evolver.student.model)
    play(evolver)
    assert evolver.losses['round/discrepancy'] == script[:measured]
    assert evolver.stopped is (measured < len(script))
    assert evolver.done and len(evolver.seen) == measured
    assert evolver.best_round == best
    evolver.finish()
    for now, then in zip((tensors, ranges), evolver.seen[best]):
        assert not changed(then, now(evolver.student.model))
    if best != measured - 1:
        assert changed(evolver.seen[-1][0], tensors(evolver.student.model))
    if best == 0:
        assert not changed(calibrated[0], tensors(evolver.student.model))


@pytest.mark.parametrize('script, best', [([3., math.nan], 0), ([3., 2., math.inf], 1),
                                          ([3., 4., math.nan], 0)])
def test_round_that_is_not_finite(script, best):
    """The student is then the best one so far, and the state is not to be saved."""
    evolver = game(cls=Scripted, rounds=3, sample_steps=0, student_steps=2)
    evolver.script = script
    last = len(script) - 1
    with pytest.raises(FloatingPointError, match=f'^evolution: after step {2 * last} the '
                       f'discrepancy is {script[-1]:g}; lower evolution.weight_lr or range_lr$'):
        play(evolver)
    assert not evolver.consistent
    for now, then in zip((tensors, ranges), evolver.seen[best]):
        assert not changed(then, now(evolver.student.model))


def test_calibrated_student_that_is_not_finite():
    evolver = game(cls=Scripted)
    evolver.script = [math.nan]
    before = state_of(evolver)
    with pytest.raises(FloatingPointError, match=r'^evolution, step 0 \(round 1\): the '
                       'discrepancy is nan; nothing was learned yet'):
        evolver.step()
    assert evolver.consistent
    assert_equal_trees(state_of(evolver), before)


def test_best_student_of_a_real_game():
    evolver = play(game(rounds=6, student_steps=4, weight_lr=0.3, range_lr=0.1, patience=9))
    values = evolver.losses['round/discrepancy']
    assert values[-1] != min(values)  # such rates make it worse at some time
    evolver.finish()
    assert evolver.measure() == min(values)
    learned = [*evolver.student.weights, *evolver.student.ranges.tensors]
    assert not any(tensor.requires_grad for tensor in learned)


def test_student_gets_better():
    evolver = game(rounds=4, student_steps=10)
    before = evolver.measure()
    play(evolver).finish()
    assert evolver.measure() < 0.9 * before
    assert evolver.losses['round/discrepancy'][-1] < before


# What goes wrong in a step


def state_of(evolver):
    return copy.deepcopy(dict(evolver.state_dict(), tensors=tensors(evolver.student.model),
                              ranges=ranges(evolver.student.model)))


@pytest.mark.parametrize('who', ['teacher', 'student'])
@pytest.mark.parametrize('step', [0, 1, 2, 4, 5, 9])
def test_discrepancy_that_is_not_finite(step, who, uninterrupted):
    """It is named, the state is that of the step before, and a second try
    continues as if nothing had been."""
    armed = False

    def spoil(name, record):
        if armed and name == who:
            return TapRecord({tap: value * math.nan for tap, value in record.taps.items()})
        return record

    evolver = play(game(spoil=spoil), step)
    before, armed = state_of(evolver), True
    with pytest.raises(FloatingPointError, match=rf'^evolution, step {step} \(round '
                       rf'{step // 5 + 1}\): .*not finite|the discrepancy is nan'):
        evolver.step()
    armed = False
    assert evolver.consistent
    assert_equal_trees(state_of(evolver), before)
    assert_same(play(evolver), uninterrupted)


@pytest.mark.parametrize('where', ['teacher', 'student', 'before update', 'after update'])
@pytest.mark.parametrize('step', [0, 1, 2, 4, 5, 9])
def test_interrupted_step(step, where, uninterrupted, monkeypatch):
    """Ctrl-C strikes anywhere: the state is then that of the last whole step,
    or said to be none."""
    update, armed = torch.optim.Adam.step, False

    def watch(who):
        if armed and who == where:
            raise KeyboardInterrupt

    def interrupted_update(self, *args, **kwargs):
        if armed and where == 'before update':
            raise KeyboardInterrupt
        result = update(self, *args, **kwargs)
        if armed and where == 'after update':
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.optim.Adam, 'step', interrupted_update)
    evolver = play(game(watch=watch), step)
    armed = True
    with pytest.raises(KeyboardInterrupt):
        evolver.step()
    armed = False
    if where.endswith('update'):
        assert not evolver.consistent
        return
    assert evolver.consistent
    restored = game(seed=9)
    restored.load_state_dict(through_file(evolver.state_dict()))
    assert_same(play(restored), uninterrupted)
    assert_same(play(evolver), uninterrupted)


@pytest.mark.parametrize('error', [KeyboardInterrupt, FloatingPointError])
def test_first_step_fails_after_its_measurement(error, uninterrupted):
    """The value of the calibrated student is not there twice when the step is taken again."""
    calls = []

    def watch(who):
        calls.append(who)
        if len(calls) == 5:  # two batches were measured
            raise error

    evolver = game(watch=watch)
    before = state_of(evolver)
    with pytest.raises(error):
        evolver.step()
    assert len(calls) == 5 and evolver.consistent
    assert_equal_trees(state_of(evolver), before)
    assert_same(play(evolver), uninterrupted)


# State


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize('steps', range(TOTAL + 1))
def test_restored_game_gives_the_same_bits(steps, uninterrupted):
    first = play(game(), steps)
    second = game(seed=123)
    second.load_state_dict(through_file(first.state_dict()))
    assert second.step_index == steps
    assert second.done == (steps == TOTAL)
    assert_same(play(second), uninterrupted)
    for evolver in (first, second):
        play(evolver).finish()
    assert not changed(ranges(first.student.model), ranges(second.student.model))


@pytest.mark.parametrize('steps', [0, 1, 2, 4, 5, 6, TOTAL])
def test_state_is_a_copy(steps, uninterrupted):
    """Later steps of either game do not reach into it."""
    first = play(game(), steps)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    assert_same(play(first), uninterrupted)
    for _ in range(2):
        second = game(seed=5)
        second.load_state_dict(state)
        assert_same(play(second), uninterrupted)
    assert_equal_trees(state, kept)


# Through the interface, on a Swin


PRIOR_56 = SynthesisSettings(image_size=56, priors=PRIORS)
RULES = EvolutionSettings(rounds=2, sample_steps=2, student_steps=4, batch_size=2,
                          weight_lr=0.01, range_lr=1e-2, zoom=1., contrast=1.)


def swin():
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = SwinTransformer(embed_dims=8, depths=(1, 2), num_heads=(1, 2), strides=(4, 2),
                                out_indices=(0, 1), drop_path_rate=0.3)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval()
    return model


@pytest.fixture(scope='module')
def swin_images():
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)


@pytest.fixture
def pair(swin_images):
    return swin_pair(swin_images)


def swin_pair(images):
    teacher = swin()
    settings = QuantizationSettings.from_dict(dict(
        weight=dict(bits=4, rounding='nearest'), activation=dict(bits=4, margin=0.), roles={},
        overrides={}, channel_limit=None))
    return psaq_mm.calibrate(psaq_mm.prepare(teacher, settings), images), teacher


def distance(student, teacher, images):
    with torch.no_grad():
        return sum(float((t - s).abs().mean() / t.abs().mean())
                   for t, s in zip(teacher(images), student(images)))


def own_parameters(model):
    """Names of weights and biases of the layers whose weight is quantized."""
    return {f'{name}.{key}' for name, op in named_quant_ops(model) if 'weight' in op.quantizers
            for key, value in op._parameters.items() if value is not None}


def test_evolve(pair, swin_images):
    student, teacher = pair
    before, losses = distance(student, teacher, swin_images), []
    assert psaq_mm.evolve(student, teacher, swin_images, replace(RULES, student_steps=25),
                          PRIOR_56, progress=losses.append) is student
    assert distance(student, teacher, swin_images) < 0.9 * before
    assert len(losses) == 2 * 27 and losses[-1]['round'] < before


@pytest.mark.parametrize('learn', ['ranges', 'weights', 'both'])
def test_evolve_learns_what_it_says(learn, pair, swin_images):
    student, teacher = pair
    before, ranges_before = tensors(student), ranges(student)
    psaq_mm.evolve(student, teacher, swin_images, replace(RULES, learn=learn), PRIOR_56)
    moved, moved_ranges = changed(before, tensors(student)), changed(ranges_before,
                                                                     ranges(student))
    own = own_parameters(student)
    for stays in ('norm', 'relative_position_bias_table'):
        names = {name for name in before if stays in name}
        assert names and not names & own
    assert moved == (set() if learn == 'ranges' else own)
    scales = {name for name in ranges_before if name.endswith('.scale')}
    if learn == 'weights':
        assert not moved_ranges
    else:
        assert scales <= moved_ranges
        assert not any(n.endswith('weight.zero_point') for n in moved_ranges)
    # What was learned is noted where it is: later steps leave it.
    for name, op in named_quant_ops(student):
        assert op.weight_settled is (f'{name}.weight' in moved)
        assert all(q.learned is (learn != 'weights') for q in op.quantizers.values())


def test_what_was_not_kept_is_not_noted(pair, swin_images):
    """If no round was better, the student is as calibrated."""
    student, teacher = pair
    before = tensors(student)
    rules = replace(RULES, weight_lr=1., range_lr=1., patience=1, sample_steps=0)
    psaq_mm.evolve(student, teacher, swin_images, rules, PRIOR_56)
    assert not changed(before, tensors(student))
    for _, op in named_quant_ops(student):
        assert not op.weight_settled and not any(q.learned for q in op.quantizers.values())


def test_interrupted_game_is_noted(pair, swin_images):
    """What the student holds then was learned all the same."""
    student, teacher = pair
    with pytest.raises(KeyboardInterrupt), \
            evolution.evolver(student, teacher, swin_images, RULES, PRIOR_56) as evolver:
        play(evolver, 4)
        raise KeyboardInterrupt
    for _, op in named_quant_ops(student):
        assert op.weight_settled is ('weight' in op.quantizers)
        assert all(q.learned for q in op.quantizers.values())


def test_models_are_as_before(pair, swin_images):
    student, teacher = pair
    teacher.train()
    student.train()
    student.patch_embed.eval()
    for model in pair:
        model.stages[0].blocks[0].norm1.weight.requires_grad_(False)
        model.stages[0].blocks[0].attn.w_msa.qkv.weight.requires_grad_(False)
    weights = {k: v.clone() for k, v in teacher.state_dict().items()}
    modes = {m: m.training for model in pair for m in model.modules()}
    asked = {p: p.requires_grad for model in pair for p in model.parameters()}
    with evolution.evolver(student, teacher, swin_images, RULES, PRIOR_56) as evolver:
        assert not any(m.training for m in modes)
        assert not any(p.requires_grad for p in teacher.parameters())
        play(evolver)
        assert not any(p.requires_grad for p in teacher.parameters())
    assert {m: m.training for model in pair for m in model.modules()} == modes
    assert all(p.requires_grad is value and p.grad is None for p, value in asked.items())
    assert all(torch.equal(value, weights[k]) for k, value in teacher.state_dict().items())
    assert not any(t.requires_grad for t in student.buffers())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modes)


def test_game_that_fails(pair, swin_images):
    """The student is unchanged, and the models are as before."""
    student, teacher = pair
    for model in pair:
        model.stages[1].blocks[0].norm2.weight.data[3] = math.inf
    teacher.train()
    before, ranges_before = tensors(student), ranges(student)
    with pytest.raises(FloatingPointError, match=r'^evolution, step 0 \(round 1\): '):
        psaq_mm.evolve(student, teacher, swin_images, RULES, PRIOR_56)
    assert teacher.training and not student.training
    assert all(p.requires_grad for p in (*teacher.parameters(), *student.parameters()))
    assert not changed(before, tensors(student))
    for name, value in ranges(student).items():
        torch.testing.assert_close(value, ranges_before[name], rtol=1e-6, atol=0.)


@pytest.mark.parametrize('steps', [0, 4, 8])
def test_restored_game_on_a_swin(steps, swin_images):
    games = [swin_pair(swin_images) for _ in range(2)]
    with evolution.evolver(*games[0], swin_images, RULES, PRIOR_56) as first:
        state = through_file(play(first, steps).state_dict())
        play(first).finish()
    with evolution.evolver(*games[1], swin_images, RULES, PRIOR_56, seed=7) as second:
        second.load_state_dict(state)
        play(second).finish()
    assert second.losses == first.losses
    assert not changed(tensors(games[0][0]), tensors(games[1][0]))
    assert not changed(ranges(games[0][0]), ranges(games[1][0]))


def test_evolved_student_is_saved(pair, swin_images, tmp_path):
    student, teacher = pair
    psaq_mm.evolve(student, teacher, swin_images, RULES, PRIOR_56)
    psaq_mm.save(student, tmp_path / 'q.pth')
    loaded = psaq_mm.load(swin(), tmp_path / 'q.pth')
    with torch.no_grad():
        for one, other in zip(student(swin_images), loaded(swin_images)):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_user_errors(pair, swin_images):
    student, teacher = pair
    prepared = psaq_mm.prepare(swin(), QuantizationSettings(channel_limit=None))
    for model, message in (
            (swin(), '^psaq_mm.evolve needs a student, .*: call psaq_mm.prepare first$'),
            (prepared, '^psaq_mm.evolve needs a calibrated student, and patch_embed.projection '
                       r'\((input|weight)\) has no range: call psaq_mm.calibrate first$')):
        with pytest.raises(UserError, match=message):
            psaq_mm.evolve(model, teacher, swin_images, RULES, PRIOR_56)
    with pytest.raises(UserError, match='evolution.taps has weights for none of the groups of '
                                        'this model: backbone'):
        psaq_mm.evolve(student, teacher, swin_images, replace(RULES, taps=dict(logits=1.)))
    with pytest.raises(UserError, match=r'^psaq_mm.evolve: evolution.rounds is 0, .* rounds such '
                                        'as 5, or leave this step out$'):
        psaq_mm.evolve(student, teacher, swin_images, EvolutionSettings())
    with pytest.raises(UserError, match=r'^psaq_mm.evolve \(as teacher\) needs the float model'):
        psaq_mm.evolve(student, student, swin_images, RULES)
    for images in (swin_images[0], swin_images[:0], swin_images.byte(), None):
        with pytest.raises(UserError, match='^psaq_mm.evolve needs float32 images of shape'):
            psaq_mm.evolve(student, teacher, images, RULES)


def test_teacher_of_another_student(pair, swin_images):
    student, teacher = pair
    before = tensors(student)
    with torch.no_grad():
        teacher.stages[1].blocks[0].norm1.bias[3] += 0.1
    with pytest.raises(UserError, match='^the teacher is not the float model of the student: '
                                        r'stages.1.blocks.0.norm1.bias differs; psaq_mm.equalize '
                                        'comes before psaq_mm.prepare'):
        psaq_mm.evolve(student, teacher, swin_images, RULES)
    del teacher.norm0
    other = swin()
    del other.norm1
    with pytest.raises(UserError, match=': norm1.weight is missing; '):
        psaq_mm.evolve(student, other, swin_images, RULES)
    assert not changed(before, tensors(student))


def test_student_may_learn_on(pair, swin_images):
    """Its weights are no longer the teacher's, and it is still its student."""
    student, teacher = pair
    for seed in (2, 3):
        before = tensors(student)
        psaq_mm.evolve(student, teacher, swin_images, RULES, PRIOR_56, seed=seed)
        assert changed(before, tensors(student)) == own_parameters(student)


def test_check_evolution():
    weights, none = {'x': dict(weight=QuantSpec())}, {'x': dict(input=QuantSpec())}
    check_evolution(swin(), EvolutionSettings(rounds=1), none)
    check_evolution(swin(), EvolutionSettings(rounds=1, learn='weights'), weights)
    check_evolution(swin(), EvolutionSettings(rounds=0, taps=dict(logits=1.)), weights)
    with pytest.raises(UserError, match='weights for none of the groups'):
        check_evolution(swin(), EvolutionSettings(rounds=1, taps=dict(logits=1.)), weights)
    with pytest.raises(UserError, match="^evolution.learn='weights', but no weight is quantized"):
        check_evolution(swin(), EvolutionSettings(rounds=1, learn='weights'), none)
