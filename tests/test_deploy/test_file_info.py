# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a file says of how images are resized."""
import pytest
from mmengine.config import Config

from psaq_mm.deploy.file_info import resize_rule


def config(*steps):
    pipeline = [dict(type='LoadImageFromFile'), *steps, dict(type='PackDetInputs')]
    return Config(dict(test_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=pipeline))))


@pytest.mark.parametrize('step, rule', [
    (dict(scale=(1333, 800), keep_ratio=True), dict(mode='fit', size=[1333, 800])),
    (dict(scale=(800, 1333), keep_ratio=True), dict(mode='fit', size=[1333, 800])),
    (dict(scale=(640, 480)), dict(mode='stretch', size=[480, 640])),
    (dict(scale_factor=(2., 3.)), dict(mode='factor', factor=[3., 2.]))])
def test_resize(step, rule):
    assert resize_rule(config(dict(type='Resize', **step))) == rule


@pytest.mark.parametrize('steps, words', [
    ([dict(type='Resize', scale=(64, 64), interpolation='bicubic')], 'interpolation=bicubic'),
    ([dict(type='Resize', scale=(64, 64), backend='pillow')], 'backend=pillow'),
    ([dict(type='Pad', size=(64, 64))], 'Pad'),
    ([dict(type='FixScaleResize', scale=(64, 64))], 'FixScaleResize')])
def test_what_is_not_known(steps, words):
    rule = resize_rule(config(*steps))
    assert rule['mode'] == 'unknown' and words in rule['step']


def test_no_pipeline():
    assert resize_rule(config())['mode'] == 'none'
    assert resize_rule(None)['mode'] == 'unknown'
    assert 'no test pipeline' in resize_rule(Config(dict(model=dict(type='A'))))['step']
