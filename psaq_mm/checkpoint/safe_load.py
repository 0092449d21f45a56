# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Read checkpoints from elsewhere without running what they ask for.

A torch checkpoint is a pickle, and a pickle can call any function: see
``restricted_pickle.py`` for what is let through. Around it, only those formats
are let through that torch reads with the pickle machine it is given, and a
file in a format with checksums is checked against them before it is used.
"""
import hashlib
import logging
import os
import tarfile
from typing import Any, BinaryIO, Dict, Mapping, Union

import torch
from mmengine.logging import print_log
from torch import Tensor

from psaq_mm.errors import UserError

from .integrity import require_digest, require_undamaged
from .restricted_pickle import RefusedError, restricted_pickle

PathLike = Union[str, 'os.PathLike[str]']

_ZIP_MAGIC = b'PK\x03\x04'
_PICKLE_MAGIC = b'\x80'  # protocol 2 and later; torch.save writes nothing older
_LFS_MAGIC = b'version https://git-lfs'


def load_checkpoint_file(path: PathLike, trust: bool = False) -> Any:
    """Load a checkpoint onto the CPU without running code from it.

    Reads what ``torch.save`` writes, in the zip format and the older one, and
    ``.safetensors`` files.

    Args:
        path (str or PathLike): File to read.
        trust (bool): Whether to let the file run code, as a plain
            ``torch.load(weights_only=False)`` does. Defaults to False.

    Returns:
        Any: What was saved, most often a dict. Unless ``trust`` is set,
        objects other than tensors, strings, numbers and containers are
        skipped: see ``restricted_pickle``.

    Raises:
        UserError: If there is no such file, it is no checkpoint or a damaged
            one, or it asks for something that is not on the list.
    """
    path = os.fspath(path)
    _require_file(path)
    try:
        with open(path, 'rb') as file:
            head = file.read(64)
            file.seek(0)
            if head.startswith(_LFS_MAGIC):
                raise UserError(f'{path} is not a checkpoint but a Git LFS pointer to one. '
                                'Run `git lfs pull` to fetch the file itself.')
            if path.lower().endswith('.safetensors'):
                return _load_safetensors(path)
            has_digest = head.startswith(_ZIP_MAGIC) and require_undamaged(file, path)
            _require_torch_format(file, head, path)
            if trust:
                print_log(f'{path} is loaded as trusted: it may run any code.',
                          logger='current', level=logging.WARNING)
                content = torch.load(file, map_location='cpu', weights_only=False)
            else:
                content = _load_restricted(file, path)
            require_digest(content, has_digest, path)
            return content
    except UserError:
        raise
    except ImportError as error:  # only a trusted file gets as far as this
        raise UserError(f'{path} needs a package that is not installed: {error}. '
                        'Install it, or load the file without trust.') from error
    # A damaged file can fail anywhere in torch, pickle or numpy, with any exception.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f'{path} is not a checkpoint that can be read, it may be damaged or '
                        f'incomplete: {reason}. Fetch or save it again.') from error


def extract_state_dict(checkpoint: Any, path: PathLike) -> Dict[str, Tensor]:
    """Find the weights in what :func:`load_checkpoint_file` returned of a file.

    They are taken from ``checkpoint['state_dict']``, else from
    ``checkpoint['model']``, else ``checkpoint`` itself is the state dict. The
    prefix ``module.`` that ``DistributedDataParallel`` adds is removed.

    Raises:
        UserError: If none of the three places holds tensors by name.
    """
    found = f'a {type(checkpoint).__name__}'
    if isinstance(checkpoint, Mapping):
        for candidate in (checkpoint.get('state_dict'), checkpoint.get('model'), checkpoint):
            if isinstance(candidate, Mapping) and _holds_tensors_by_name(candidate):
                return _without_module_prefix(dict(candidate))
        keys = [str(key) for key in checkpoint]
        found = ', '.join(keys[:10]) + (', ...' if len(keys) > 10 else '') or 'an empty dict'
    raise UserError(f"{os.fspath(path)} holds no weights: expected tensors by name under "
                    f"'state_dict', under 'model' or at the top, found {found}.\n"
                    'Give a checkpoint of the float model.')


def meta_of(checkpoint: Any) -> Dict[str, Any]:
    """The ``meta`` of a loaded checkpoint; an empty dict if it has none."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    return dict(meta) if isinstance(meta, Mapping) else {}


