# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Two processes play the game that one plays alone, each with half of every batch."""
import time

import pytest
import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object
from own_process import start_two
from test_learner import changed, network, quantized, ranges, run_taps, tensors
from torch import nn

from psaq_mm.errors import UserError
from psaq_mm.evolution import Evolver, StudentLearner
from psaq_mm.ops import apply_plan
from psaq_mm.prior import TeacherRecord
from psaq_mm.quantization import QuantSpec
from psaq_mm.quantization.observers import MinMaxObserver
from psaq_mm.recipe import EvolutionSettings, SynthesisSettings
from psaq_mm.registry import OBSERVERS
from psaq_mm.student import calibrate_ranges, equalize_channels
from psaq_mm.synthesis import Synthesizer, share_of

RULES = dict(rounds=2, student_steps=6, batch_size=4, weight_lr=0.01, range_lr=1e-2)
ALONE = dict(RULES, sample_steps=0, zoom=3., contrast=0.2)
TOGETHER = dict(RULES, sample_steps=3)


def game(cls=Evolver, **rules):
    net = network()
    images = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(2)).clamp(-2., 2.)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    model = quantized(net, images)
    settings = EvolutionSettings(**rules)
    synthesis = SynthesisSettings(
        image_size=28, priors=dict(total_variation=dict(type='TotalVariationPrior')))
    student = StudentLearner(model, lambda batch, regions: run_taps(model, batch), settings)
    return cls(settings, synthesis, lambda batch: (TeacherRecord(), run_taps(net, batch)),
               student, images, torch.full((1, 3, 1, 1), -2.), torch.full((1, 3, 1, 1), 2.))


def played(**rules):
    """What a game ends with."""
    evolver = game(**rules)
    calibrated = ranges(evolver.student.model)
    while not evolver.done:
        evolver.step()
    model = evolver.student.model
    return dict(calibrated=calibrated, ranges=ranges(model), tensors=tensors(model),
                images=evolver.buffer.images, generator=evolver.generator.get_state(),
                rounds=evolver.losses['round/discrepancy'],
                losses=evolver.losses['student/discrepancy'])


@OBSERVERS.register_module(force=True)
class NewestObserver(MinMaxObserver):
    """The range of what came last: which that is must not depend on the process."""

    def update(self, rows):
        self.lower, self.upper = rows.amin(1), rows.amax(1)

    def merge(self, others):
        for other in others:
            self.lower, self.upper = other.lower, other.upper


def ranges_by_order():
    """Ranges that depend on the order in which the processes' parts are merged."""
    net = network()
    apply_plan(net, {'0': dict(input=QuantSpec(8, False,
                                               observer=dict(type='NewestObserver')))})
    images = torch.stack([torch.full((3, 28, 28), i + 1.) for i in range(4)])
    calibrate_ranges(net, images, net)
    return ranges(net)


def equalized():
    """A norm and its reader, after the scale of wide channels has moved."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 2))
    tokens = torch.randn(4, 60, 9) * torch.tensor([1., 30., 1., 1., 4., 1., 1., 9., 1.])
    equalize_channels(net, {'0': '1'}, tokens, net, 1.5)
    return net.state_dict()


def rotated():
    """A layer whose input is rotated about its mean over the images."""
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(12, 3))
    apply_plan(net, {'0': dict(input=QuantSpec(8, False, rotate=True))})
    calibrate_ranges(net, torch.randn(5, 7, 12) + torch.arange(5).view(-1, 1, 1), net, 2)
    return net.state_dict()


class Apart(Evolver):
    """The second process has measured otherwise, and its first sample step fails."""

    fails = False

    def measure(self):
        return super().measure() + (self.rank and 1.)

    def _sample_gradient(self, pixels):
        if self.fails and self.rank:
            raise FloatingPointError('of the second')
        return super()._sample_gradient(pixels)


def measured_apart():
    """What is kept of a measurement that was rounded otherwise elsewhere."""
    evolver = game(Apart, **TOGETHER)
    own = evolver.measure()
    evolver.step()
    return own, evolver.losses['round/discrepancy']


def failed_apart():
    """What a process hears of another's loss; its state is that of the step before."""
    evolver = game(Apart, **TOGETHER)
    evolver.fails = True
    before = evolver.generator.get_state()
    try:
        evolver.step()
    except FloatingPointError as error:
        return str(error), evolver.consistent and torch.equal(before,
                                                              evolver.generator.get_state())


def synthesized(rank=0, world=1):
    """The images of all processes, made in batches of as many images as there are processes."""
    settings = SynthesisSettings(num_images=5, batch_size=world, image_size=28, steps=3,
                                 priors=dict(total_variation=dict(type='TotalVariationPrior')))
    images = Synthesizer(settings, None, torch.full((1, 3, 1, 1), -2.),
                         torch.full((1, 3, 1, 1), 2.), indices=share_of(5, rank, world))
    while not images.done:
        images.step()
    return torch.cat(all_gather_object(images.images))


