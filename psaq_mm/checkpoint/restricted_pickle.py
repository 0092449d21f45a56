# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A pickle machine that builds tensors, strings, numbers and containers only.

A pickle can call any function. This machine calls those that rebuild tensors,
and nothing else. Objects that checkpoints also hold (numpy arrays, log
histories, schedulers, configs, command-line arguments, whatever a third
package defines) are not weights and are skipped: a :class:`Skipped` takes
their place, and nothing of theirs runs. Any other name of Python's standard
library, torch and numpy is refused: weights have no need of it.

Why not ``torch.load(weights_only=True)``, where torch has it: that one calls
``bytearray`` with any number (14 bytes of pickle take 4 GB; no list of safe
globals takes it back), knows no pickle protocol above 3, cannot skip, and is
another machine in each version of torch. Here one short list is read by all.
"""
import _compat_pickle
import collections
import os
import pickle
import re
import sys
import types
from typing import Any, BinaryIO, Callable, Dict

import torch
from torch import Tensor

from .stock_loader_guard import StockLoaderGuard


class RefusedError(pickle.UnpicklingError):
    """The pickle asks for something that is not allowed."""


class Skipped:
    """Takes the place of an object that is not rebuilt."""


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
        if full_name in _STORAGES:
            return _STORAGES[full_name]
        if module == 'torch' and isinstance(torch.__dict__.get(name), torch.dtype):
            return torch.__dict__[name]
        if _SKIPPED_NAMES.fullmatch(full_name) or module.partition('.')[0] not in _KNOWN_PACKAGES:
            return Skipped()
        raise RefusedError(f'asks to run `{full_name}` when loaded')

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], args)

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            _require_type(self.stack[-2], Skipped, 'call')  # nothing listed takes keywords
        self.load_reduce()

    def _instantiate(self, klass: Any, args: Any) -> None:  # opcodes INST and OBJ
        self.append(_call(klass, tuple(args)))

    def load_build(self) -> None:
        self.stack.pop()  # no attributes are set, on anything
        _require_type(self.stack[-1], (dict, Skipped), 'change')

    def load_append(self) -> None:
        self._fill(list, [self.stack.pop()])

    def load_appends(self) -> None:
        self._fill(list, self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(dict, [key, value])

    def load_setitems(self) -> None:
        self._fill(dict, self.pop_mark())

    def load_additems(self) -> None:
        self._fill(set, self.pop_mark())

    def _fill(self, kind: type, items: Any) -> None:
        target = self.stack[-1]
        _require_type(target, (kind, Skipped), 'fill')
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            target.update(items)
        elif isinstance(target, dict):
            target.update(zip(items[::2], items[1::2]))

    def load_binpersid(self) -> None:
        saved_id = self.stack[-1]
        # With 'module', torch would compare source code and write the difference to a file.
        if not isinstance(saved_id, tuple) or saved_id[0] not in ('storage', b'storage'):
            self.load_persid()
        super().load_binpersid()

    def load_persid(self) -> None:
        raise RefusedError('asks to load something other than tensors by reference')

    def load_extension(self) -> None:
        raise RefusedError('asks for an entry of the copyreg extension registry')

    dispatch = {
        **_PythonUnpickler.dispatch,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
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


def _require_type(target: Any, expected: Any, verb: str) -> None:
    # An object with an attribute `append` or `extend` would have that called instead.
    if not isinstance(target, expected):
        name = getattr(target, '__qualname__', type(target).__qualname__)
        raise RefusedError(f'asks to {verb} `{name}` when loaded')


def _call(function: Any, args: Any) -> Any:
    """Call what may be called; what is skipped stays so, whatever its arguments."""
    if isinstance(function, Skipped):
        return function
    if not any(function is allowed for allowed in _CALLABLES.values()):
        _require_type(function, Skipped, 'call')
    return function(*args)


# The allowed globals


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor:
    """``torch._utils._rebuild_tensor`` and its later versions, for weights.

    torch would let a storage grow to whatever size is asked for.
    """
    dtypes = [value for value in rest if isinstance(value, torch.dtype)]  # version 3
    dtype = dtypes[0] if dtypes else storage.dtype
    data = getattr(storage, '_untyped_storage', storage)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride))
    width = torch.empty((), dtype=dtype).element_size()
    if 0 not in size and (end * width > data.nbytes() or min((0, *stride)) < 0):
        raise RefusedError('holds a tensor that is larger than its storage')
    return torch.empty(0, dtype=dtype, device=data.device).set_(data, offset, tuple(size),
                                                                tuple(stride))


def _with_attributes(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """``torch._tensor._rebuild_from_type_v2``, without the attributes."""
    return _call(function, args)


def _data(data: Tensor, *rest: Any) -> Tensor:
    """A parameter's data."""
    return data


def _plain_dict(values: Any = ()) -> Dict[Any, Any]:
    """``ConfigDict`` as the dict that it is made of; meta data are held in some."""
    return values if isinstance(values, dict) else {}


_CALLABLES: Dict[str, Callable[..., Any]] = {
    'torch.Size': torch.Size,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor,
    'torch._utils._rebuild_parameter': _data,
    'torch._utils._rebuild_parameter_with_state': _data,
    'torch._tensor._rebuild_from_type_v2': _with_attributes,
    'collections.OrderedDict': collections.OrderedDict,
    'mmengine.config.config.ConfigDict': _plain_dict,
    'psaq_mm.checkpoint.stock_loader_guard.StockLoaderGuard': StockLoaderGuard,
}
# What a pickle may mention but not call. torch itself looks up names such as FloatStorage.
_STORAGES = {f'torch.storage.{kind.__name__}': kind for kind in (torch.storage.TypedStorage,
                                                                  torch.storage.UntypedStorage)}
_KNOWN_PACKAGES = {
    'torch', 'numpy', 'psaq_mm', 'nt', 'posix', *sys.builtin_module_names,
    *getattr(sys, 'stdlib_module_names', ()),  # since Python 3.10; before, what is installed
    *(name.partition('.')[0] for folder in (os.path.dirname(os.__file__), )
      for name in os.listdir(folder))}
"""Of names in these, only those that are listed are skipped."""

_SKIPPED_NAMES = re.compile(
    r'builtins\.(bool|bytearray|bytes|complex|dict|float|frozenset|getattr|int|list|object|range|'
    r'set|slice|str|tuple)|_codecs\.encode|collections\.(Counter|defaultdict|deque)|'
    r'argparse\.Namespace|datetime\.(date|datetime|time|timedelta|timezone)|'
    r'decimal\.Decimal|enum\.\w+|pathlib\.\w+|types\.SimpleNamespace|uuid\.UUID|'
    r'numpy\.(dtype|ndarray|dtypes\.\w+DType)|numpy\._?core\.multiarray\.(_reconstruct|scalar)|'
    r'numpy\._?core\.numeric\._frombuffer|torch\.(Tensor|device|\w+_affine\w*)|'
    r'torch\.nn\.parameter\.Parameter|torch\.optim\.[\w.]+|'
    r'mmengine\.(config|logging|optim)\.[\w.]+|mmcv\.utils\.config\.\w+|yacs\.config\.CfgNode')
