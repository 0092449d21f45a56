# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Write a file whole or not at all.

A run that is killed, or a disk that fills up, in the middle of a save must
not cost the checkpoint that was there before.
"""

import collections
import contextlib
import errno
import io
import json
import math
import os
import re
import secrets
import stat
from typing import Any, BinaryIO, Callable, Iterator, List, Optional, Union

import torch

from psaq_mm.errors import UserError

from .integrity import DIGEST_KEY, digest_comment
from .stock_loader_guard import StockLoaderGuard

try:
    import fcntl
except ImportError:  # not on POSIX: nothing is locked, and nothing left behind is found
    fcntl = None  # type: ignore[assignment]

PathLike = Union[str, 'os.PathLike[str]']

_TEMPORARY_NAME = re.compile(r'\.psaq_mm-[0-9a-f]{16}\.tmp')
_ADVICE = {
    errno.ENOSPC: 'Free some space or choose another folder.',
    errno.EDQUOT: 'Free some of your quota or choose another folder.',
    errno.EACCES: 'Choose a folder that you may write to.',
    errno.EPERM: 'Choose a folder that you may write to.',
    errno.EROFS: 'Choose a folder on a disk that is not read-only.',
    errno.ENOENT: 'Create the folder first.',
    errno.ENOTDIR: 'A part of this path is a file: choose another folder.',
    errno.EEXIST: 'A part of this path is a file: choose another folder.',
}


def atomic_write(path: PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file, then rename it to ``path``.

    Whatever goes wrong before the rename, the temporary file is removed and
    an older file at ``path`` stays as it was. The new file has the
    permissions of the file it replaces or, if there was none, those that a
    plain ``open()`` gives. A symbolic link is followed, not replaced.

    Args:
        path (str or PathLike): File to write. Its folder must exist.
        write (Callable): Called once with the open binary file.

    Raises:
        UserError: If the file cannot be written: full disk, permission,
            read-only file system, quota, missing folder. Other errors that
            ``write`` raises pass through.
    """
    shown = os.fspath(path)
    # A link is followed as open() would do; os.replace would put a file in its place.
    target = os.path.realpath(shown)
    folder = os.path.dirname(target)
    with _as_user_error(shown, 'could not be written'):
        mode = _mode_of_regular_file(target, shown)
        with _temporary_file(folder) as temporary:
            with open(temporary, 'wb') as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                with contextlib.suppress(OSError):  # FAT and some shares know no permissions
                    os.chmod(temporary, mode)
            os.replace(temporary, target)
    _sync_folder(folder)


def save_torch(obj: Any, path: PathLike) -> None:
    """Save an object with ``torch.save``, whole or not at all.

    The file ends with a digest of its content, which
    :func:`load_checkpoint_file` checks and ``torch.load`` skips.

    Args:
        obj (Any): What to save: tensors, strings, numbers and containers of
            them, as :func:`load_checkpoint_file` skips all else. A dict is
            marked with :data:`~psaq_mm.checkpoint.integrity.DIGEST_KEY`.

    Raises:
        UserError: If the file cannot be written, or holds anything else.
    """
    unreadable = _unreadable(obj)
    if unreadable:
        raise UserError(f'{os.fspath(path)} cannot be written: what is to be saved holds a '
                        f'{unreadable}, which would not be read back. Make it a tensor, a number '
                        'or a list of numbers.')
    # torch's zip writer turns a full disk into a RuntimeError about file positions, and tries to
    # write once more while it is destroyed. In memory it cannot fail; what then fails on the disk
    # is an OSError like any other.
    buffer = io.BytesIO()
    torch.save({**obj, DIGEST_KEY: 'sha256'} if type(obj) is dict else obj, buffer)
    with buffer.getbuffer() as archive:
        comment = digest_comment(archive)
    buffer.seek(0, os.SEEK_END)
    buffer.write(comment)
    save_bytes(buffer.getbuffer(), path)


_READABLE = (type(None), bool, int, float, str, torch.Tensor, torch.nn.Parameter, torch.Size,
             torch.dtype, StockLoaderGuard)


