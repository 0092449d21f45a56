# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Which rows of the table of all Swin configs count as right."""
import pytest
from conftest import ROOT, load_script

ROW = dict(layouts=['OpenMMLab', 'Swin authors', 'DDP'], tested=True, export='backbone',
           parity_db=25.)


@pytest.mark.parametrize('changes, right', [
    (dict(), True),
    (dict(parity_db=None), True),  # equal
    (dict(scope_reason='heads need words'), False),
    (dict(float_test='RuntimeError: shapes'), False),
    (dict(export_reason='cannot load model.onnx'), False),
    (dict(error='TimeoutError: took too long'), False),
    (dict(tested=False), False),
    (dict(layouts=['OpenMMLab', 'DDP']), False),
    # A low parity is that of random weights only if the simulation is as far from itself.
    (dict(parity_db=2.5, itself_db=1., float_db=100.), True),
    (dict(parity_db=2.5, itself_db=1., float_db=None), True),
    (dict(parity_db=2.5, itself_db=1., float_db=20.), False),
    (dict(parity_db=2.5, itself_db=15., float_db=100.), False)])
def test_right_rows(monkeypatch, changes, right):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    script = load_script(ROOT / 'benchmarks' / 'every_swin.py')
    row = dict(ROW, **changes)
    assert script.is_right(row) == right
    assert f'\n{int(right)} of 1 configs' in script.table({'a': row})
