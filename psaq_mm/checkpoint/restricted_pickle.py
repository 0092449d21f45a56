# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A pickle machine that knows a short list of globals and nothing else.

A pickle can call any function. This machine refuses every global that is not
on the list at the end of this file, which covers what OpenMMLab, timm, DeiT
and the Swin authors publish: tensors, containers, numpy arrays, log histories,
configs and command-line arguments.

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
import inspect
import pickle
import types
from typing import Any, BinaryIO, Callable, Dict, Tuple

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer


class RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that is not allowed."""


class CfgNode(dict):
    """Inert stand-in for ``yacs.config.CfgNode``.

    The Swin authors' checkpoints keep their training config in one. Pickled
    again, it becomes an ordinary dict, so that no file depends on this class.
    """

    def __reduce__(self) -> Tuple[Any, ...]:
        return dict, (dict(self), )


def restricted_pickle() -> Any:
    """Module-like object with the parts of ``pickle`` that torch.load uses."""

    def load(file: BinaryIO, **kwargs: Any) -> Any:
        return _RestrictedUnpickler(file, **kwargs).load()

    module = types.ModuleType('psaq_mm_restricted_pickle')
    module.__dict__.update(Unpickler=_RestrictedUnpickler, load=load)
    return module


# The machine

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
        raise RefusedError(f'asks to run `{full_name}` when loaded')

    def _require_callable(self, target: Any) -> None:
        if id(target) not in _CALLABLE_IDS:
            name = getattr(target, '__qualname__', type(target).__qualname__)
            raise RefusedError(f'asks to call `{name}` when loaded')

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
            raise RefusedError('asks to load something other than tensors by reference')
        super().load_binpersid()

    def load_persid(self) -> None:
        raise RefusedError('asks to load something other than tensors by reference')

    def load_extension(self) -> None:
        raise RefusedError('asks for an entry of the copyreg extension registry')

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


def _require_type(target: Any, expected: type) -> None:
    # An object with an attribute `append` or `extend` would have that called instead.
    if not isinstance(target, expected):
        raise RefusedError(f'asks to fill a `{type(target).__qualname__}` when loaded')


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
                raise RefusedError(f'asks to change `HistoryBuffer.{name}` when loaded')
        return state
    if type(target) in _TYPES_WITH_ATTRIBUTES and isinstance(state, dict):
        return state
    # Among these: classes and functions, whose change would outlive the loading.
    name = getattr(target, '__qualname__', type(target).__qualname__)
    raise RefusedError(f'asks to change `{name}` when loaded')


# Harmless counterparts of functions that do more than a checkpoint needs


def _encode_latin1(text: str, encoding: str = 'latin1') -> bytes:
    """``_codecs.encode`` as protocol 2 writes bytes."""
    if encoding not in ('latin1', 'latin-1'):
        raise RefusedError(f'asks to run `_codecs.encode` with {encoding!r} when loaded')
    return text.encode('latin1')


def _history_buffer_method(owner: Any, name: Any) -> Any:
    """``getattr`` for the one use that checkpoints of mmengine have."""
    if owner is HistoryBuffer and isinstance(name, str) and not name.startswith('_'):
        method = HistoryBuffer.__dict__.get(name)
        if inspect.isfunction(method):
            return method
    raise RefusedError(
        f'asks to run `getattr({getattr(owner, "__qualname__", owner)}, {name!r})` when loaded')


def _rebuild_from_type(function: Any, new_type: Any, args: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2`` for tensors and parameters."""
    if id(function) not in _CALLABLE_IDS or not isinstance(state, dict) or new_type not in (
            torch.Tensor, torch.nn.Parameter):
        raise RefusedError('asks to build a tensor of a class of its own when loaded')
    return torch._tensor._rebuild_from_type_v2(function, new_type, args, state)


def _numpy_dtype(spec: Any, align: bool = False, copy: bool = True) -> np.dtype:
    """``numpy.dtype`` of numbers and strings; not of objects or records."""
    # A copy, since the byte order of the result may be set.
    dtype = np.dtype(spec, False, True) if isinstance(spec, str) else None
    if dtype is None or dtype.kind not in 'biufcSU':
        raise RefusedError(f'holds a numpy array of dtype {spec!r}')
    return dtype


def _numpy_array(subtype: Any, shape: Any, typecode: Any) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``, whose result BUILD then fills."""
    if subtype is not np.ndarray:
        raise RefusedError(f'holds a numpy array of class {subtype!r}')
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