def _unreadable(value: Any) -> str:
    """The first type in nested containers that is skipped in loading, or nothing."""
    if type(value) in (dict, collections.OrderedDict):
        return next(filter(None, map(_unreadable, (*value.keys(), *value.values()))), '')
    if type(value) in (list, tuple):
        return next(filter(None, map(_unreadable, value)), '')
    return '' if type(value) in _READABLE else f'{type(value).__module__}.{type(value).__name__}'


def save_json(obj: Any, path: PathLike) -> None:
    """Save an object as JSON, indented by 2 and with a newline at the end.

    Numbers that are not finite become null: JSON has none.

    Raises:
        UserError: If the file cannot be written.
    """
    text = json.dumps(_finite(obj), indent=2, allow_nan=False)
    save_bytes((text + '\n').encode('utf-8'), path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_bytes(data: Union[bytes, memoryview], path: PathLike) -> None:
    """Save bytes, whole or not at all.

    Raises:
        UserError: If the file cannot be written.
    """
    atomic_write(path, lambda file: file.write(data))


def ensure_writable_dir(path: PathLike) -> None:
    """Create a folder if it is missing and prove that a file fits into it.

    A long run calls this first, so that it does not end with results that it
    cannot save. Nothing is left behind if it fails: neither the folder nor
    those of its parents that were missing.

    Raises:
        UserError: If the folder cannot be created or written to.
    """
    shown = os.fspath(path)
    folder = os.path.realpath(shown)
    missing: List[str] = []
    ancestor = folder
    while not os.path.lexists(ancestor):
        missing.append(ancestor)
        ancestor = os.path.dirname(ancestor)

    with _as_user_error(shown, 'is not a folder that can be written to'):
        try:
            os.makedirs(folder, exist_ok=True)
            # An empty file can be created on a full disk: ask for a block and wait for it.
            with _temporary_file(folder) as probe, open(probe, 'wb') as file:
                file.write(b'\0')
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            for created in missing:  # deepest first; rmdir removes only what is empty
                with contextlib.suppress(OSError):
                    os.rmdir(created)
            raise


@contextlib.contextmanager
def _temporary_file(folder: str) -> Iterator[str]:
    """A new file in a folder; where it still is at the end, it is removed.

    It is locked meanwhile. A lock ends with its process, however that ends, so
    a temporary file without one was left behind: those are removed first.
    """
    _remove_left_behind(folder)
    while True:
        # A new name opened with 'xb' gets the umask's permissions, which tempfile would make
        # 0600. It is not derived from the target's, which may be as long as names can be.
        path = os.path.join(folder, f'.psaq_mm-{secrets.token_hex(8)}.tmp')
        with open(path, 'xb') as held:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # some shares know no locks
                    fcntl.flock(held, fcntl.LOCK_EX)
                if not os.path.exists(path):  # another process took it for left behind
                    continue
            else:
                held.close()  # Windows does not rename an open file
            try:
                yield path
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        return


def _remove_left_behind(folder: str) -> None:
    try:
        names = os.listdir(folder) if fcntl is not None else []
    except OSError:  # such as a folder that may be written to, but not listed
        return
    for name in filter(_TEMPORARY_NAME.fullmatch, names):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError), open(path, 'rb') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)


@contextlib.contextmanager
def _as_user_error(path: str, what: str) -> Iterator[None]:
    """Turn an OSError into a UserError that names the path and the reason."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = _ADVICE.get(error.errno or 0, 'Choose another folder.')
        raise UserError(f'{path} {what}: {reason}. {advice}') from error


def _mode_of_regular_file(target: str, shown: str) -> Optional[int]:
    """Permission bits of the file to be replaced, None if there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):  # a folder, or a device such as /dev/null
        raise UserError(f'{shown} is not a regular file. Choose another name to save under.')
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Make the rename survive a power cut.

    The new file is complete and in place by now, and not every file system
    can do this for a folder, so a refusal is no failure of the save.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
