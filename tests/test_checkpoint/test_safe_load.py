# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Files around the pickle; the pickle itself: test_restricted_pickle.py."""
import builtins
import collections
import hashlib
import io
import logging
import os
import pickle
import sys
import tarfile
import zipfile

import mmengine
import pytest
import torch

from psaq_mm.checkpoint.safe_load import (
    extract_state_dict,
    load_checkpoint_file,
    require_finite,
    sha256_of_file,
)
from psaq_mm.errors import UserError


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path), )


def save(obj, path, file_format='zip'):
    torch.save(obj, path, _use_new_zipfile_serialization=file_format == 'zip')
    return path


def assert_equal(left, right):
    """Compare two dicts of tensors."""
    assert list(left) == list(right)
    for name, value in left.items():
        assert torch.equal(value, right[name])


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'model.safetensors'
    saved = {'weight': torch.arange(4.0)}
    safetensors.save_file(saved, str(path))
    assert_equal(load_checkpoint_file(path), saved)
    damaged = tmp_path / 'damaged.safetensors'
    damaged.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match='damaged.safetensors is not a checkpoint'):
        load_checkpoint_file(damaged)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        load_checkpoint_file(path)


def test_trust(tmp_path, caplog):
    marker = tmp_path / 'marker'
    path = save({'a': MakesFolder(marker), 'w': torch.ones(1)}, tmp_path / 'a.pth')
    with pytest.raises(UserError):
        load_checkpoint_file(path)
    assert not marker.exists()
    logger = mmengine.logging.MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            loaded = load_checkpoint_file(path, trust=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert marker.exists()
    assert torch.equal(loaded['w'], torch.ones(1))
    assert 'a.pth is loaded as trusted' in caplog.text


def test_trusted_file_that_needs_a_missing_package(tmp_path):
    path = tmp_path / 'a.pth'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02cno_such_package\nThing\n.')
        archive.writestr('archive/version', '3\n')
    with pytest.raises(UserError, match='no_such_package'):
        load_checkpoint_file(path, trust=True)


def test_torch_does_not_see_a_tar_archive(tmp_path):
    """Not even one whose first bytes look like a pickle."""
    path = tmp_path / 'ckpt.pth'
    with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT, encoding='latin1') as archive:
        for name in ('\x80\x02storages', 'storages', 'tensors', 'pickle'):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert path.read_bytes().startswith(b'\x80\x02')
    with pytest.raises(UserError, match='ckpt.pth is not a checkpoint'):
        load_checkpoint_file(path)


# Files that are no checkpoints


def bad_files():
    buffer = io.BytesIO()
    save({'weight': torch.zeros(1000)}, buffer)
    legacy = io.BytesIO()
    save({'weight': torch.zeros(1000)}, legacy, 'legacy')
    other_zip = io.BytesIO()
    with zipfile.ZipFile(other_zip, 'w') as archive:
        archive.writestr('word/document.xml', '<xml/>')
    lfs = b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n'
    files = {
        'empty': (b'', 'it is empty'),
        'text': (b'epoch: 1\nmodel: swin\n', 'expected a file written by torch.save'),
        'web page': (b'<!DOCTYPE html><html>404</html>', 'expected a file written by torch.save'),
        'lfs pointer': (lfs, 'git lfs pull'),
        'other zip': (other_zip.getvalue(), 'not a checkpoint that can be read'),
        'plain pickle': (pickle.dumps({'a': 1}), 'not a checkpoint that can be read'),
        'four bytes': (b'PK\x03\x04', 'is damaged'),
        'one byte': (b'\x80', 'not a checkpoint that can be read'),
    }
    for name, data, expected in (('zip', buffer.getvalue(), 'is damaged'), (
            'legacy', legacy.getvalue(), 'not a checkpoint that can be read')):
        for part in (0.1, 0.5, 0.9, 0.999):
            files[f'{name} cut at {part}'] = (data[:int(len(data) * part)], expected)
    return files


BAD_FILES = bad_files()


@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize('name', BAD_FILES)
def test_bad_file(tmp_path, name, trust):
    data, expected = BAD_FILES[name]
    path = tmp_path / 'ckpt.pth'
    path.write_bytes(data)
    with pytest.raises(UserError, match=expected) as caught:
        load_checkpoint_file(path, trust=trust)
    assert str(caught.value).startswith(f'{path} is ')
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize('function', [load_checkpoint_file, sha256_of_file])
def test_missing_file_and_folder(tmp_path, function):
    with pytest.raises(UserError, match='missing.pth is not a checkpoint: there is no such file'):
        function(tmp_path / 'missing.pth')
    with pytest.raises(UserError, match='is not a checkpoint but a folder'):
        function(tmp_path)
    with pytest.raises(UserError, match='Download it first'):
        function('https://example.com/swin.pth')


