# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Read checkpoints from elsewhere without running what they ask for.

A torch checkpoint is a pickle, and a pickle can call any function. The reader
here refuses every global that is not on a short list, which covers what
OpenMMLab, timm, DeiT and the Swin authors publish: tensors, containers, numpy
arrays, log histories, configs and command-line arguments.

The list alone would not be enough. Through a listed name a pickle could still
overwrite methods of a listed class, hand numpy raw memory as object pointers,
or have torch write "source patches" to disk. So the opcodes that call, change
and fill objects are guarded too, which only the pickle machine written in
Python allows, and numpy objects are rebuilt by functions of our own.
"""

import _compat_pickle
import argparse
import collections
import datetime
import hashlib
import inspect
import logging
import os
import pickle
import tarfile
import types
from typing import Any, BinaryIO, Callable, Dict, Mapping, Tuple, Union

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor

from psaq_mm.errors import UserError

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
        Any: What was saved, most often a dict. A yacs ``CfgNode`` in it
        becomes a :class:`CfgNode` of this module unless ``trust`` is set.

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
            _require_torch_format(file, head, path)
            if trust:
                print_log(f'{path} is loaded as trusted: it may run any code.',
                          logger='current', level=logging.WARNING)
                return torch.load(file, map_location='cpu', weights_only=False)
            return _load_restricted(file, path)
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
    """Find the weights in a loaded checkpoint.

    They are taken from ``checkpoint['state_dict']``, else from
    ``checkpoint['model']``, else ``checkpoint`` itself is the state dict. The
    prefix ``module.`` that ``DistributedDataParallel`` adds is removed.

    Args:
        checkpoint (Any): What :func:`load_checkpoint_file` returned.
        path (str or PathLike): Where it came from, for the message.

    Returns:
        Dict[str, Tensor]: Weights by name.

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


def sha256_of_file(path: PathLike) -> str:
    """Hash a file piece by piece.

    Args:
        path (str or PathLike): File to read.

    Returns:
        str: SHA-256 in 64 lower-case hexadecimal digits.

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
    """Refuse weights that hold NaN or infinity.

    Args:
        state_dict (Mapping[str, Tensor]): Weights by name. Only those of a
            floating-point dtype are looked at.
        path (str or PathLike): Where they came from, for the message.

    Raises:
        UserError: If a weight is not finite; the first three are named.
    """
    broken = [name for name, value in state_dict.items() if not _is_finite(value)]
    if broken:
        more = f' and {len(broken) - 3} more' if len(broken) > 3 else ''
        raise UserError(f'{os.fspath(path)} holds NaN or infinity in {", ".join(broken[:3])}'
                        f'{more}. Its training diverged or the file is damaged: '
                        'give another checkpoint.')


class CfgNode(dict):
    """Inert stand-in for ``yacs.config.CfgNode``.

    The Swin authors' checkpoints keep their training config in one. Pickled
    again, it becomes an ordinary dict, so that no file depends on this class.
    """

    def __reduce__(self) -> Tuple[Any, ...]:
        return dict, (dict(self), )


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
        # weights_only=True would need torch.serialization.safe_globals, which torch has since
        # 2.5; the pickle module can be given in all versions.
        return torch.load(file, map_location='cpu', weights_only=False,
                          pickle_module=_restricted_pickle())
    except _RefusedError as refused:
        raise UserError(f'{path} {refused}, which a checkpoint has no need of. If you trust '
                        'where the file comes from, pass --trust-checkpoint (in Python: '
                        'trust=True).') from refused


# The pickle machine


class _RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that is not allowed."""


# Only in the machine written in Python, which this is, can opcodes be guarded. It is slower than
# the one in C, but a checkpoint has few opcodes: the weights are not among them.
_PythonUnpickler: Any = pickle._Unpickler


