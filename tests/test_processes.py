# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Two processes that share one quantization: the same images, and they stop together."""
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from own_process import start_two
from small_models import swin

from psaq_mm import Recipe, UserError
from psaq_mm.adapters.tested_size import SizeFound
from psaq_mm.checkpoint import save_torch
from psaq_mm.pipeline import Pipeline, quantize
from psaq_mm.processes import count_of_this_process, images_of_this_process

CHANGES = dict(
    synthesis=dict(num_images=3, batch_size=2, image_size=56, steps=1, save_interval=3),
    calibration=dict(image_size=(84, 112), batch_size=2),
    # Rounding to nearest: GPTQ turns a last bit of a range into other integers.
    quantization=dict(weight=dict(rounding='nearest')),
    evolution=dict(rounds=2, student_steps=2, batch_size=2, save_interval=1, zoom=1.))
RECIPE = Recipe.shipped('w4a4').changed(CHANGES)
ROUNDED = Recipe.shipped('w4a4').changed(dict(
    CHANGES, quantization={}, evolution=dict(rounds=0)))

MIXED = Recipe.shipped('w4a4').changed(dict(
    quantization=dict(
        mean_bits=3, candidate_bits=[2, 4, 8], weight=dict(rounding='nearest'),
        # MSEObserver draws a sample of each batch.
        roles=dict(attention=dict(observer=dict(type='MinMaxObserver', _delete_=True)))),
    evolution=dict(rounds=0), calibration=dict(image_size=None)))


