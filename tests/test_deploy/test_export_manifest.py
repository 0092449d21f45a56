# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A damaged file of an export is refused before an engine reads it."""
import hashlib
import json
import random

import pytest

from psaq_mm.deploy import Graphs, read_export
from psaq_mm.deploy.export_manifest import write_export
from psaq_mm.errors import UserError

FILES = ('model.onnx', 'model.xml', 'model.bin')
COUNT = 1000


@pytest.fixture
def folder(tmp_path):
    """An export whose files are too small to be graphs."""
    generator = random.Random(0)
    digests = {}
    for name in FILES:
        data = bytes(generator.randrange(256) for _ in range(300))
        (tmp_path / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    write_export(dict(
        format='onnx', source=dict(sha256='ab', checkpoint='quantized.pth'),
        output_names=['logits'], graphs=[dict(
            file='model.onnx', size=None, sha256=digests, parity=dict(outputs=[
                dict(output='logits', max=1.25e-07, mean=0.1, sqnr_db=None)]))]), tmp_path)
    return tmp_path


def flip(data, generator, count):
    for bit in generator.sample(range(8 * len(data)), count):
        data[bit // 8] ^= 1 << bit % 8


def zero(data, generator):
    start = generator.randrange(len(data))
    end = min(len(data), start + 64)
    data[start:end] = bytes(end - start)


def truncate(data, generator):
    del data[generator.randrange(len(data)):]


def insert(data, generator):
    place = generator.randrange(len(data) + 1)
    data[place:place] = generator.choices([b' ', b'\n', b'\0', b'0'])[0] \
        if generator.random() < 0.5 else bytes([generator.randrange(256)])


DAMAGES = [lambda data, generator: flip(data, generator, 1),
           lambda data, generator: flip(data, generator, 8), zero, truncate, insert]


def test_whole(folder):
    manifest = read_export(folder)
    assert manifest['graphs'][0]['file'] == 'model.onnx'
    assert json.loads((folder / 'export.json').read_text()) == manifest


@pytest.mark.parametrize('name', [*FILES, 'export.json'])
def test_damaged(folder, name):
    whole = (folder / name).read_bytes()
    generator = random.Random(name)
    refused = 0
    for index in range(COUNT):
        data = bytearray(whole)
        DAMAGES[index % len(DAMAGES)](data, generator)
        assert bytes(data) != whole
        (folder / name).write_bytes(data)
        with pytest.raises(UserError) as caught:
            read_export(folder)
        message = str(caught.value)
        assert name in message and 'damaged' in message and '\n' not in message
        refused += 1
    assert refused == COUNT
    (folder / name).write_bytes(whole)
    read_export(folder)


def test_engines_see_no_damaged_file(folder, monkeypatch):
    """The check comes first, in ``Graphs`` as in ``read_export``."""
    (folder / 'model.bin').write_bytes(b'')
    monkeypatch.setattr('psaq_mm.runtime.engines.ONNXRuntimeEngine._load', lambda self: 1 / 0)
    with pytest.raises(UserError, match=r'model\.bin is damaged'):
        Graphs(folder, 'onnxruntime')


def test_exchanged_files(folder):
    first, second = (folder / name for name in FILES[1:])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(UserError, match=r'model\.xml is damaged'):
        read_export(folder)


def test_missing(folder):
    (folder / 'model.bin').unlink()
    with pytest.raises(UserError, match=r'model\.bin cannot be read'):
        read_export(folder)
    (folder / 'export.json').unlink()
    with pytest.raises(UserError, match=r'export\.json cannot be read.*tools/export\.py'):
        read_export(folder)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"graphs": [{}]}', '[' * 100000, 'NaN', '"a"',
                                  '{"format": "onnx", "graphs": []}'], ids=lambda t: t[:20])
def test_not_ours(folder, text):
    """Also what an older version wrote, without digests."""
    (folder / 'export.json').write_text(text)
    with pytest.raises(UserError, match=r'export\.json is damaged, or written by an older'):
        read_export(folder)


def test_strict_json(tmp_path):
    with pytest.raises(ValueError, match='JSON'):
        write_export(dict(graphs=[], value=float('nan')), tmp_path)
    assert not (tmp_path / 'export.json').exists()
