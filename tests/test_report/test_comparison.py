# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Two runs side by side, in Python and as a tool."""
import json

import pytest
from PIL import Image
from small_reports import small_report, without, write_run

from psaq_mm.errors import UserError
from psaq_mm.report import Run, compare_page, differences, read_run
from psaq_mm.report.comparison import names_of


def other_report():
    report = small_report(seed=4, seconds=dict(synthesis=10.))
    report['settings']['synthesis']['lr'] = 0.1
    report['modules'][0]['sqnr_db'] = 20.
    return report


def test_differences():
    numbers, changes = differences(Run('a', small_report()), Run('b', other_report()))
    numbers = {name: values for name, *values in numbers}
    assert numbers['seconds'] == ['64.5', '10']
    assert numbers['median SQNR of modules, dB'] == ['28.5', '27.5']
    assert numbers['lowest SQNR of a module, dB'] == ['27', '20']
    assert numbers['highest sensitivity of a module, %'] == ['4', '4']
    assert numbers['peak memory, MB'] == ['900', '900']
    assert numbers['last loss of the prior'] == ['2', '2']
    assert changes == [('synthesis.lr', '0.2', '0.1'), ('seed', '3', '4')]


def test_older_reports_have_measured_less():
    old = without(small_report(), 'sensitivity', 'memory', 'command', 'file_bytes')
    numbers, _ = differences(Run('a', old), Run('b', small_report()))
    assert ('highest sensitivity of a module, %', 'not measured', '4') in numbers
    assert 'What each module loses' in compare_page(Run('a', old), Run('b', old))


def test_tool(tmp_path, call_tool, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = write_run(tmp_path / 'a', small_report())
    b = write_run(tmp_path / 'b', other_report())
    Image.new('RGB', (60, 30)).save(a / 'synthetic.png')
    status, out, err = call_tool('compare', a, b / 'report.json')
    assert status == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ['seconds', '64.5', '10'] in lines and ['synthesis.lr', '0.2', '0.1'] in lines
    page = (tmp_path / 'compare.html').read_text()
    assert page.count('data:image/jpeg') == 1 and page.count('<svg') == 4
    assert '<code>synthesis.lr</code>' in page
    assert names_of(read_run(a), read_run(a)) == ('a (A)', 'a (B)')
    monkeypatch.chdir(a)
    assert read_run('.').name == 'a'


@pytest.mark.parametrize('name, content, message', [
    ('nowhere', None, 'nowhere does not exist'), ('empty', '', 'cannot be read as JSON'),
    ('list', [], 'is not a report of tools/quantize.py'),
    ('other', dict(modules=[], losses={}), 'it has no seconds, size, settings, versions'),
    ('none', small_report(modules=[]), 'is not a report'),
    ('binary', b'\xff\xfe', 'cannot be read as JSON')])
def test_bad_input(name, content, message, tmp_path, call_tool):
    good, bad = write_run(tmp_path / 'good', small_report()), tmp_path / name
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content is not None:
        bad.write_text(content if isinstance(content, str) else json.dumps(content))
    for pair in ((good, bad), (bad, good)):
        status, _, err = call_tool('compare', *pair, '--out', tmp_path / 'page.html')
        assert status == 2 and err.startswith('error: ') and message in err
        assert len(err.strip().splitlines()) <= 2
    assert not (tmp_path / 'page.html').exists()


def test_run_that_has_not_ended(tmp_path):
    (tmp_path / 'started').mkdir()
    with pytest.raises(UserError, match='report.json does not exist; expected a work directory'):
        read_run(tmp_path / 'started')