class Noted(Pipeline):
    """Notes the points of a run; raises in one process at one of them."""

    def __init__(self, *args, at=None, rank=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.at, self.rank, self.points = at, rank, []

    def notify(self, point, **arguments):
        progress = arguments.get('progress')
        if progress is not None and progress.done:
            point = f'{progress.phase} batch'
        self.points.append(point)
        if point == self.at and dist.get_rank() == self.rank:
            raise UserError(f'stopped at {point}')


def model():
    torch.manual_seed(0)
    return swin(depths=(1, 1))


def ended(pipeline):
    """The message that a run ended with, or None, and the student's state."""
    try:
        return None, pipeline.run().state_dict()
    except UserError as error:
        return str(error), None


def mixed(count):
    """What bits are chosen by on so many images, the bits, the error that is measured in the end,
    and how far it was at each step."""
    calls, images = [], torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    pipeline = Pipeline(model(), MIXED, 7, progress=calls.append, images=images[:count])
    pipeline.run()
    return dict(losses=torch.tensor([value for group in pipeline.allocation.groups
                                     for value in group.losses.values()]),
                bits=list(pipeline.allocation.bits), measured=pipeline.measured,
                progress=[(c.done, c.total) for c in calls if c.phase == 'allocation'])


# As a phase begins and ends is the same code for all.
POINTS = ('before_synthesis', 'after_synthesis_step', 'before_calibration', 'calibration batch',
          'after_evolution_step', 'after_evolution', 'final_ranges batch')


def one_of(rank, world, folder):
    """What one of several processes does; a process left behind would hang at the next."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank,
                            world_size=world)
    try:
        calls, file = [], f'{folder}/state_{rank}.pth'
        whole = Pipeline(model(), RECIPE, 7, progress=calls.append)
        state = whole.run().state_dict()
        results = dict(images=whole.images, state=state, progress=[
            (call.phase, call.done, call.total) for call in calls])
        results['stopped'] = {point: ended(Noted(model(), RECIPE, 7, at=point))[0]
                              for point in POINTS}
        results['rounding'] = {point: ended(Noted(model(), ROUNDED, 7, at=point))[0] for point in (
            'before_rounding', 'rounding batch')}
        wrong = RECIPE if rank == 0 else replace(RECIPE, quantization=replace(
            RECIPE.quantization, include=('layers.*', )))
        results['check'] = ended(Pipeline(model(), wrong, 7))[0]
        # Saved at the same step, whoever stopped: the next run goes on from there.
        ended(Noted(model(), RECIPE, 7, at='after_evolution_step', state_file=file))
        resumed = []
        _, results['resumed'] = ended(Pipeline(model(), RECIPE, 7, resume=True, state_file=file,
                                               progress=resumed.append))
        results['resumed at'] = [c.done for c in resumed if c.phase == 'evolution'][0]
        # A file is missing, of another seed, or ahead of the other's.
        saved = torch.load(file, weights_only=True)
        if rank == 0:
            ahead = dict(saved, game=dict(saved['game'], step_index=2))
            save_torch(ahead, file)
        lost = []
        _, results['apart'] = ended(Pipeline(model(), RECIPE, 7, resume=True, state_file=file,
                                             progress=lost.append))
        results['apart at'] = [c.done for c in lost if c.phase == 'evolution'][0]
        missing = file if rank == 0 else f'{folder}/none.pth'
        _, results['missing'] = ended(Pipeline(model(), RECIPE, 7, resume=True,
                                               state_file=missing))
        results['other'] = ended(Pipeline(model(), RECIPE, 7 + rank, resume=True,
                                          state_file=file))[0]
        results['shares'] = [(count_of_this_process(n),
                              len(images_of_this_process(torch.empty(n, 1)))) for n in range(1, 6)]
        results['mixed'] = {count: mixed(count) for count in (1, 3)}
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


def assert_same(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_images_of_one_and_of_two(pair):
    """Of 2 + 1 images in batches of 1, and of 2 + 1 in batches of 2."""
    alone = Pipeline(model(), RECIPE, 7)
    alone.run()
    assert torch.equal(pair[0]['images'], pair[1]['images'])
    scale = alone.images.abs().max()
    torch.testing.assert_close(pair[0]['images'] / scale, alone.images / scale, rtol=0,
                               atol=1e-5)


def test_both_hold_the_same_student(pair):
    assert_same(pair[0]['state'], pair[1]['state'])
    assert_same(quantize(model(), RECIPE, 7).state_dict(),
                Pipeline(model(), RECIPE, 7, SizeFound(None, '')).run().state_dict())


def test_each_counts_its_own(pair):
    """Done reaches the total in both, though each runs its part of the images."""
    for results in pair:
        calls = results['progress']
        phases = list(dict.fromkeys(phase for phase, _, _ in calls))
        assert phases == ['synthesis', 'calibration', 'evolution', 'final_ranges']
        for phase in phases:
            done, totals = zip(*[call[1:] for call in calls if call[0] == phase])
            assert done[0] == 0 and done[-1] == totals[0] and len(set(totals)) == 1, phase
    assert [total for results in pair for phase, done, total in results['progress']
            if phase == 'calibration' and not done] == [2, 1]
    for results, expected in zip(pair, ((1, 1, 2, 2, 3), (1, 1, 1, 2, 2))):
        assert results['shares'] == [(n, n) for n in expected]


def test_bits_of_one_and_of_two(pair):
    first, second, alone = (*(results['mixed'][3] for results in pair), mixed(3))
    assert len(set(alone['bits'])) > 1
    assert first['bits'] == second['bits'] == alone['bits']
    assert torch.equal(first['losses'], second['losses'])
    torch.testing.assert_close(first['losses'], alone['losses'], rtol=1e-4, atol=1e-12)
    assert first['measured'] == second['measured'] == pytest.approx(alone['measured'], rel=1e-4)
    assert [found['progress'][-1] for found in (alone, first, second)] == [(3, 3), (2, 2), (1, 1)]


def test_bits_of_fewer_images_than_processes(pair):
    """One of them measures nothing, and has the bits all the same."""
    first, second = (results['mixed'][1] for results in pair)
    assert first['bits'] == second['bits'] and first['measured'] == second['measured']
    assert [found['progress'][-1] for found in (first, second)] == [(1, 1), (0, 0)]


@pytest.mark.parametrize('which', ['stopped', 'rounding'])
def test_error_in_one_process_stops_the_other(which, pair):
    """At every point of a run; what comes next finds both in step."""
    other, raised = (results[which] for results in pair)
    assert raised == {point: f'stopped at {point}' for point in raised} and raised
    assert other == dict.fromkeys(raised, 'another process stopped; its message says why')


def test_wrong_settings_in_one_process(pair):
    assert "'layers.*' matches no module" in pair[1]['check']
    assert pair[0]['check'] == 'another process stopped; its message says why'


def test_resumed(pair):
    """From the step at which both were stopped, with the same bits."""
    for results in pair:
        assert results['resumed at'] == 1
        assert_same(results['resumed'], results['state'])


def test_states_of_different_steps(pair):
    """The game starts again in all processes, also where one has no file at all."""
    for results in pair:
        assert results['apart at'] == 0
        assert_same(results['apart'], results['state'])
        assert_same(results['missing'], results['state'])


def test_state_of_another_run_in_one_process(pair):
    assert 'with another seed; use the same' in pair[1]['other']
    assert pair[0]['other'] == 'another process stopped; its message says why'
