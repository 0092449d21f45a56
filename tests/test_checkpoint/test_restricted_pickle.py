# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import argparse
import collections
import datetime
import functools
import operator
import os
import pickle
import sys
import tracemalloc
import types
import zipfile

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim import OneCycleParamScheduler

from psaq_mm.checkpoint.restricted_pickle import Skipped
from psaq_mm.checkpoint.safe_load import extract_state_dict, load_checkpoint_file
from psaq_mm.errors import UserError

FORMATS = ['zip', 'legacy']


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def save(obj, path, file_format='zip', **kwargs):
    torch.save(obj, path, _use_new_zipfile_serialization=file_format == 'zip', **kwargs)
    return path


def write_legacy(opcodes, path):
    """Wrap hand-written opcodes into a checkpoint of the older format."""
    header = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
    parts = [pickle.dumps(part, protocol=2) for part in header]
    path.write_bytes(b''.join(parts) + b'\x80\x02' + opcodes + b'.' + pickle.dumps([], protocol=2))
    return path


def write_zip(opcodes, path):
    """Wrap hand-written opcodes into a checkpoint of the zip format."""
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', b'\x80\x02' + opcodes + b'.')
        archive.writestr('archive/version', '3\n')
    return path


def assert_equal(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right):
            assert_equal(*pair)
    else:
        assert left == right


# What loads


@pytest.mark.parametrize('file_format', FORMATS)
def test_tensors(tmp_path, file_format):
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    saved = collections.OrderedDict(
        float=base, view=base[1:3, ::2], half=base.half(), bfloat16=base.bfloat16(),
        int8=torch.tensor([-128, 127], dtype=torch.int8), bool=torch.tensor([True, False]),
        scalar=torch.tensor(3), empty=torch.zeros(0, 3),
        parameter=torch.nn.Parameter(base, requires_grad=False))
    loaded = load_checkpoint_file(save(saved, tmp_path / 'a.pth', file_format))
    saved['parameter'] = saved['parameter'].detach()
    assert_equal(loaded, saved)
    assert loaded['float'].data_ptr() == loaded['parameter'].data_ptr()  # still one storage


@pytest.mark.parametrize('file_format', FORMATS)
def test_module_state_dict(tmp_path, file_format):
    saved = torch.nn.BatchNorm1d(3).state_dict()  # with _metadata, which is not kept
    assert_equal(load_checkpoint_file(str(save(saved, tmp_path / 'a.pth', file_format))), saved)


def test_tensor_with_attributes(tmp_path):
    saved = torch.ones(2)
    saved.note = 'calibrated'
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = 'frozen'
    loaded = load_checkpoint_file(save([saved, parameter], tmp_path / 'a.pth'))
    assert_equal(loaded, [torch.ones(2), torch.ones(2)])
    assert not any(hasattr(value, 'note') for value in loaded)


@pytest.mark.skipif(not hasattr(torch, 'uint16'), reason='torch before 2.3')
def test_tensor_without_a_storage_type_of_its_own(tmp_path):
    saved = {'w': torch.arange(6, dtype=torch.uint8).view(torch.uint16)[1:]}
    assert torch.equal(load_checkpoint_file(save(saved, tmp_path / 'a.pth'))['w'].view(
        torch.uint8), torch.arange(2, 6, dtype=torch.uint8))


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_plain_contents(tmp_path, file_format, protocol):
    saved = dict(
        numbers=[1, -2**70, 1.5, True, None], text='Größe', size=torch.Size([1, 2]),
        tuples=[(), (1, ), (1, (2, ))], dtype=torch.float16, empty=[{}, []],
        ordered=collections.OrderedDict(b=1, a=2))
    path = save(saved, tmp_path / 'a.pth', file_format, pickle_protocol=protocol)
    assert_equal(load_checkpoint_file(path), saved)
    # Meta data of OpenMMLab may be held in these.
    saved = dict(meta=ConfigDict(dataset_meta=dict(classes=('a', 'b'))), w=torch.ones(1))
    path = save(saved, tmp_path / 'a.pth', file_format, pickle_protocol=protocol)
    loaded = load_checkpoint_file(path)
    assert loaded['meta'] == dict(dataset_meta=dict(classes=('a', 'b')))
    assert type(loaded['meta']) is type(loaded['meta']['dataset_meta']) is dict


