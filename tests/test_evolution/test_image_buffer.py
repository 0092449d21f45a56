# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which images stay, and which are drawn."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psaq_mm.evolution.image_buffer import ImageBuffer


def numbered(*values):
    """Images of one pixel that say which they are."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def numbers(images):
    assert images.shape[1:] == (1, 1, 1)
    return [int(value) for value in images.flatten()]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_first_images_stay_and_the_oldest_of_the_others_leave():
    buffer = ImageBuffer(numbered(0, 1, 2), capacity=4)
    assert numbers(buffer.images) == numbers(buffer.newest) == [0, 1, 2]
    expected = {1: [10, 11], 2: [10, 11, 20, 21], 3: [20, 21, 30, 31], 4: [30, 31, 40, 41]}
    for index, later in expected.items():
        buffer.add(numbered(10 * index, 10 * index + 1))
        assert numbers(buffer.images) == [0, 1, 2, *later]
        assert numbers(buffer.newest) == [10 * index, 10 * index + 1]


@given(first=st.integers(1, 5), capacity=st.integers(1, 12), size=st.integers(1, 5),
       rounds=st.integers(0, 8))
@settings(deadline=None, max_examples=60)
def test_what_stays(first, capacity, size, rounds):
    """All of the first ones, and as many whole rounds as there is room for."""
    buffer = ImageBuffer(numbered(*range(first)), capacity)
    for index in range(rounds):
        buffer.add(numbered(*(100 * (index + 1) + i for i in range(size))))
    kept = min(rounds, capacity // size)
    expected = [100 * (index + 1) + i for index in range(rounds - kept, rounds)
                for i in range(size)]
    assert numbers(buffer.images) == [*range(first), *expected]
    assert len(buffer.images) <= first + capacity


def test_no_capacity():
    """The newest round alone is learnt from, whatever fraction is asked."""
    buffer = ImageBuffer(numbered(0, 1), capacity=0)
    assert numbers(buffer.images) == [0, 1]
    for values in ((10, 11, 12), (20, 21, 22)):
        buffer.add(numbered(*values))
        assert numbers(buffer.images) == list(values)
        for fraction in (0., 0.5, 1.):
            assert set(numbers(buffer.draw(6, fraction, generator()))) == set(values)
    assert numbers(buffer.first) == [0, 1]


@pytest.mark.parametrize('count, fraction, new', [
    (8, 0.5, 4), (8, 0., 0), (8, 1., 8), (8, 0.25, 2), (10, 0.26, 3), (1, 0.4, 0), (1, 0.6, 1)])
def test_new_fraction(count, fraction, new):
    buffer = ImageBuffer(numbered(*range(20)), capacity=20)
    buffer.add(numbered(*range(100, 120)))
    buffer.add(numbered(*range(200, 220)))
    for seed in range(5):
        drawn = numbers(buffer.draw(count, fraction, generator(seed)))
        assert len(drawn) == count
        assert all(value >= 200 for value in drawn[:new])
    # What is not new comes from all there are, the newest too.
    if new < count:
        rest = {value for seed in range(200)
                for value in numbers(buffer.draw(count, fraction, generator(seed)))[new:]}
        assert rest == {*range(20), *range(200, 220)}  # those from 100 on have left


@given(images=st.integers(1, 6), count=st.integers(0, 15), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_no_image_repeats_before_all_were_picked(images, count, seed):
    buffer = ImageBuffer(numbered(*range(images)), capacity=3)
    for fraction in (0., 1.):
        drawn = numbers(buffer.draw(count, fraction, generator(seed)))
        assert len(drawn) == count
        for start in range(0, count, images):
            part = drawn[start:start + images]
            assert len(set(part)) == len(part)


def test_draws_come_from_the_generator():
    buffer = ImageBuffer(numbered(*range(50)), capacity=3)
    one, same = (numbers(buffer.draw(20, 0.5, generator(3))) for _ in range(2))
    assert one == same != numbers(buffer.draw(20, 0.5, generator(4)))
    assert numbers(buffer.images) == list(range(50))  # drawing takes nothing away
    source = generator(3)
    buffer.draw(20, 0.5, source)
    assert numbers(buffer.draw(20, 0.5, source)) != one


@pytest.mark.parametrize('capacity', [0, 3, 6])
@pytest.mark.parametrize('rounds', [0, 1, 3])
def test_restored_buffer_goes_on_as_the_first(capacity, rounds):
    buffer = ImageBuffer(numbered(0, 1, 2), capacity)
    for index in range(rounds):
        buffer.add(numbered(10 * index + 10, 10 * index + 11))
    state = copy.deepcopy(buffer.state_dict())
    assert 'first' not in state  # photographs may be among them
    other = ImageBuffer(numbered(0, 1, 2), capacity)
    other.load_state_dict(state)
    for index in (8, 9):
        assert numbers(other.images) == numbers(buffer.images)
        assert numbers(other.first) == [0, 1, 2]
        assert torch.equal(other.draw(9, 0.5, generator(index)),
                           buffer.draw(9, 0.5, generator(index)))
        for each in (buffer, other):
            each.add(numbered(10 * index, 10 * index + 1))
    assert [numbers(later) for later in state['later']] == [
        [10 * i + 10, 10 * i + 11] for i in range(rounds)][-(capacity // 2):][:capacity]
