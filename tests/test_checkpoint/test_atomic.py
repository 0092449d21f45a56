# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import collections
import errno
import json
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from psaq_mm.checkpoint.atomic import (
    atomic_write,
    ensure_writable_dir,
    save_bytes,
    save_json,
    save_torch,
)
from psaq_mm.checkpoint.safe_load import load_checkpoint_file
from psaq_mm.errors import UserError

OLD = b'the checkpoint that was there before'
SAVERS = {
    'torch': lambda path: save_torch({'weight': torch.ones(3)}, path),
    'json': lambda path: save_json({'weight': 1}, path),
    'bytes': lambda path: save_bytes(b'new', path),
}


def is_root():
    return hasattr(os, 'geteuid') and os.geteuid() == 0


def raiser(code):

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB."""
    if not sys.platform.startswith('linux') or not is_root():
        pytest.skip('mounting a small file system takes root on Linux')
    folder = tmp_path / 'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f'this machine does not mount a tmpfs: {error}')
    yield folder
    subprocess.run(['umount', str(folder)], check=True)


def test_saved_contents(tmp_path):
    save_torch({'weight': torch.arange(3)}, tmp_path / 'a.pth')
    assert torch.equal(torch.load(tmp_path / 'a.pth')['weight'], torch.arange(3))
    save_json({'bits': [4, 8]}, tmp_path / 'a.json')
    text = (tmp_path / 'a.json').read_bytes()
    assert text == b'{\n  "bits": [\n    4,\n    8\n  ]\n}\n'
    assert json.loads(text) == {'bits': [4, 8]}
    save_bytes(b'\0\1', str(tmp_path / 'a.bin'))
    assert (tmp_path / 'a.bin').read_bytes() == b'\0\1'
    save_bytes(b'', tmp_path / 'a.bin')
    assert (tmp_path / 'a.bin').read_bytes() == b''
    assert sorted(os.listdir(tmp_path)) == ['a.bin', 'a.json', 'a.pth']


def test_json_is_json(tmp_path):
    """It has no NaN and no Infinity: only Python reads them."""
    save_json(dict(ap=float('nan'), ranges=[float('inf'), (1.5, -float('inf'))], n=3, name='nan'),
              tmp_path / 'a.json')

    def refuse(name):
        raise AssertionError(f'{name} is no JSON')

    assert json.loads((tmp_path / 'a.json').read_text(), parse_constant=refuse) == dict(
        ap=None, ranges=[None, [1.5, None]], n=3, name='nan')



def test_relative_path_and_longest_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_bytes(b'x', 'plain')
    save_bytes(b'x', 'n' * 255)
    assert sorted(os.listdir(tmp_path)) == ['n' * 255, 'plain']


@pytest.mark.parametrize('saver', SAVERS.values(), ids=list(SAVERS))
@pytest.mark.parametrize('function', ['fsync', 'replace'])
@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_failure_keeps_the_old_file(tmp_path, monkeypatch, saver, function, code):
    path = tmp_path / 'last.pth'
    path.write_bytes(OLD)
    with monkeypatch.context() as patch:
        patch.setattr(os, function, raiser(code))
        with pytest.raises(UserError) as caught:
            saver(path)
    assert str(path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ['last.pth']


@pytest.mark.parametrize('error, expected', [
    (OSError(errno.ENOSPC, 'No space left on device'), UserError),
    (TypeError('a bug'), TypeError),
    (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_failure_in_the_middle_of_writing(tmp_path, error, expected):
    path = tmp_path / 'last.pth'
    path.write_bytes(OLD)

    def write(file):
        file.write(b'half')
        raise error

    with pytest.raises(expected):
        atomic_write(path, write)
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ['last.pth']


def test_old_file_is_whole_until_the_rename(tmp_path):
    path = tmp_path / 'last.pth'
    path.write_bytes(OLD)

    def write(file):
        file.write(b'new')
        file.flush()
        assert path.read_bytes() == OLD

    atomic_write(path, write)
    assert path.read_bytes() == b'new'


@pytest.mark.parametrize('value', [
    lambda: 0, np.zeros(2), np.float64(1), {1, 2}, b'x', 1j, torch.nn.Linear(1, 1)])
def test_what_would_not_be_read_back_is_not_saved(value, tmp_path):
    """Unsaid, a resumed run would go on without it."""
    kind = type(value).__name__
    for content in (value, {'a': [1, (2, {'b': value})]}):
        with pytest.raises(UserError, match=f'a.pth cannot be written: .* holds a .*{kind}'):
            save_torch(content, tmp_path / 'a.pth')
    assert os.listdir(tmp_path) == []


def test_what_is_saved_is_read_back(tmp_path):
    saved = dict(a=[1, 2.5, None, True, 'x', (3, (), {})], size=torch.Size([1]),
                 ordered=collections.OrderedDict(b=1), dtype=torch.float16, n={1: -2**70})
    save_torch(saved, tmp_path / 'a.pth')
    loaded = load_checkpoint_file(tmp_path / 'a.pth')
    assert loaded == saved
    assert [type(value) for value in loaded.values()] == [type(v) for v in saved.values()]


def test_a_refused_folder_sync_is_no_failure(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', files_only)
    save_bytes(b'new', tmp_path / 'a')
    assert (tmp_path / 'a').read_bytes() == b'new'


@pytest.mark.skipif(os.name == 'nt', reason='permissions of POSIX')
def test_permissions(tmp_path):
    path = tmp_path / 'a'
    before = os.umask(0o027)
    try:
        save_bytes(b'1', path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o664)
        save_bytes(b'2', path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o664
    finally:
        os.umask(before)
    assert path.read_bytes() == b'2'


@pytest.mark.skipif(os.name == 'nt', reason='symbolic links of POSIX')
def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / 'real').mkdir()
    target, link = tmp_path / 'real' / 'a', tmp_path / 'latest'
    target.write_bytes(OLD)
    link.symlink_to(target)
    save_bytes(b'new', link)
    assert link.is_symlink()
    assert target.read_bytes() == b'new'


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_bytes(OLD)
    for path in (tmp_path / 'missing' / 'a', tmp_path / 'file' / 'a', tmp_path):
        with pytest.raises(UserError, match='not be written|not a regular file') as caught:
            save_bytes(b'new', path)
        assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ['file']


@pytest.mark.skipif(not os.path.exists('/dev/null'), reason='no /dev/null')
def test_a_device_is_not_replaced():
    with pytest.raises(UserError, match='is not a regular file'):
        save_bytes(b'new', '/dev/null')
    assert not os.path.isfile('/dev/null')


@pytest.mark.skipif(is_root() or os.name == 'nt', reason='permissions do not stop root')
def test_no_permission(tmp_path):
    folder = tmp_path / 'locked'
    folder.mkdir()
    folder.chmod(0o555)
    try:
        with pytest.raises(UserError, match='Permission denied'):
            save_bytes(b'new', folder / 'a')
        with pytest.raises(UserError, match='Permission denied'):
            ensure_writable_dir(folder / 'work_dir')
    finally:
        folder.chmod(0o755)
    assert os.listdir(folder) == []


@pytest.mark.parametrize('save', [
    lambda path: save_torch(torch.zeros(100_000), path),
    lambda path: save_json([0] * 100_000, path),
    lambda path: save_bytes(bytes(100_000), path),
], ids=list(SAVERS))
def test_full_disk(tiny_disk, save):
    path = tiny_disk / 'last.pth'
    path.write_bytes(OLD)
    with pytest.raises(UserError, match='No space left on device. Free some space'):
        save(path)
    assert path.read_bytes() == OLD
    assert os.listdir(tiny_disk) == ['last.pth']


def test_full_disk_is_not_a_writable_dir(tiny_disk):
    ensure_writable_dir(tiny_disk)
    with open(tiny_disk / 'filler', 'wb', buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    with pytest.raises(UserError, match='No space left on device'):
        ensure_writable_dir(tiny_disk / 'a' / 'b')
    assert os.listdir(tiny_disk) == ['filler']


def test_ensure_writable_dir(tmp_path):
    folder = tmp_path / 'a' / 'b'
    ensure_writable_dir(folder)
    assert folder.is_dir()
    ensure_writable_dir(str(folder))
    assert os.listdir(folder) == []


def test_ensure_writable_dir_below_a_file(tmp_path):
    (tmp_path / 'file').write_bytes(OLD)
    for path in (tmp_path / 'file', tmp_path / 'file' / 'a' / 'b'):
        with pytest.raises(UserError, match='is not a folder that can be written to') as caught:
            ensure_writable_dir(path)
        assert str(path) in str(caught.value)
    assert (tmp_path / 'file').read_bytes() == OLD


def test_ensure_writable_dir_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / 'old').mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', raiser(errno.ENOSPC))
        with pytest.raises(UserError, match='No space left on device'):
            ensure_writable_dir(tmp_path / 'old' / 'a' / 'b')
        with pytest.raises(UserError, match='No space left on device'):
            ensure_writable_dir(tmp_path / 'old')
    assert os.listdir(tmp_path) == ['old']
    assert os.listdir(tmp_path / 'old') == []


# What a killed process leaves behind


@pytest.fixture
def saving(tmp_path):
    """A process in the middle of a save."""
    fork = multiprocessing.get_context('fork')
    writing = fork.Event()

    def write(file):
        file.write(b'half')
        file.flush()
        writing.set()
        time.sleep(600)

    process = fork.Process(target=atomic_write, args=(tmp_path / 'a.pth', write))
    process.start()
    assert writing.wait(60)
    yield process
    process.kill()
    process.join()


@pytest.mark.skipif(os.name != 'posix', reason='nothing is locked')
def test_next_save_removes_what_a_killed_one_left(saving, tmp_path):
    (tmp_path / '.0123456789abcdef.tmp').write_bytes(b'not of this name')
    (tmp_path / '.psaq_mm-notes.tmp').write_bytes(b'nor this')
    others = set(os.listdir(tmp_path))
    (left, ) = (name for name in others if re.fullmatch(r'\.psaq_mm-[0-9a-f]{16}\.tmp', name))
    save_bytes(b'x', tmp_path / 'b.pth')
    ensure_writable_dir(tmp_path)
    assert set(os.listdir(tmp_path)) == {*others, 'b.pth'}  # a live process goes on with its own
    saving.kill()
    saving.join()
    assert (tmp_path / left).read_bytes() == b'half'
    save_bytes(b'y', tmp_path / 'b.pth')
    assert set(os.listdir(tmp_path)) == {*others, 'b.pth'} - {left}


@pytest.mark.skipif(os.name != 'posix', reason='nothing is locked')
def test_many_processes_save_into_one_folder(tmp_path, monkeypatch):
    """None takes the file of another for left behind."""
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)

    def save(name):
        for size in range(400):
            save_bytes(b'x' * size, tmp_path / name)

    fork = multiprocessing.get_context('fork')
    processes = [fork.Process(target=save, args=(name, )) for name in 'abaa']
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == ['a', 'b']
    assert (tmp_path / 'a').stat().st_size == (tmp_path / 'b').stat().st_size == 399


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'listdir', raiser(errno.EACCES))
    save_bytes(b'x', tmp_path / 'a')
    assert (tmp_path / 'a').read_bytes() == b'x'


@pytest.mark.skipif(os.name != 'posix', reason='nothing is locked')
def test_a_share_without_locks(tmp_path, monkeypatch):
    import fcntl
    monkeypatch.setattr(fcntl, 'flock', raiser(errno.ENOLCK))
    (tmp_path / '.psaq_mm-0123456789abcdef.tmp').write_bytes(b'of whom?')
    save_bytes(b'x', tmp_path / 'a')
    assert sorted(os.listdir(tmp_path)) == ['.psaq_mm-0123456789abcdef.tmp', 'a']