def one_of(rank, world, folder):
    """What one of several processes does."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank,
                            world_size=world)
    try:
        results = dict(alone=played(**ALONE), together=played(**TOGETHER),
                       synthesized=synthesized(rank, world))
        try:
            game(**dict(ALONE, batch_size=3))
        except UserError as error:
            results['error'] = str(error)
        game(**dict(ALONE, rounds=0, batch_size=3))  # nothing to split
        results['by order'] = ranges_by_order()
        results['equalized'] = equalized()
        results['rotated'] = rotated()
        results['measured'], results['failed'] = measured_apart(), failed_apart()
        torch.save(results, f'{folder}/{rank}.pth')
    finally:
        # A thread of gloo may still hold a tensor that is Python's; torch 2.1 then waits for ever.
        time.sleep(0.5)
        dist.destroy_process_group()


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """The results of two processes."""
    folder = tmp_path_factory.mktemp('pair')
    start_two(one_of, folder)
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('name', ['alone', 'together'])
def test_both_hold_the_same(name, pair):
    """Student, images and generator, bit by bit."""
    one, other = (results[name] for results in pair)
    for key in ('calibrated', 'ranges', 'tensors'):
        assert not changed(one[key], other[key])
    for key in ('images', 'generator'):
        assert torch.equal(one[key], other[key])
    assert one['rounds'] == other['rounds']
    assert one['losses'] != other['losses']  # each had its own half


def test_two_learn_what_one_does(pair):
    """On equal images: gradients are averaged over processes."""
    single, double = played(**ALONE), pair[0]['alone']
    assert not changed(single['calibrated'], double['calibrated'])
    moved = changed(single['calibrated'], single['ranges'])
    assert {'0.input.scale', '0.input.zero_point', '3.weight.scale'} <= moved
    for key in ('ranges', 'tensors'):
        for name, value in single[key].items():
            assert torch.allclose(double[key][name], value, rtol=1e-5, atol=1e-6), name
    assert double['rounds'] == pytest.approx(single['rounds'], rel=1e-5)
    means = [(a + b) / 2 for a, b in zip(*(results['alone']['losses'] for results in pair))]
    assert means == pytest.approx(single['losses'], rel=1e-4)
    assert torch.equal(double['generator'], single['generator'])


def test_all_move_the_same_scale(pair):
    """Each saw half of the images; one process alone sees all."""
    alone = equalized()
    assert (alone['0.weight'] < 1).sum() > 1
    for results in pair:
        assert not changed(alone, results['equalized'])


def test_all_rotate_about_the_same_mean(pair):
    """Each saw some of the images; one process alone sees all."""
    alone = rotated()
    assert not changed(pair[0]['rotated'], pair[1]['rotated'])
    for name, value in alone.items():
        torch.testing.assert_close(pair[0]['rotated'][name], value, rtol=1e-5, atol=1e-6)


def test_each_makes_its_part_of_the_images(pair):
    images = pair[0]['together']['images']
    assert images.shape == (6 + 2 * 4, 3, 28, 28)
    assert len({image.numpy().tobytes() for image in images}) == 14


def test_two_make_the_images_that_one_makes(pair):
    """Of the synthesis, and of the first round, whose student is the calibrated one."""
    for results in pair:
        torch.testing.assert_close(results['synthesized'], synthesized(), rtol=0, atol=1e-5)
    single, double = (images['images'][:6 + 4] for images in
                      (played(**TOGETHER), pair[0]['together']))
    torch.testing.assert_close(double, single, rtol=0, atol=1e-3)


def test_ranges_are_merged_in_the_order_of_processes(pair):
    """The second saw images 2 and 4."""
    for results in pair:
        assert float(results['by order']['0.input.scale']) == pytest.approx(4 / 255)


def test_first_process_measures_for_all(pair):
    (one, kept), (other, kept_too) = (results['measured'] for results in pair)
    assert other == pytest.approx(one + 1)
    assert kept == kept_too == [one]


def test_loss_that_is_not_finite_in_one_process(pair):
    """It stops all of them, at the same step."""
    one, other = (results['failed'] for results in pair)
    assert one[1] and other[1]
    assert 'evolution, step 0 (round 1): a loss is not finite in another process' in one[0]
    assert 'evolution, step 0 (round 1): of the second' in other[0]


def test_batch_that_cannot_be_split(pair):
    for results in pair:
        assert results['error'] == 'evolution.batch_size must be a multiple of the 2 processes, ' \
                                   'got 3; try 4'
    assert game(**dict(ALONE, batch_size=3)).world == 1
