# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The notebook: its cells run in their order, and show what they say."""
import json

import pytest
from conftest import DEMO
from PIL import Image

NOTEBOOK = DEMO / 'tour.ipynb'


def cells(kind):
    return [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells']
            if cell['cell_type'] == kind]


def test_it_is_committed_without_outputs():
    assert not any(cell.get('outputs') or cell.get('execution_count')
                   for cell in json.loads(NOTEBOOK.read_text())['cells'])


def test_its_links_lead_somewhere():
    import re
    links = re.findall(r'\]\(([^)]+)\)', '\n'.join(cells('markdown')))
    assert links and all((DEMO / link).exists() for link in links)


def test_cells_run(monkeypatch, tmp_path):
    pytest.importorskip('openvino')
    monkeypatch.chdir(DEMO)
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr('tempfile.tempdir', None)
    for name, value in (('IMAGES', '2'), ('STEPS', '1'), ('SCENES', '2')):
        monkeypatch.setenv(f'TOUR_{name}', value)
    state = {'__name__': '__main__'}
    for number, source in enumerate(cells('code')):
        exec(compile(source, f'cell {number}', 'exec'), state)
    assert tmp_path in state['out'].parents
    assert isinstance(state['picture'], Image.Image) and len(state['losses']) == 2
    assert state['accuracy']['float'] > 50 and state['accuracy']['quantized, W8A8'] > 50
    agreement = state['export']['graphs'][0]['agreement']
    assert agreement['share'] > 0.6 * agreement['own']['share'] > 0.3
    boxes = state['found']['quantized, W8A8']['instances']
    assert abs(len(boxes) - (state['detections'].scores > 0.3).sum()) <= 1 < len(boxes)
