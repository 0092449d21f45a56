# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Pages that are made from the code are what the code says."""
import importlib.util
import re

import pytest
from conftest import ROOT

import psaq_mm

PAGE = (ROOT / 'docs' / 'configuration.md').read_text()
BLOCKS = re.findall(r'<!-- python docs/settings.py (.*?) -->\n\n(.*?)\n\n<!-- end -->', PAGE, re.S)


@pytest.fixture(scope='module')
def settings():
    spec = importlib.util.spec_from_file_location('settings', ROOT / 'docs' / 'settings.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_settings_are_not_stale(settings):
    assert {arguments for arguments, _ in BLOCKS} >= {*psaq_mm.Recipe().to_dict(), 'QuantSpec'}
    for arguments, text in BLOCKS:
        assert settings.output(*arguments.split()).split('\n\n', 1)[1] == text, \
            'run python benchmarks/fill_results.py docs/configuration.md'


def test_defaults_leave_the_meaning(settings):
    assert settings.markdown('A rate, of :data:`x.Y`. Defaults to 0.25 [v1]. More.') == \
        'A rate, of `x.Y`. More.'
    assert settings.markdown('Steps. Defaults to 50: ``more`` earned nothing.') == \
        'Steps. Defaults to 50: `more` earned nothing.'


def test_all_public_names_are_in_the_reference():
    page = (ROOT / 'docs' / 'api.md').read_text()
    named = set(re.findall(r'(?:function|class|exception):: psaq_mm\.([\w.]+)', page))
    import psaq_mm.runtime
    assert named >= {*psaq_mm.__all__} - {'__version__'}
    assert named >= {f'runtime.{name}' for name in psaq_mm.runtime.__all__}
