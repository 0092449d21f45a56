# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The charts: that what is measured is drawn where it belongs."""
import xml.etree.ElementTree as ElementTree

import pytest
from small_reports import small_report

from psaq_mm.report import charts
from psaq_mm.report.page import SENSITIVITY_CHART, SQNR_CHART
from psaq_mm.report.svg import COLORS, Drawing

SVG = '{http://www.w3.org/2000/svg}'


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter(f'{SVG}text')]


def dots(svg, color):
    """Positions of the dots of a colour."""
    return [(float(use.get('x')), float(use.get('y')))
            for use in ElementTree.fromstring(svg).iter(f'{SVG}use')
            if color in use.get('style', '') and float(use.get('y')) < 158]  # not of the legend


def test_dots_stand_in_the_order_of_modules_and_values():
    svg = SQNR_CHART(dict(run=small_report()))
    found = [dots(svg, COLORS[i])[0] for i in (4, 0, 2, 1)]  # of the kinds, as modules come
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert [y for _, y in found] == sorted(y for _, y in found)  # each is 1 dB lower
    steps = [b[1] - a[1] for a, b in zip(found, found[1:])]
    assert steps == pytest.approx([steps[0]] * 3, rel=1e-2)
    assert {'attention', 'attention: linear', 'MLP: linear', 'convolution'} <= set(texts(svg))
    assert 'stage 1' in texts(svg) and 'SQNR, dB' in texts(svg)


def test_modules_that_lose_nothing_have_no_logarithm():
    report = small_report()
    report['modules'][1]['sensitivity'] = 0.
    report['modules'][2]['sensitivity'] = None
    svg = SENSITIVITY_CHART(dict(run=report))
    assert 'convolution' in texts(svg) and 'attention' not in texts(svg)


def test_two_runs_are_told_apart_by_name():
    other = small_report()
    other['modules'] = other['modules'][:2]
    svg = SQNR_CHART(dict(one=small_report(), other=other))
    assert {'one', 'other'} <= set(texts(svg))
    assert len(dots(svg, COLORS[0])) == 4 and len(dots(svg, COLORS[1])) == 2


def test_losses_have_a_panel_for_each_kind():
    losses = {'total': [2., 1.], 'patch_similarity': [1., .5], 'sample/total': [3., 4.],
              'sample/adversarial_factor': [1., 1.], 'student/discrepancy': [1., .5, .4],
              'round/discrepancy': [1., .4], 'reconstruction/stages.0.blocks.0': [.2, .1]}
    found = texts(charts.loss_chart(dict(run=small_report(losses=losses))))
    assert [title for title, _, _ in charts._LOSSES.values()] == [
        text for text in found if text in {title for title, _, _ in charts._LOSSES.values()}]
    assert 'patch similarity' in found and 'adversarial factor' not in found
    both = texts(charts.loss_chart(dict(a=small_report(losses=losses), b=small_report())))
    assert {'a', 'b'} <= set(both) and 'patch similarity' not in both
    assert charts.loss_chart(dict(run=small_report(losses={}))) == ''
    assert 'stages.0.blocks.0' in texts(charts.block_chart(
        dict(run=small_report(losses=losses))))
    assert charts.block_chart(dict(run=small_report())) == ''


def test_long_curves_are_means():
    steps, values = charts._curve([float(i % 2) for i in range(1200)])
    assert len(values) == 300 and set(values) == {.5}
    assert steps[0] == 2.5 and steps[-1] == 1198.5


def test_costs_and_ranges():
    found = texts(charts.cost_chart(dict(run=small_report())))
    assert '1 min 2 s' not in found and '61.5 s' in found and '900 MB' in found
    without_memory = texts(charts.cost_chart(dict(run=small_report(memory={}))))
    assert not [text for text in without_memory if 'MB' in text]
    found = texts(charts.range_chart(dict(run=small_report())))
    assert {'weights, real values', 'input', 'query', 'key'} <= set(found)


def test_same_bytes_in_the_colours_of_the_page():
    runs = dict(run=small_report())
    assert SQNR_CHART(runs) == SQNR_CHART(runs)
    assert 'currentColor' in SQNR_CHART(runs) and '#123456' not in SQNR_CHART(runs)


def test_style_ends_with_the_drawing():
    import matplotlib
    before = dict(matplotlib.rcParams)
    with pytest.raises(RuntimeError), Drawing([1.]):
        raise RuntimeError
    assert dict(matplotlib.rcParams) == before
