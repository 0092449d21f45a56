# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Damaged files are refused; those that other tools and versions write are not."""
import io
import random
import re
import zipfile

import pytest
import torch
from torch import nn

import psaq_mm
from psaq_mm.checkpoint import load_checkpoint_file, quantized_checkpoint, save_torch
from psaq_mm.checkpoint.integrity import DIGEST_KEY, require_undamaged
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan
from psaq_mm.quantization import QuantSpec

DAMAGES = 1200


def weights():
    torch.manual_seed(0)
    return {f'layers.{i}.weight': torch.randn(8, 8) for i in range(12)}


def saved_by_torch(path):
    torch.save(dict(meta=dict(epoch=3), state_dict=dict(weights(), none=torch.zeros(0, 3))), path)


def saved_quantized(path):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    spec = QuantSpec(granularity='per_channel')
    apply_plan(model, {name: dict(weight=spec) for name in '02'})
    for layer in (model[0], model[2]):
        layer.weight_quantizer.set_range(-torch.ones(len(layer.weight)),
                                         torch.ones(len(layer.weight)))
    save_torch(quantized_checkpoint(model), path)


def saved_state(path):
    save_torch(dict(fingerprint=dict(seed='0'), synthesizer=dict(images=torch.randn(3, 8, 8)),
                    seconds=dict(synthesis=1.5)), path)


def saved_as_safetensors(path):
    pytest.importorskip('safetensors.torch').save_file(weights(), str(path))