class Yacs(dict):
    """Pickles as yacs' CfgNode does."""

    def __init__(self, **kwargs):
        super().__init__(kwargs)
        self.__dict__['__immutable__'] = True


def one_cycle():
    """State of a scheduler that holds a method of its class."""
    parameter = torch.nn.Parameter(torch.ones(1))
    return OneCycleParamScheduler(torch.optim.SGD([parameter], lr=0.1), 'lr', eta_max=1.,
                                  total_steps=5).state_dict()


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_what_is_not_weights_is_skipped(tmp_path, monkeypatch, file_format, protocol):
    Yacs.__module__, Yacs.__qualname__, Yacs.__name__ = 'yacs.config', 'CfgNode', 'CfgNode'
    package, module = types.ModuleType('yacs'), types.ModuleType('yacs.config')
    package.config, module.CfgNode = module, Yacs
    skipped = dict(
        complex=1 + 2j, slice=slice(1, 2),
        range=range(3), counter=collections.Counter('aab'),
        default=collections.defaultdict(list, {1: [2]}), device=torch.device('cuda', 1),
        qscheme=torch.per_channel_affine, numpy=np.arange(6.).reshape(2, 3),
        fortran=np.asfortranarray(np.eye(2)), scalar=np.float64(2.5), dtype=np.dtype('>i2'),
        text=np.str_('name'), date=datetime.date(2024, 2, 29),
        time=datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc),
        args=argparse.Namespace(lr=0.1, nested=argparse.Namespace(epochs=300)),
        yacs=Yacs(MODEL=Yacs(NAME='swin')))
    if protocol == 2:  # later ones have literals of these
        skipped.update(bytes=b'\x00\xff', set={1, 2}, frozen=frozenset('a'), array=bytearray(b'x'))
    saved = dict(skipped, schedulers=[one_cycle()], state_dict={'w': torch.arange(3.)}, end=7)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', package)
        patch.setitem(sys.modules, 'yacs.config', module)
        path = save(saved, tmp_path / 'a.pth', file_format, pickle_protocol=protocol)
    loaded = load_checkpoint_file(path)
    assert list(loaded) == list(saved)
    for key in skipped:
        assert type(loaded[key]) is Skipped, key
    assert type(loaded['schedulers'][0]) is dict
    assert loaded['schedulers'][0]['param_name'] == 'lr'
    assert_equal(loaded['state_dict'], saved['state_dict'])
    assert loaded['end'] == 7


@pytest.mark.parametrize('package', [b'numpy.core', b'numpy._core'])
def test_numpy_of_both_generations(tmp_path, package):
    path = save([np.arange(6.), np.float32(2.5)], tmp_path / 'a.pth', 'legacy')
    written = b'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else b'numpy.core'
    path.write_bytes(path.read_bytes().replace(written, package))
    assert package in path.read_bytes()
    assert [type(value) for value in load_checkpoint_file(path)] == [Skipped] * 2