def sha256_of_file(path: PathLike) -> str:
    """SHA-256 of a file, in 64 lower-case hexadecimal digits.

    Raises:
        UserError: If the file cannot be read.
    """
    path = os.fspath(path)
    _require_file(path)
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            for piece in iter(lambda: file.read(1 << 20), b''):
                digest.update(piece)
    except OSError as error:
        raise UserError(f'{path} could not be read: {error.strerror or error}.') from error
    return digest.hexdigest()


def require_finite(state_dict: Mapping[str, Tensor], path: PathLike) -> None:
    """Refuse weights of a file, by name, that hold NaN or infinity.

    Raises:
        UserError: If a weight is not finite; the first three are named.
    """
    broken = [name for name, value in state_dict.items() if not _is_finite(value)]
    if broken:
        more = f' and {len(broken) - 3} more' if len(broken) > 3 else ''
        raise UserError(f'{os.fspath(path)} holds NaN or infinity in {", ".join(broken[:3])}'
                        f'{more}. Its training diverged or the file is damaged: '
                        'give another checkpoint.')


# Files


def _require_file(path: str) -> None:
    if os.path.isdir(path):
        raise UserError(f'{path} is not a checkpoint but a folder. Give a file in it.')
    if not os.path.exists(path):
        hint = 'Download it first' if '://' in path else 'Check the path'
        raise UserError(f'{path} is not a checkpoint: there is no such file. {hint}.')
    if not os.path.isfile(path):
        raise UserError(f'{path} is not a checkpoint: it is not a regular file.')
    if os.path.getsize(path) == 0:
        raise UserError(f'{path} is not a checkpoint: it is empty. Fetch or save it again.')


def _require_torch_format(file: BinaryIO, head: bytes, path: str) -> None:
    """Let through only what torch.load reads with the pickle module it is given."""
    file.seek(0)
    if head.startswith(_ZIP_MAGIC):
        # The same reader as torch.load uses: another one could be made to see other records.
        records = torch._C.PyTorchFileReader(file).get_all_records()
        if 'constants.pkl' in records:  # torch.load would hand it to torch.jit.load
            raise UserError(f'{path} is a TorchScript program, not a checkpoint. '
                            'Give a file with weights saved by torch.save.')
    elif not head.startswith(_PICKLE_MAGIC) or _is_tar(file):
        # torch.load would unpack a tar archive, its format before 2017, into a temporary folder.
        raise UserError(f'{path} is not a checkpoint: expected a file written by torch.save '
                        f'or a .safetensors file, but it begins with {head[:16]!r}.')
    file.seek(0)


def _is_tar(file: BinaryIO) -> bool:
    try:
        tarfile.open(fileobj=file, mode='r:').close()
    except tarfile.TarError:
        return False
    finally:
        file.seek(0)
    return True


def _load_safetensors(path: str) -> Dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f'{path} needs a package to be read. '
                        'Run `pip install safetensors`.') from error
    return load_file(path)


def _load_restricted(file: BinaryIO, path: str) -> Any:
    if os.environ.get('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0').lower() in ('1', 'y', 'yes', 'true'):
        raise UserError(f'{path} cannot be read while TORCH_FORCE_WEIGHTS_ONLY_LOAD is set. '
                        'Unset it: psaq_mm reads checkpoints without running code by itself.')
    try:
        return torch.load(file, map_location='cpu', weights_only=False,
                          pickle_module=restricted_pickle())
    except RefusedError as refused:
        raise UserError(f'{path} {refused}, which a checkpoint has no need of. If you trust '
                        'where the file comes from, pass --trust-checkpoint (in Python: '
                        'trust=True).') from refused


# State dicts


def _holds_tensors_by_name(mapping: Mapping[Any, Any]) -> bool:
    return len(mapping) > 0 and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in mapping.items())


def _without_module_prefix(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    prefix = 'module.'
    if not all(name.startswith(prefix) for name in state_dict):
        return state_dict
    return {name[len(prefix):]: value for name, value in state_dict.items()}


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point() or value.is_meta:
        return True
    if value.element_size() == 1:  # torch.isfinite does not know the 8-bit floats
        value = value.float()
    return bool(torch.isfinite(value).all())