def records(data):
    """Start and end of what may change places: content of records, whole records, and
    entries of the directory."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = archive.infolist()
    starts = [entry.header_offset for entry in entries] + [archive.start_dir]
    whole = list(zip(starts, starts[1:]))
    content = []
    for entry in entries:
        name, extra = data[entry.header_offset + 26], entry.header_offset + 28
        start = entry.header_offset + 30 + name + int.from_bytes(data[extra:extra + 2], 'little')
        content.append((start, start + entry.file_size))
    marks = [match.start() for match in re.finditer(b'PK\1\2', data[archive.start_dir:])]
    marks = [archive.start_dir + mark for mark in marks]
    return content, whole, list(zip(marks, marks[1:]))


def swapped(data, rng):
    (a, b), (c, d) = sorted(rng.sample(rng.choice(records(data)), 2))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def flipped(data, rng, bits):
    data = bytearray(data)
    for place in rng.sample(range(8 * len(data)), bits):
        data[place // 8] ^= 1 << place % 8
    return bytes(data)


def zeroed(data, rng):
    start = rng.randrange(len(data) - 64)
    return data[:start] + bytes(64) + data[start + 64:]


def cut(data, rng):
    return data[:rng.randrange(1, len(data))]


def inserted(data, rng):
    start = rng.randrange(len(data) + 1)
    return data[:start] + bytes(rng.choices(range(256), k=rng.choice([1, 4, 64]))) + data[start:]


def removed(data, rng):
    start, count = rng.randrange(len(data) - 64), rng.choice([1, 4, 64])
    return data[:start] + data[start + count:]


CHANGES = [lambda data, rng: flipped(data, rng, 1), lambda data, rng: flipped(data, rng, 8),
           zeroed, cut, inserted, removed, swapped]


def assert_all_refused(data, path, changes):
    rng = random.Random(1)
    refused = 0
    while refused < DAMAGES:
        damaged = changes[refused % len(changes)](data, rng)
        if damaged == data:
            continue
        path.unlink()  # much faster than to write over it
        path.write_bytes(damaged)
        with pytest.raises(UserError) as caught:
            load_checkpoint_file(path)
        assert str(caught.value).startswith(f'{path} is ')
        assert 'damaged' in str(caught.value) or 'expected a file written' in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        refused += 1


@pytest.mark.parametrize('save', [saved_by_torch, saved_quantized, saved_state])
def test_damaged_file_is_refused(save, tmp_path):
    path = tmp_path / 'a.pth'
    save(path)
    load_checkpoint_file(path)
    assert_all_refused(path.read_bytes(), path, CHANGES)


def test_damaged_safetensors_are_refused(tmp_path):
    """Without checksums: values can change unseen, but nothing can move."""
    path = tmp_path / 'a.safetensors'
    saved_as_safetensors(path)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], 'little')

    def zeroed_header(data, rng):
        return zeroed(data[:length], rng) + data[length:]

    def flipped_length(data, rng):
        return flipped(data[:8], rng, 1) + data[8:]

    assert_all_refused(data, path, [cut, inserted, removed, zeroed_header, flipped_length])


@pytest.mark.parametrize('save', [saved_by_torch, saved_quantized])
def test_every_byte_counts(save, tmp_path):
    save(tmp_path / 'a.pth')
    data = bytearray((tmp_path / 'a.pth').read_bytes())
    rng = random.Random(2)
    for place in range(len(data)):
        bit = 1 << rng.randrange(8)
        data[place] ^= bit
        try:
            has_digest = require_undamaged(io.BytesIO(data), 'a.pth')
        except UserError:
            pass
        else:  # then what stands in the file says that it has lost its digest
            pytest.fail(f'byte {place} of {len(data)}, bit {bit}: {has_digest}')
        data[place] ^= bit


@pytest.mark.parametrize('trust', [False, True])
def test_digest_cannot_be_stripped(trust, tmp_path):
    path = tmp_path / 'a.pth'
    saved_state(path)
    data = path.read_bytes()
    assert data[-79:-64] == b'psaq_mm sha256 '
    assert require_undamaged(io.BytesIO(data), 'a.pth')
    assert DIGEST_KEY not in load_checkpoint_file(path)
    without = data[:-81] + b'\0\0'  # a flawless zip archive
    assert zipfile.ZipFile(io.BytesIO(without)).testzip() is None
    path.write_bytes(without)
    with pytest.raises(UserError, match='a.pth is damaged: the digest .* is missing'):
        load_checkpoint_file(path, trust=trust)


def test_stock_torch_reads_what_carries_a_digest(tmp_path):
    saved = dict(a=torch.arange(3), b=[torch.ones(2)])
    save_torch(saved, tmp_path / 'a.pth')
    for options in (dict(weights_only=True), dict(weights_only=False),
                    dict(weights_only=True, mmap=True)):
        loaded = torch.load(str(tmp_path / 'a.pth'), **options)
        assert loaded.keys() == {'a', 'b', DIGEST_KEY}
        assert torch.equal(loaded['a'], saved['a']) and torch.equal(loaded['b'][0], saved['b'][0])


def test_files_without_a_digest_load(tmp_path):
    """As psaq_mm wrote them before it had one, and as torch writes them."""
    path = tmp_path / 'a.pth'
    save_torch([1, 2], path)  # nothing that could say that there is one
    assert load_checkpoint_file(path) == [1, 2]
    torch.save(dict(weights(), none=torch.zeros(0)), path)
    assert load_checkpoint_file(path).keys() == {*weights(), 'none'}


class Stream(io.BytesIO):
    """Where nothing can be written afterwards: sizes follow the data."""

    def tell(self):
        raise OSError

    seek = tell


@pytest.mark.parametrize('compression', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('streamed', [False, True])
def test_archives_of_other_tools_load(compression, streamed, tmp_path):
    """Repacked, with other headers and dates; still with their checksums."""
    torch.save(weights(), tmp_path / 'a.pth')
    packed = Stream() if streamed else io.BytesIO()
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive, \
            zipfile.ZipFile(packed, 'w', compression) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    data = packed.getvalue()
    (tmp_path / 'b.pth').write_bytes(data)
    assert load_checkpoint_file(tmp_path / 'b.pth').keys() == weights().keys()
    start = data.index(b'archive/data/3') if b'archive/data/3' in data else data.index(b'data/3')
    damaged = data[:start + 40] + bytes([data[start + 40] ^ 1]) + data[start + 41:]
    (tmp_path / 'b.pth').write_bytes(damaged)
    with pytest.raises(UserError, match='b.pth is damaged'):
        load_checkpoint_file(tmp_path / 'b.pth')


def test_a_flaw_is_named(tmp_path):
    path = tmp_path / 'a.pth'
    saved_by_torch(path)
    data = path.read_bytes()
    place = data.index(weights()['layers.3.weight'].numpy().tobytes())
    path.write_bytes(data[:place] + b'\xff' + data[place + 1:])
    with pytest.raises(UserError) as caught:
        load_checkpoint_file(path)
    assert str(caught.value) == (f'{path} is damaged: its record a/data/3 has not the checksum '
                                 'that it was saved with; fetch or save it again')


def test_the_damaged_quantized_file_leaves_the_model_alone(tmp_path):
    path = tmp_path / 'quantized.pth'
    saved_quantized(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(UserError, match='has not the digest'):
        psaq_mm.load(model, path)
    assert type(model[0]) is nn.Linear
