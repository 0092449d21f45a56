# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Two processes play the game that one plays alone, each with half of every batch."""
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_student import changed, network, quantized, ranges, run_taps, tensors

from psaq_mm.engine.hooks import ResumeHook
from psaq_mm.errors import UserError
from psaq_mm.evolution import (
    EvolutionSettings,
    Evolver,
    Student,
    SynthesisSettings,
    calibrate_ranges,
)
from psaq_mm.ops import apply_plan
from psaq_mm.prior import TeacherRecord
from psaq_mm.quantization import QuantSpec
from psaq_mm.quantization.observers import MinMaxObserver
from psaq_mm.registry import OBSERVERS

RULES = dict(rounds=2, student_steps=6, batch_size=4, weight_lr=0.01, range_lr=1e-2)
ALONE = dict(RULES, sample_steps=0, zoom=3., contrast=0.2)
TOGETHER = dict(RULES, sample_steps=3)


def game(**rules):
    net = network()
    images = torch.randn(6, 3, 28, 28, generator=torch.Generator().manual_seed(2)).clamp(-2., 2.)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    model = quantized(net, images)
    settings = EvolutionSettings(**rules)
    synthesis = SynthesisSettings(
        image_size=28, priors=dict(total_variation=dict(type='TotalVariationPrior')))
    student = Student(model, lambda batch, regions: run_taps(model, batch), settings)
    return Evolver(settings, synthesis, lambda batch: (TeacherRecord(), run_taps(net, batch)),
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


def resumed_apart(rank):
    """What a process is told whose state is a step behind, or ahead."""
    evolver, hook = game(**ALONE), ResumeHook()
    hook.before_evolution(SimpleNamespace(work_dir='out'), evolver)  # all of them at step 0
    if rank == 0:
        evolver.step_index += 1
    try:
        hook.before_evolution(SimpleNamespace(work_dir='out'), evolver)
    except UserError as error:
        return str(error)


def one_of(rank, world, folder):
    """What one of several processes does."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank,
                            world_size=world)
    try:
        results = dict(alone=played(**ALONE), together=played(**TOGETHER))
        try:
            game(**dict(ALONE, batch_size=3))
        except UserError as error:
            results['error'] = str(error)
        game(**dict(ALONE, rounds=0, batch_size=3))  # nothing to split
        results['resumed'] = resumed_apart(rank)
        results['by order'] = ranges_by_order()
        torch.save(results, f'{folder}/{rank}.pth')
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """The results of two processes."""
    folder = tmp_path_factory.mktemp('pair')
    mp.spawn(one_of, (2, str(folder)), nprocs=2)
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


def test_each_makes_its_part_of_the_images(pair):
    images = pair[0]['together']['images']
    assert images.shape == (6 + 2 * 4, 3, 28, 28)
    assert len({image.numpy().tobytes() for image in images}) == 14


def test_ranges_are_merged_in_the_order_of_processes(pair):
    """The second saw images 2 and 4."""
    for results in pair:
        assert float(results['by order']['0.input.scale']) == pytest.approx(4 / 255)


def test_states_of_different_steps(pair):
    for results in pair:
        assert results['resumed'] == 'out/state*.pth are of different steps of the evolution ' \
                                     '(1, 0): start again without --resume'


def test_batch_that_cannot_be_split(pair):
    for results in pair:
        assert results['error'] == 'evolution.batch_size must be a multiple of the 2 processes, ' \
                                   'got 3'
    assert game(**dict(ALONE, batch_size=3)).world == 1