class _RestrictedUnpickler(_PythonUnpickler):
    """Unpickler that knows the allowed globals and calls or changes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _compat_pickle.NAME_MAPPING:  # as protocols below 3 write them
            module, name = _compat_pickle.NAME_MAPPING[(module, name)]
        else:
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full_name = f'{module}.{name}'
        if full_name in _CALLABLES:
            return _CALLABLES[full_name]
        if full_name in _CONSTANTS:
            return _CONSTANTS[full_name]
        if _is_torch_value(module, name) or _is_numpy_dtype_class(module, name):
            return getattr({'torch': torch, 'numpy.dtypes': np.dtypes}[module], name)
        raise _RefusedError(f'asks to run `{full_name}` when loaded')

    def _require_callable(self, target: Any) -> None:
        if id(target) not in _CALLABLE_IDS:
            name = getattr(target, '__qualname__', type(target).__qualname__)
            raise _RefusedError(f'asks to call `{name}` when loaded')

    def _instantiate(self, klass: Any, args: Any) -> None:  # opcodes INST and OBJ
        self._require_callable(klass)
        super()._instantiate(klass, args)

    def load_reduce(self) -> None:
        self._require_callable(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        self._require_callable(self.stack[-2])
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        self._require_callable(self.stack[-3])
        super().load_newobj_ex()

    def load_build(self) -> None:
        self.stack[-1] = _checked_state(self.stack[-2], self.stack[-1])
        super().load_build()

    def load_append(self) -> None:
        _require_type(self.stack[-2], list)
        super().load_append()

    def load_appends(self) -> None:
        _require_type(self.metastack[-1][-1], list)
        super().load_appends()

    def load_setitem(self) -> None:
        _require_type(self.stack[-3], dict)
        super().load_setitem()

    def load_setitems(self) -> None:
        _require_type(self.metastack[-1][-1], dict)
        super().load_setitems()

    def load_additems(self) -> None:
        _require_type(self.metastack[-1][-1], set)
        super().load_additems()

    def load_binpersid(self) -> None:
        saved_id = self.stack[-1]
        # With 'module', torch would compare source code and write the difference to a file.
        if not isinstance(saved_id, tuple) or saved_id[0] not in ('storage', b'storage'):
            raise _RefusedError('asks to load something other than tensors by reference')
        super().load_binpersid()

    def load_persid(self) -> None:
        raise _RefusedError('asks to load something other than tensors by reference')

    def load_extension(self) -> None:
        raise _RefusedError('asks for an entry of the copyreg extension registry')

    dispatch = {
        **_PythonUnpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
        pickle.BINPERSID[0]: load_binpersid,
        pickle.PERSID[0]: load_persid,
        pickle.EXT1[0]: load_extension,
        pickle.EXT2[0]: load_extension,
        pickle.EXT4[0]: load_extension,
    }


def _restricted_pickle() -> Any:
    """Module-like object with the parts of ``pickle`` that torch.load uses."""

    def load(file: BinaryIO, **kwargs: Any) -> Any:
        return _RestrictedUnpickler(file, **kwargs).load()

    module = types.ModuleType('psaq_mm_restricted_pickle')
    module.__dict__.update(Unpickler=_RestrictedUnpickler, load=load)
    return module


def _require_type(target: Any, expected: type) -> None:
    # An object with an attribute `append` or `extend` would have that called instead.
    if not isinstance(target, expected):
        raise _RefusedError(f'asks to fill a `{type(target).__qualname__}` when loaded')


def _checked_state(target: Any, state: Any) -> Any:
    """State that the opcode BUILD may give to an object.

    Args:
        target (Any): Object to be changed.
        state (Any): State that the pickle asks for.

    Returns:
        Any: The state to use.
    """
    if isinstance(target, np.dtype):
        # Of a dtype's own state only the byte order may change: with other flags, numpy would
        # take bytes for object pointers.
        own_state = target.__reduce__()[2]
        return (own_state[0], state[1], *own_state[2:])
    if type(target) is np.ndarray:
        return state
    if type(target) is HistoryBuffer and isinstance(state, dict):
        # Loading these updates a table of the class, for the whole process.
        methods = state.get('statistics_methods', {})
        _require_type(methods, dict)
        for name, method in methods.items():
            if method is not _history_buffer_method(HistoryBuffer, name):
                raise _RefusedError(f'asks to change `HistoryBuffer.{name}` when loaded')
        return state
    if type(target) in _TYPES_WITH_ATTRIBUTES and isinstance(state, dict):
        return state
    # Among these: classes and functions, whose change would outlive the loading.
    name = getattr(target, '__qualname__', type(target).__qualname__)
    raise _RefusedError(f'asks to change `{name}` when loaded')


# Harmless counterparts of functions that do more than a checkpoint needs


def _encode_latin1(text: str, encoding: str = 'latin1') -> bytes:
    """``_codecs.encode`` as protocol 2 writes bytes."""
    if encoding not in ('latin1', 'latin-1'):
        raise _RefusedError(f'asks to run `_codecs.encode` with {encoding!r} when loaded')
    return text.encode('latin1')


def _history_buffer_method(owner: Any, name: Any) -> Any:
    """``getattr`` for the one use that checkpoints of mmengine have."""
    if owner is HistoryBuffer and isinstance(name, str) and not name.startswith('_'):
        method = HistoryBuffer.__dict__.get(name)
        if inspect.isfunction(method):
            return method
    raise _RefusedError(
        f'asks to run `getattr({getattr(owner, "__qualname__", owner)}, {name!r})` when loaded')


def _rebuild_from_type(function: Any, new_type: Any, args: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2`` for tensors and parameters."""
    if id(function) not in _CALLABLE_IDS or not isinstance(state, dict) or new_type not in (
            torch.Tensor, torch.nn.Parameter):
        raise _RefusedError('asks to build a tensor of a class of its own when loaded')
    return torch._tensor._rebuild_from_type_v2(function, new_type, args, state)


