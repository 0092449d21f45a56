# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A device that is not there: its tensors compute on the CPU, and do not mix with the CPU's.

torch's own ``FakeTensorMode`` makes tensors of a GPU that is not there too, but these have no
values: a loop that looks at them cannot run, and no result can be compared. Here a tensor says
that it is on ``meta``, the only device besides the CPU that torch needs no driver for, and holds
one of the CPU that has its values. Every operation is refused that a GPU would refuse: of
tensors of both devices, or with a generator of the other one.
"""
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = torch.device('meta')
aten = torch.ops.aten
COPIES = (aten._to_copy, aten.copy_, aten.copy)
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class OtherTensor(torch.Tensor):
    """A tensor of the other device; ``inner`` holds its values."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=OTHER)

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):  # torch refuses subclasses
        return self.inner.tolist()

    def data_ptr(self):
        return self.inner.data_ptr()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what makes tensors of nothing, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def other_device(monkeypatch):
    """Within the block there is a device :data:`OTHER`."""
    autocast = torch.autocast
    monkeypatch.setattr(torch, 'autocast', lambda device_type, **kwargs: autocast(
        'cpu' if device_type == OTHER.type else device_type, **kwargs))  # torch has none for it
    with _Mode():
        yield OTHER


def _require_one_device(func, args, others, plain):
    """Raise as a GPU does."""
    packet = func.overloadpacket
    if packet in COPIES or not others or not plain:
        return
    scalars = torch.Tag.pointwise in func.tags or packet in (aten.masked_fill, aten.masked_fill_)
    if packet in INDEXING:  # of the CPU or the indexed tensor's
        scalars = True
        if isinstance(args[0], OtherTensor):
            plain = [x for x in plain if not any(x is index for index in args[1])]
    if any(x.dim() or not scalars for x in plain):
        raise RuntimeError(f'{func}: expected all tensors on the same device, found '
                           f'{[tuple(x.shape) for x in others]} on another than '
                           f'{[tuple(x.shape) for x in plain]}')


def _run(func, args, kwargs):
    others, plain = [], []

    def unwrap(x):
        if isinstance(x, OtherTensor):
            others.append(x)
            return x.inner
        if isinstance(x, torch.Tensor):
            assert x.device != OTHER, f'{func}: a tensor without values'
            plain.append(x)
        return x

    inner_args = _mapped(unwrap, args)
    inner_kwargs = {key: _mapped(unwrap, value) for key, value in kwargs.items()}
    _require_one_device(func, args, others, plain)
    device = kwargs.get('device')
    if func.overloadpacket is aten.copy_:
        elsewhere = isinstance(args[0], OtherTensor)
    else:
        elsewhere = torch.device(device) == OTHER if device is not None else bool(others)
    if elsewhere and kwargs.get('generator') is not None:
        raise RuntimeError(f'{func}: expected a generator of the device, found one of the CPU')
    if device is not None and elsewhere:
        inner_kwargs['device'] = torch.device('cpu')
    result = func(*inner_args, **inner_kwargs)
    if not elsewhere:
        return result
    wrapper_of = {id(x.inner): x for x in others}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        known = wrapper_of.get(id(x))  # changed in place
        assert known is None or known.shape == x.shape, f'{func}: the shape changed in place'
        return OtherTensor(x) if known is None else known

    return _mapped(wrap, result)


def _mapped(change, value):
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, one) for one in value])
    return change(value)