@pytest.mark.parametrize('trust', [False, True])
def test_torchscript(tmp_path, trust):
    path = tmp_path / 'model.pt'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('model/version', '3\n')
        archive.writestr('model/data.pkl', pickle.dumps({}, 2))
        archive.writestr('model/constants.pkl', pickle.dumps((), 2))
    with pytest.raises(UserError, match='model.pt is a TorchScript program'):
        load_checkpoint_file(path, trust=trust)


def test_forced_weights_only(tmp_path, monkeypatch):
    path = save({'weight': torch.ones(1)}, tmp_path / 'a.pth')
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(UserError, match='Unset it'):
        load_checkpoint_file(path)


# State dicts


@pytest.mark.parametrize('checkpoint', [
    {'state_dict': {'w': torch.ones(1)}, 'model': {'other': torch.ones(1)}, 'epoch': 1},
    {'model': {'w': torch.ones(1)}, 'optimizer': {}},
    {'state_dict': None, 'model': {'w': torch.ones(1)}},
    {'w': torch.ones(1)},
    {'state_dict': collections.OrderedDict({'module.w': torch.ones(1)})},
])
def test_extract_state_dict(checkpoint):
    state_dict = extract_state_dict(checkpoint, 'a.pth')
    assert type(state_dict) is dict
    assert_equal(state_dict, {'w': torch.ones(1)})


def test_module_prefix_that_not_all_share_stays():
    state_dict = {'module.w': torch.ones(1), 'w': torch.ones(1)}
    assert extract_state_dict(state_dict, 'a.pth').keys() == {'module.w', 'w'}
    assert extract_state_dict({'module.module.w': torch.ones(1)}, 'a.pth').keys() == {'module.w'}


@pytest.mark.parametrize('checkpoint, found', [
    ({'epoch': 1, 'optimizer': {}}, 'found epoch, optimizer'),
    ({'state_dict': {'w': 1}}, 'found state_dict'),
    ({'state_dict': {}}, 'found state_dict'),
    ({}, 'found an empty dict'),
    ([torch.ones(1)], 'found a list'),
    ({f'key{i}': i for i in range(99)}, 'key9, ...'),
    ({0: torch.ones(1)}, 'found 0'),
])
def test_no_state_dict(checkpoint, found):
    with pytest.raises(UserError, match='a.pth holds no weights') as caught:
        extract_state_dict(checkpoint, 'a.pth')
    assert found in str(caught.value)


def test_sha256(tmp_path):
    data = bytes(range(256)) * 5000  # more than one piece
    path = tmp_path / 'a.bin'
    path.write_bytes(data)
    assert sha256_of_file(path) == hashlib.sha256(data).hexdigest()
    path.write_bytes(b'')
    with pytest.raises(UserError, match='it is empty'):
        sha256_of_file(path)


def test_sha256_of_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'x')

    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(builtins, 'open', refuse)
    for function in (sha256_of_file, load_checkpoint_file):
        with pytest.raises(UserError, match='Permission denied'):
            function(path)


def test_require_finite():
    good = {'w': torch.ones(2), 'count': torch.tensor(2**40), 'none': torch.zeros(0),
            'mask': torch.tensor([True]), 'half': torch.tensor([6e4], dtype=torch.float16)}
    require_finite(good, 'a.pth')
    bad = dict(good, a=torch.tensor([0., float('nan')]), b=torch.tensor(float('-inf')).bfloat16())
    with pytest.raises(UserError, match=r'a.pth holds NaN or infinity in a, b\. '):
        require_finite(bad, 'a.pth')
    bad.update(c=bad['a'], d=bad['a'], e=bad['a'])
    with pytest.raises(UserError, match=r'in a, b, c and 2 more\. '):
        require_finite(bad, 'a.pth')


@pytest.mark.skipif(not hasattr(torch, 'float8_e4m3fn'), reason='torch without 8-bit floats')
def test_require_finite_in_8_bits():
    require_finite({'w': torch.ones(2).to(torch.float8_e4m3fn)}, 'a.pth')
    with pytest.raises(UserError, match='NaN or infinity in w'):
        require_finite({'w': torch.full((2, ), float('nan')).to(torch.float8_e4m3fn)}, 'a.pth')