def _numpy_dtype(spec: Any, align: bool = False, copy: bool = True) -> np.dtype:
    """``numpy.dtype`` of numbers and strings; not of objects or records."""
    # A copy, since the byte order of the result may be set.
    dtype = np.dtype(spec, False, True) if isinstance(spec, str) else None
    if dtype is None or dtype.kind not in 'biufcSU':
        raise _RefusedError(f'holds a numpy array of dtype {spec!r}')
    return dtype


def _numpy_array(subtype: Any, shape: Any, typecode: Any) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``, whose result BUILD then fills."""
    if subtype is not np.ndarray:
        raise _RefusedError(f'holds a numpy array of class {subtype!r}')
    return np.ndarray((0, ), np.int8)


def _numpy_scalar(dtype: Any, data: bytes) -> Any:
    """``numpy.core.multiarray.scalar``."""
    _require_type(dtype, np.dtype)
    return np.ndarray((), dtype, data)[()]


def _numpy_array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``, as protocol 5 writes arrays."""
    _require_type(dtype, np.dtype)
    return np.frombuffer(data, dtype).reshape(shape, order=order)


# The allowed globals


def _callables() -> Dict[str, Callable[..., Any]]:
    """What a pickle may call, by full name."""
    allowed: Dict[str, Callable[..., Any]] = {
        'torch.Size': torch.Size,
        'torch.device': torch.device,
        'torch.nn.parameter.Parameter': torch.nn.Parameter,
        'torch._tensor._rebuild_from_type_v2': _rebuild_from_type,
        'numpy.dtype': _numpy_dtype,
        '_codecs.encode': _encode_latin1,
        'builtins.getattr': _history_buffer_method,
        'collections.OrderedDict': collections.OrderedDict,
        'collections.defaultdict': collections.defaultdict,
        'collections.Counter': collections.Counter,
        'argparse.Namespace': argparse.Namespace,
        'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
        'mmengine.config.config.ConfigDict': ConfigDict,
        'yacs.config.CfgNode': CfgNode,
    }
    for kind in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, range, set,
                 slice, str, tuple):
        allowed[f'builtins.{kind.__name__}'] = kind
    for name in ('date', 'datetime', 'time', 'timedelta', 'timezone'):
        allowed[f'datetime.{name}'] = getattr(datetime, name)
    for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3',
                 '_rebuild_parameter', '_rebuild_parameter_with_state', '_rebuild_qtensor',
                 '_rebuild_device_tensor_from_cpu_tensor'):
        if hasattr(torch._utils, name):  # some came after torch 2.1
            allowed[f'torch._utils.{name}'] = getattr(torch._utils, name)
    for package in ('numpy.core', 'numpy._core'):  # before and since numpy 2
        allowed[f'{package}.multiarray._reconstruct'] = _numpy_array
        allowed[f'{package}.multiarray.scalar'] = _numpy_scalar
        allowed[f'{package}.numeric._frombuffer'] = _numpy_array_from_buffer
    return allowed


def _is_torch_value(module: str, name: str) -> bool:
    """Whether this is a dtype or a quantization scheme, which pickle by name."""
    kinds = (torch.dtype, torch.qscheme)
    return module == 'torch' and isinstance(torch.__dict__.get(name), kinds)


def _is_numpy_dtype_class(module: str, name: str) -> bool:
    # numpy.dtypes came with numpy 1.25.
    classes: Dict[str, Any] = getattr(getattr(np, 'dtypes', None), '__dict__', {})
    return module == 'numpy.dtypes' and name.endswith('DType') and name in classes


_CALLABLES = _callables()
_CALLABLE_IDS = frozenset(id(function) for function in _CALLABLES.values())
# What a pickle may mention but not call. torch itself looks up names such as FloatStorage.
_CONSTANTS: Dict[str, Any] = {
    'torch.Tensor': torch.Tensor,
    'torch.storage.TypedStorage': torch.storage.TypedStorage,
    'torch.storage.UntypedStorage': torch.storage.UntypedStorage,
    'numpy.ndarray': np.ndarray,
}
_TYPES_WITH_ATTRIBUTES = (collections.OrderedDict, collections.defaultdict, collections.Counter,
                          argparse.Namespace, ConfigDict, CfgNode)


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