@pytest.mark.parametrize('file_format', FORMATS)
def test_checkpoint_of_mmengine(tmp_path, file_format):
    hub = MessageHub.get_instance('test_restricted_pickle')
    for step in range(5):
        hub.update_scalar('train/loss', 1 / (step + 1))
    hub.update_info('iter', 5)
    hub.update_info('palette', np.arange(6, dtype=np.uint8).reshape(2, 3))
    hub.update_info('best', np.float64(0.4375))
    weights = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weights.parameters())
    weights(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = dict(
        meta=dict(epoch=1, mmengine_version=mmengine.__version__,
                  dataset_meta=dict(classes=('RBC', 'WBC'), palette=[(0, 0, 1)])),
        state_dict=weights.state_dict(), optimizer=optimizer.state_dict(),
        message_hub=hub.state_dict())
    path = save(saved, tmp_path / 'epoch_1.pth', file_format)
    # The part that plain weights_only loading stumbles over is in there.
    assert b'history_buffer' in b''.join(
        [zipfile.ZipFile(path).read('epoch_1/data.pkl')] if file_format == 'zip' else
        [path.read_bytes()])

    loaded = load_checkpoint_file(path)
    assert_equal(loaded['state_dict'], saved['state_dict'])
    assert_equal(loaded['optimizer'], saved['optimizer'])
    assert_equal(loaded['meta'], saved['meta'])
    assert loaded['message_hub']['runtime_info']['iter'] == 5
    assert type(loaded['message_hub']['log_scalars']['train/loss']) is Skipped
    assert extract_state_dict(loaded, path).keys() == {'weight', 'bias'}


# What is refused


def attacks(marker):
    """Calls that a pickle may ask for, with the name that the message gives."""
    command = f'touch {marker}'
    system = f'{os.system.__module__}.system'
    return {
        'os.system': (Calls(os.system, command), system),
        'nested': ({'state_dict': [{'deep': (Calls(os.system, command), )}]}, system),
        'as an argument': (Calls(collections.OrderedDict, [(1, Calls(os.system, command))]),
                           system),
        'eval': (Calls(eval, f'__import__("os").system("{command}")'), 'builtins.eval'),
        'exec': (Calls(exec, f'import os; os.system("{command}")'), 'builtins.exec'),
        'import': (Calls(__import__, 'os'), 'builtins.__import__'),
        'open': (Calls(open, str(marker), 'w'), 'open'),
        'torch.hub.load': (Calls(torch.hub.load, 'a/b', 'c'), 'torch.hub.load'),
        'torch.load': (Calls(torch.load, str(marker)), 'torch.serialization.load'),
        'load from bytes': (Calls(torch.storage._load_from_bytes, b'x'), '_load_from_bytes'),
        'numpy.load': (Calls(np.load, str(marker)), 'load'),
        'numpy.memmap': (Calls(np.memmap, str(marker), 'u1', 'w+', 0, (1, )), 'memmap'),
        'partial': (Calls(functools.partial, os.system, command), 'functools.partial'),
        'attrgetter': (Calls(operator.attrgetter('system')), 'operator.attrgetter'),
        'module': (torch.nn.Linear(1, 1), 'torch.nn.modules.linear.Linear'),
    }


ATTACKS = list(attacks('marker'))


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('attack', ATTACKS)
def test_attack(tmp_path, file_format, attack):
    marker = tmp_path / 'marker'
    saved, name = attacks(marker)[attack]
    path = save(saved, tmp_path / 'ckpt.pth', file_format)
    with pytest.raises(UserError) as caught:
        load_checkpoint_file(path)
    assert name in str(caught.value)
    assert str(caught.value).startswith(f'{path} ')
    assert '--trust-checkpoint' in str(caught.value)
    assert not marker.exists()


def test_message(tmp_path):
    path = save(Calls(os.system, 'true'), tmp_path / 'ckpt.pth')
    with pytest.raises(UserError) as caught:
        load_checkpoint_file(path)
    assert f'{path} asks to run `{os.system.__module__}.system` when loaded' in str(caught.value)


@pytest.mark.parametrize('protocol', range(6))
def test_attack_in_a_raw_pickle(tmp_path, protocol):
    marker, path = tmp_path / 'marker', tmp_path / 'ckpt.pkl'
    path.write_bytes(pickle.dumps(Calls(os.system, f'touch {marker}'), protocol))
    with pytest.raises(UserError, match='asks to run|is not a checkpoint'):
        load_checkpoint_file(path)
    assert not marker.exists()


HISTORY = b'cmmengine.logging.history_buffer\nHistoryBuffer\n'
# name of a list entry: opcodes. Written by hand, as no pickler writes them.
OPCODES = {
    'overwrites a function attribute': b'ctorch._utils\n_rebuild_tensor_v2\n}U\x06markerK\x01sb',
    'overwrites a class attribute': b'ctorch.storage\nTypedStorage\n}U\x06markerK\x01sb',
    'overwrites a class attribute, by slots':
        b'ctorch\nSize\n(N}U\x08__repr__cbuiltins\nint\nstb',
    'calls a class it may only mention': b'ctorch.storage\nUntypedStorage\nK\x01\x85R',
    'calls a class it may only mention, INST': b'(K\x01ios\nsystem\n',
    'calls a class it may only mention, OBJ': b'(ctorch.storage\nUntypedStorage\nK\x01o',
    'news a class it may only mention': b'ctorch.storage\nUntypedStorage\nK\x01\x85\x81',
    'news a class it may only mention, with keywords':
        b'ctorch.storage\nUntypedStorage\nK\x01\x85}\x92',
    'passes keywords': b'ccollections\nOrderedDict\n)}U\x01aK\x01s\x92',
    'calls what it got': b'ccollections\nOrderedDict\n)R)R',
    'rebuilds by a function of its own':
        b'ctorch._tensor\n_rebuild_from_type_v2\n(ctorch.storage\nUntypedStorage\n'
        b'ctorch\nTensor\nK\x01\x85}tR',
    'calls through add': b'ctorch\nSize\n(K\x01\x90',
    'calls through setting of items': b'ctorch\nSize\n(K\x01K\x02u',
    'calls through item setting': b'ctorch\nSize\nK\x01K\x02s',
    'calls through append': b'ccollections\nOrderedDict\n)RK\x01a',
    'calls through extend': b'ccollections\nOrderedDict\n)R(K\x01e',
    'mentions a module by reference': b'(U\x06moduleccollections\nOrderedDict\nU\x04a.pyU\x01xtQ',
    'mentions a text reference': b'P0\n',
    'asks for an extension code': b'\x82\x01',
    'names a method with a dot': b'ccollections\nOrderedDict.fromkeys\n',
    'names a submodule through torch': b'ctorch\nhub.load\n',
    'names a storage that is none': b'cos\nStorage\n',
    'names any numpy.dtypes member': b'cnumpy.dtypes\n__builtins__\n',
}


@pytest.mark.parametrize('write', [write_legacy, write_zip])
@pytest.mark.parametrize('opcodes', OPCODES.values(), ids=list(OPCODES))
def test_attack_by_opcodes(tmp_path, monkeypatch, opcodes, write):
    monkeypatch.chdir(tmp_path)
    path = write(opcodes, tmp_path / 'ckpt.pth')
    with pytest.raises(UserError, match='ckpt.pth (asks|holds).*--trust-checkpoint'):
        load_checkpoint_file(path)
    assert os.listdir(tmp_path) == ['ckpt.pth']
    assert not hasattr(torch.storage.TypedStorage, 'marker')
    assert not hasattr(torch._utils._rebuild_tensor_v2, 'marker')


# Harmless here, since nothing of it is built: name, opcodes.
INERT = {
    'a statistic of all histories': HISTORY + b')\x81}U\x12statistics_methods}'
                                              b'U\x04meancbuiltins\nint\nssb',
    'a method': b'cbuiltins\ngetattr\n(' + HISTORY + b'U\x03mintRU\x01x\x85R',
    'the globals of a function': b'cbuiltins\ngetattr\n(cbuiltins\ngetattr\n(' + HISTORY +
                                 b'U\x03mintRU\x0b__globals__tR',
    'a class attribute': b'cargparse\nNamespace\n(N}U\x08__repr__cbuiltins\nint\nstb',
    'a tensor class': b'ctorch\nTensor\n(N}U\x03addcbuiltins\nint\nstb',
    'add': b'cargparse\nNamespace\n)\x81}U\x03addcbuiltins\nint\nsb(K\x01\x90',
    'append': b'cargparse\nNamespace\n)\x81}U\x06appendcbuiltins\nint\nsbK\x01a',
    'bytes as pointers': b'cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02O8\x89\x88\x87R'
                         b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
                         b'U\x0800000000\x86R',
    'an array of a class': b'cnumpy.core.multiarray\n_reconstruct\n'
                           b'cargparse\nNamespace\nK\x00\x85U\x01b\x87R',
    'another codec': b'c_codecs\nencode\nX\x01\x00\x00\x00aU\x05utf-7\x86R',
    'dunder names': b'cargparse\nNamespace\n)\x81}U\x09__class__ctorch\nSize\nsb',
    'keys': b'cargparse\nNamespace\n)\x81}U\x04keyscbuiltins\nlist\nsb',
}


@pytest.mark.parametrize('write', [write_legacy, write_zip])
@pytest.mark.parametrize('opcodes', INERT.values(), ids=list(INERT))
def test_skipped_by_opcodes(tmp_path, opcodes, write):
    statistics = dict(HistoryBuffer._statistics_methods)
    assert type(load_checkpoint_file(write(opcodes, tmp_path / 'a.pth'))) is Skipped
    assert HistoryBuffer._statistics_methods == statistics
    assert argparse.Namespace.__repr__ is not int
    assert torch.Tensor.add is not int


@pytest.mark.parametrize('state', [
    {'__class__': torch.Size}, {'keys': 1}, {'items': 1}, {'_metadata': 1}, {'__dict__': {}}])
def test_no_attributes_are_set(tmp_path, state):
    """By BUILD, on the one class with attributes that is built."""
    class Building:

        def __reduce__(self):
            return collections.OrderedDict, (), state

    loaded = load_checkpoint_file(save(Building(), tmp_path / 'a.pth'))
    assert type(loaded) is collections.OrderedDict
    assert not vars(loaded)
    assert list(loaded.keys()) == []


MANY = b'\x8a\x05\x00\x00\x00\x00\x20'  # 2**37
BOMBS = {
    'list of a range': b'cbuiltins\nlist\n(cbuiltins\nrange\n(' + MANY + b'tRtR',
    'tuple of a range': b'cbuiltins\ntuple\n(cbuiltins\nrange\n(' + MANY + b'tRtR',
    'bytes': b'cbuiltins\nbytes\n(' + MANY + b'tR',
    'bytearray': b'cbuiltins\nbytearray\n(' + MANY + b'tR',
    'nested str': b'cbuiltins\nstr\n(' * 60 + b'(U\x01\\t' + b'tR' * 60,
    'integers of a range': b'cbuiltins\nset\n(cbuiltins\nrange\n(' + MANY + b'tRtR',
    'counter of a range': b'ccollections\nCounter\n(cbuiltins\nrange\n(' + MANY + b'tRtR',
    'numpy of many': b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n' + MANY +
                     b'\x85U\x01btR',
}


@pytest.mark.parametrize('write', [write_legacy, write_zip])
@pytest.mark.parametrize('bomb', BOMBS.values(), ids=list(BOMBS))
def test_pickle_that_asks_for_memory(tmp_path, bomb, write):
    """Each would take 128 GB, or 2**60 backslashes."""
    if bomb is BOMBS['list of a range']:
        assert len(bomb) + 3 < 60
    path = write(bomb, tmp_path / 'a.pth')
    tracemalloc.start()
    try:
        assert type(load_checkpoint_file(path)) is Skipped
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize('size, stride, offset', [
    ((1 << 37, ), (1, ), 0), ((2, 1 << 20), (1 << 37, 1), 0), ((5, ), (1, ), 0), ((4, ), (1, ), 1),
    ((2, ), (-1, ), 3), ((2, ), (4, ), 0),
])
def test_tensor_that_asks_for_memory(tmp_path, size, stride, offset):
    """torch lets the storage grow."""
    storage = torch.zeros(4).storage()
    path = save(Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False,
                      collections.OrderedDict()), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='larger than its storage'):
        load_checkpoint_file(path)


def test_tensors_that_fill_their_storage(tmp_path):
    base = torch.arange(12.)
    saved = [base[4:], base[::3], base[3:3], base.view(3, 4).T, base[11], base.expand(2, 12)]
    assert_equal(load_checkpoint_file(save(saved, tmp_path / 'a.pth')), saved)
