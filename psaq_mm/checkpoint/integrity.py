# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Is a checkpoint still what was written?

torch stores the CRC of every record of its zip format and never looks at it.
Here every byte of a file is looked at before it is used.

What we write ourselves ends with a SHA-256 of everything before it, as the
comment of the zip archive, which torch's reader skips. In any other zip file
the records must have their CRCs, and all bytes around them must be those that
follow from its directory, so that a change anywhere is found. The format of
torch before 1.6 holds no checksums, that of safetensors none of its values.
"""
import hashlib
import os
import struct
import zipfile
from typing import BinaryIO, Iterator, Set, Tuple

from psaq_mm.errors import UserError

DIGEST_KEY = 'psaq_mm_digest'
"""Key in a saved dict that says that the file must end with a digest."""

_PIECE = 1 << 20
_COMMENT = b'psaq_mm sha256 '
_COMMENT_LENGTH = len(_COMMENT) + 64

_LOCAL = struct.Struct('<4s5H3L2H')
_ENTRY = struct.Struct('<4s6H3L5H2L')
_END = struct.Struct('<4s4H2LH')
_END_64 = struct.Struct('<4sQ2H2L4Q')
_LOCATOR = struct.Struct('<4sLQL')
_MAX = 0xFFFFFFFF


def digest_comment(archive: memoryview) -> bytes:
    """Make room for a digest in a zip archive, whose last two bytes, the length of its comment,
    are changed; the comment, to be written behind the archive, is returned.
    """
    archive[-2:] = struct.pack('<H', _COMMENT_LENGTH)
    return _COMMENT + hashlib.sha256(archive).hexdigest().encode()


def require_undamaged(file: BinaryIO, path: str) -> bool:
    """Check all bytes of a zip file; whether it holds a digest of its own is returned.

    Raises:
        UserError: If a byte has changed, or bytes are missing or too many.
    """
    size = file.seek(0, os.SEEK_END)
    tail = _read(file, max(0, size - _COMMENT_LENGTH - 2), _COMMENT_LENGTH + 2)
    has_digest = tail.startswith(struct.pack('<H', _COMMENT_LENGTH) + _COMMENT)
    if has_digest:
        digest = hashlib.sha256()
        for piece in _pieces(file, size - _COMMENT_LENGTH):
            digest.update(piece)
        same = tail[-64:] == digest.hexdigest().encode()
        flaw = '' if same else 'its content has not the digest that it was saved with'
    else:
        try:
            flaw = _flaw_around_records(file, size) or _flaw_in_records(file)
        except OSError:
            raise
        except Exception as error:  # zipfile has many for what it was not made for
            flaw = f'it is not a whole zip archive ({error})'
    if flaw:
        raise UserError(f'{path} is damaged: {flaw}; fetch or save it again')
    return has_digest


def require_digest(content: object, has_digest: bool, path: str) -> None:
    """Refuse a file that has lost its digest.

    Args:
        content (object): What was read; :data:`DIGEST_KEY` is taken out.
        has_digest (bool): What :func:`require_undamaged` said.

    Raises:
        UserError: If there must be one and there is none.
    """
    if isinstance(content, dict) and content.pop(DIGEST_KEY, None) is not None \
            and not has_digest:
        raise UserError(f'{path} is damaged: the digest that it was saved with is missing; '
                        'fetch or save it again')


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _pieces(file: BinaryIO, stop: int) -> Iterator[bytes]:
    for start in range(0, stop, _PIECE):
        yield _read(file, start, min(_PIECE, stop - start))


def _flaw_in_records(file: BinaryIO) -> str:
    with zipfile.ZipFile(file) as archive:
        name = archive.testzip()
    return f'its record {name} has not the checksum that it was saved with' if name else ''


def _flaw_around_records(file: BinaryIO, size: int) -> str:
    """What is wrong with a zip archive, its records' content aside."""
    start, length, count = _directory(file, size)
    directory = _read(file, start, length)
    place = offset = 0
    names: Set[bytes] = set()
    forms: Set[Tuple[int, ...]] = set()  # of what torch writes alike for all records
    paddings: Set[bool] = set()
    for _ in range(count):
        (mark, made, needed, flags, method, time, date, *stored, name_length, extra_length,
         comment_length, disk, inner, outer, where) = _ENTRY.unpack_from(directory, place)
        place += _ENTRY.size + name_length
        name, extra = directory[place - name_length:place], directory[place:place + extra_length]
        place += extra_length + comment_length
        names.add(name)
        later = flags & 8  # checksum and sizes follow the data
        forms.add((made, needed, flags - later, method, time, date, comment_length, disk, inner,
                   outer))
        crc, packed, unpacked = stored
        if extra.startswith(b'\1\0'):  # zip64: those that 4 bytes cannot hold
            large = list(struct.unpack(f'<{(extra_length - 4) // 8}Q', extra[4:]))
            unpacked, packed, where = (large.pop(0) if value == _MAX and large else value
                                       for value in (unpacked, packed, where))

        local = _LOCAL.unpack(_read(file, where, _LOCAL.size))
        same = where == offset and mark == b'PK\1\2' \
            and local[:6] == (b'PK\3\4', needed, flags, method, time, date) \
            and list(local[6:9]) in ([stored, [0, 0, 0]] if later else [stored]) \
            and file.read(local[9]) == name
        begin = file.read(local[10])
        begin, padding = begin[:extra_length], begin[extra_length:]
        # torch moves the data to a multiple of 64 bytes, and has no packed size at first.
        paddings.add(begin in (extra, extra[:12] + bytes(len(extra[12:20])) + extra[20:])
                     and padding == b'FB' + struct.pack('<H', max(0, len(padding) - 4))
                     + b'Z' * (len(padding) - 4))
        offset = file.tell() + packed
        if later:
            follows = _read(file, offset, 24)
            sums = [struct.pack('<4sL2Q', b'PK\7\x08', crc, packed, unpacked),
                    struct.pack('<4s3L', b'PK\7\x08', *stored)]
            found = [len(each) for each in sums if follows.startswith(each)]
            same = same and bool(found)
            offset += found[0] if found else 0
        if not same:
            return f'the header of its record {name.decode("latin1")!r} is not as saved'
    if (offset, place, len(names)) != (start, length, count):
        return 'its records do not fill it as they should'
    if True in paddings and (len(paddings) > 1 or len(forms) > 1):
        return 'its directory is not as saved'
    return ''


def _directory(file: BinaryIO, size: int) -> Tuple[int, int, int]:
    """Start, length and number of entries of the central directory."""
    position = size - _END.size
    mark, *zeros, count, total, length, start, comment = _END.unpack(
        _read(file, max(0, position), _END.size))
    whole = (mark, *zeros, comment, total) == (b'PK\5\6', 0, 0, 0, count)
    locator = _read(file, max(0, position - _LOCATOR.size), _LOCATOR.size)
    if locator.startswith(b'PK\6\7'):  # zip64, which torch always writes
        position -= _LOCATOR.size + _END_64.size
        small = count, length, start
        large = _END_64.unpack(_read(file, max(0, position), _END_64.size))
        count, length, start = large[7:]
        whole &= locator == _LOCATOR.pack(b'PK\6\7', 0, position, 1) \
            and large[:2] == (b'PK\6\6', _END_64.size - 12) \
            and large[2:4] in ((0x031E, 45), (45, 45)) and large[4:7] == (0, 0, count) \
            and small == (min(count, 0xFFFF), min(length, _MAX), min(start, _MAX))
    if not whole or start + length != position:
        raise zipfile.BadZipFile('its end is not as saved, or is cut off')
    return start, length, count
