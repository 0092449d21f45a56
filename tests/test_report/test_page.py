# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The page of a run: self-contained, and true to report.json."""
import re

import pytest
from PIL import Image
from small_reports import small_report

from psaq_mm.report import report_page
from psaq_mm.report.modules import kind_of, part_of
from psaq_mm.report.summary import bits_of, duration


@pytest.fixture(scope='module')
def page():
    return report_page(small_report(config='a<b>/my_model<b>.py'),
                       [(Image.new('RGB', (2000, 500), 'red'), 'A sheet.')],
                       [(Image.new('RGB', (40, 20)), 'Image 1: float 2 objects.')])


def test_page_says_what_was_measured(page):
    for text in ('my_model', 'W4A8', '8.0 times smaller', '64.5 s', '28.5 dB', 'ab' * 32,
                 'python tools/quantize.py my.py my.pth', 'A sheet.', 'Image 1: float 2 objects.',
                 '2.00 MB', 'weight 4, input 8', '&#34;steps&#34;: 3'):
        assert text in page, text
    assert re.findall(r'<code>([\w.]+)</code> \(4 %\)', page) == [
        'backbone.stages.1.blocks.0.attn.w_msa.qkv']
    assert page.count('<svg') == 5 and page.count('data:image/jpeg') == 2
    assert len(page) < 300_000


def test_page_needs_no_network(page):
    addresses = set(re.findall(r'(?:https?:)?//[\w.]+\.\w+', re.sub('base64,[^"]*', '', page)))
    assert addresses <= {'http://www.w3.org'}  # names of XML, not fetched
    assert not re.search(r'<(script|link|iframe)|@import|url\(http', page)


def test_names_are_text(page):
    assert 'my_model&lt;b&gt;' in page and '<b>.py' not in page


def test_what_is_not_there_is_left_out():
    report = small_report(images=dict(count=3, shape=[3, 8, 8], own=3, synthetic=0), losses={},
                          memory={}, command=None, file_bytes={}, images_of_sensitivity=0)
    for entry in report['modules']:
        entry.update(sensitivity=None, sqnr_db=None)
    page = report_page(report)
    assert '3 of your own images' in page and 'made from the weights' not in page
    assert 'Losses' not in page and 'was not measured' in page and 'Predictions' not in page


@pytest.mark.parametrize('most, measured, where, over', [
    (None, 0.02, 'on the images.', False), (2.5, 0.02, 'on images that nothing else', False),
    (2.5, 0.026, 'on images that nothing else', True)])
def test_bits_for_a_budget(most, measured, where, over):
    report = small_report(
        allocation=dict(budget='max_drop=2.5', weights=3.25, activations=7.5, predicted=0.0249,
                        measured=measured), settings=dict(quantization=dict(max_drop=most)))
    page = report_page(report, bits=Image.new('RGB', (40, 30)))
    assert 'Chosen for max_drop=2.5: 3.25 bits of weights and 7.50 of activations' in page
    assert '2.49 % was predicted to become error' in page and where in page
    assert ('over the budget' in page) == over and page.count('data:image/jpeg') == 1


@pytest.mark.parametrize('name, op, kind, part', [
    ('backbone.stages.2.blocks.5.attn.w_msa', 'QuantWindowMSA', 'attention', 'stage 3'),
    ('backbone.stages.2.blocks.5.attn.w_msa.proj', 'QuantLinear', 'attention: linear', 'stage 3'),
    ('model.layers.1.blocks.0.mlp.fc1', 'QuantLinear', 'MLP: linear', 'stage 2'),
    ('model.layers.1.downsample.reduction', 'QuantLinear', 'linear', 'stage 2'),
    ('model.blocks.11.attn', 'QuantAttention', 'attention', 'blocks'),
    ('backbone.stages.0.blocks.0', 'QuantSwinBlock', 'other', 'stage 1'),
    ('neck.fpn_convs.0.conv', 'QuantConv2d', 'convolution', 'neck'),
    ('roi_head.bbox_head.shared_fcs.0', 'QuantLinear', 'linear', 'RoI head'),
    ('rpn_head.rpn_cls', 'QuantConv2d', 'convolution', 'RPN head')])
def test_kinds_and_parts(name, op, kind, part):
    assert kind_of(dict(name=name, op=op)) == kind and part_of(name) == part


def test_words_of_numbers():
    assert bits_of(small_report()) == 'W4A8'
    assert bits_of(small_report(allocation=dict(weights=3.97, activations=8))) == 'W4.0A8.0'
    assert [duration(s) for s in (0.04, 99.9, 125, 3700)] == [
        '0.0 s', '99.9 s', '2 min 5 s', '1 h 1 min']
