# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
import argparse
import codecs
import collections
import datetime
import functools
import operator
import os
import pickle
import sys
import types
import zipfile

import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub

from psaq_mm.checkpoint.restricted_pickle import CfgNode
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
    assert_equal(loaded, saved)
    assert loaded['float'].data_ptr() == loaded['parameter'].data_ptr()  # still one storage


@pytest.mark.parametrize('file_format', FORMATS)
def test_module_state_dict_keeps_its_metadata(tmp_path, file_format):
    saved = torch.nn.BatchNorm1d(3).state_dict()
    loaded = load_checkpoint_file(str(save(saved, tmp_path / 'a.pth', file_format)))
    assert_equal(loaded, saved)
    assert loaded._metadata == saved._metadata


def test_tensor_with_attributes(tmp_path):
    saved = torch.ones(2)
    saved.note = 'calibrated'
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = 'frozen'
    loaded = load_checkpoint_file(save([saved, parameter], tmp_path / 'a.pth'))
    assert_equal(loaded, [saved, parameter])
    assert [value.note for value in loaded] == ['calibrated', 'frozen']


@pytest.mark.parametrize('file_format', FORMATS)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_other_contents(tmp_path, file_format, protocol):
    saved = dict(
        numbers=[1, -2**70, 1.5, True, None, 1 + 2j], text='Größe', raw=b'\x00\xff',
        array=bytearray(b'x'), sets=[{1, 2}, frozenset('a')], slices=[slice(1, 2), range(3)],
        counter=collections.Counter('aab'), default=collections.defaultdict(list, {1: [2]}),
        size=torch.Size([1, 2]), dtype=torch.float16, device=torch.device('cuda', 1),
        qscheme=torch.per_channel_affine,
        args=argparse.Namespace(lr=0.1, model='deit', nested=argparse.Namespace(epochs=300)),
        times=[datetime.date(2024, 2, 29), datetime.timedelta(seconds=1),
               datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone.utc)],
        config=ConfigDict(model=dict(type='Swin', depths=[2, 2])))
    loaded = load_checkpoint_file(
        save(saved, tmp_path / 'a.pth', file_format, pickle_protocol=protocol))
    assert_equal(loaded, saved)
    assert isinstance(loaded['config'].model, ConfigDict)
    assert loaded['default']['missing'] == []


@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.parametrize('package', [b'numpy.core', b'numpy._core'])
def test_numpy_of_both_generations(tmp_path, protocol, package):
    saved = [
        np.arange(6, dtype='f8').reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.array([1.5, -2], dtype='>f4'), np.zeros((0, 2), np.uint8), np.array(['ab', 'c']),
        np.array([True]), np.array(3, np.int16), np.float32(2.5), np.int64(-3), np.bool_(True),
        np.complex64(1j), np.str_('name'), np.dtype('float32'), np.dtype('>i2'),
    ]
    path = save(saved, tmp_path / 'a.pth', 'legacy', pickle_protocol=protocol)
    written = b'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else b'numpy.core'
    if protocol == 2:  # text, so that the other generation's name can be put in
        path.write_bytes(path.read_bytes().replace(written, package))
        assert package in path.read_bytes()
    loaded = load_checkpoint_file(path)
    # numpy itself turns a foreign byte order into the machine's own at some protocols.
    assert_equal(loaded, pickle.loads(pickle.dumps(saved, protocol)))
    assert loaded[1].flags.f_contiguous
    assert np.dtype('f4').isnative  # numpy's own dtypes are left alone


@pytest.mark.skipif(not hasattr(np, 'dtypes'), reason='numpy before 1.25')
def test_numpy_dtype_class(tmp_path):
    saved = [np.dtypes.Float64DType]
    assert load_checkpoint_file(save(saved, tmp_path / 'a.pth')) == saved


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
    assert_equal(loaded['message_hub']['runtime_info'], saved['message_hub']['runtime_info'])
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert type(history) is HistoryBuffer
    assert_equal(history.data, hub.get_scalar('train/loss').data)
    assert history.statistics('min') == pytest.approx(0.2)
    assert extract_state_dict(loaded, path).keys() == {'weight', 'bias'}


@pytest.mark.parametrize('file_format', FORMATS)
def test_yacs_config_becomes_inert(tmp_path, monkeypatch, file_format):

    class Yacs(dict):

        def __init__(self, **kwargs):
            super().__init__(kwargs)
            self.__dict__['__immutable__'] = True

    Yacs.__module__, Yacs.__qualname__ = 'yacs.config', 'CfgNode'
    Yacs.__name__ = 'CfgNode'
    package, module = types.ModuleType('yacs'), types.ModuleType('yacs.config')
    package.config, module.CfgNode = module, Yacs
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', package)
        patch.setitem(sys.modules, 'yacs.config', module)
        saved = {'model': {'weight': torch.ones(2)}, 'config': Yacs(MODEL=Yacs(NAME='swin'))}
        path = save(saved, tmp_path / 'swin.pth', file_format)
    loaded = load_checkpoint_file(path)
    assert type(loaded['config']) is CfgNode
    assert loaded['config'] == {'MODEL': {'NAME': 'swin'}}
    again = load_checkpoint_file(save(loaded, tmp_path / 'again.pth', file_format))
    assert type(again['config']['MODEL']) is dict
    assert again['config'] == loaded['config']


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
        'getattr on a class': (Calls(getattr, HistoryBuffer, '__init__'), '__init__'),
        'getattr on an object': (Calls(getattr, 'text', 'format'), 'format'),
        'getattr on a dict class': (Calls(getattr, collections.OrderedDict, 'fromkeys'),
                                    'fromkeys'),
        'getattr for a class method': (Calls(getattr, HistoryBuffer, 'register_statistics'),
                                       'register_statistics'),
        'torch.hub.load': (Calls(torch.hub.load, 'a/b', 'c'), 'torch.hub.load'),
        'torch.load': (Calls(torch.load, str(marker)), 'torch.serialization.load'),
        'load from bytes': (Calls(torch.storage._load_from_bytes, b'x'), '_load_from_bytes'),
        'numpy.load': (Calls(np.load, str(marker)), 'load'),
        'numpy.memmap': (Calls(np.memmap, str(marker), 'u1', 'w+', 0, (1, )), 'memmap'),
        'partial': (Calls(functools.partial, os.system, command), 'functools.partial'),
        'attrgetter': (Calls(operator.attrgetter('system')), 'operator.attrgetter'),
        'codec': (Calls(codecs.encode, 'x', 'rot13'), 'codecs.encode'),
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


# name of a list entry: opcodes. Written by hand, as no pickler writes them.
OPCODES = {
    'overwrites a class attribute': b'cargparse\nNamespace\n(N}U\x08__repr__cbuiltins\nint\nstb',
    'overwrites a function attribute': b'ctorch._utils\n_rebuild_tensor_v2\n}U\x06markerK\x01sb',
    'overwrites a tensor class': b'ctorch\nTensor\n(N}U\x03addcbuiltins\nint\nstb',
    'overwrites a statistic of all histories':
        b'cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81'
        b'}U\x12statistics_methods}U\x04meancbuiltins\nint\nssb',
    'calls a method it may only mention':
        b'cbuiltins\ngetattr\n(cmmengine.logging.history_buffer\nHistoryBuffer\nU\x03mintRU\x01x\x85R',
    'gets the globals of a function':
        b'cbuiltins\ngetattr\n(cbuiltins\ngetattr\n('
        b'cmmengine.logging.history_buffer\nHistoryBuffer\nU\x03mintRU\x0b__globals__tR',
    'calls a class it may only mention': b'ctorch.storage\nUntypedStorage\nK\x01\x85R',
    'calls a class it may only mention, INST': b'(K\x01ios\nsystem\n',
    'calls a class it may only mention, OBJ': b'(ctorch\nTensor\nK\x01o',
    'news a class it may only mention': b'cnumpy\nndarray\nK\x01\x85\x81',
    'news a class it may only mention, with keywords': b'cnumpy\nndarray\nK\x01\x85}\x92',
    'calls through add': b'cargparse\nNamespace\n)\x81}U\x03addcbuiltins\nint\nsb(K\x01\x90',
    'calls through setting of items': b'cnumpy\nndarray\n(K\x01K\x02u',
    'calls through append': b'cargparse\nNamespace\n)\x81}U\x06appendcbuiltins\nint\nsbK\x01a',
    'calls through extend': b'cargparse\nNamespace\n)\x81}U\x06extendcbuiltins\nint\nsb(K\x01e',
    'calls through item setting': b'cnumpy\nndarray\nK\x01K\x02s',
    'makes numpy read bytes as pointers':
        b'cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nU\x02O8\x89\x88\x87R'
        b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbU\x0800000000\x86R',
    'makes a record of objects': b'cnumpy\ndtype\nU\x05O8,f8\x89\x88\x87R',
    'makes an array of a class': b'cnumpy.core.multiarray\n_reconstruct\n'
                                 b'cargparse\nNamespace\nK\x00\x85U\x01b\x87R',
    'uses another codec': b'c_codecs\nencode\nX\x01\x00\x00\x00aU\x05utf-7\x86R',
    'mentions a module by reference': b'(U\x06modulecargparse\nNamespace\nU\x04a.pyU\x01xtQ',
    'mentions a text reference': b'P0\n',
    'asks for an extension code': b'\x82\x01',
    'names a method with a dot':
        b'cmmengine.logging.history_buffer\nHistoryBuffer.register_statistics\n',
    'names a submodule through torch': b'ctorch\nhub.load\n',
    'names a storage that is none': b'cos\nStorage\n',
    'names any numpy.dtypes member': b'cnumpy.dtypes\n__builtins__\n',
}


@pytest.mark.parametrize('write', [write_legacy, write_zip])
@pytest.mark.parametrize('opcodes', OPCODES.values(), ids=list(OPCODES))
def test_attack_by_opcodes(tmp_path, monkeypatch, opcodes, write):
    monkeypatch.chdir(tmp_path)
    statistics = dict(HistoryBuffer._statistics_methods)
    path = write(opcodes, tmp_path / 'ckpt.pth')
    with pytest.raises(UserError, match='ckpt.pth (asks|holds).*--trust-checkpoint'):
        load_checkpoint_file(path)
    assert os.listdir(tmp_path) == ['ckpt.pth']
    assert argparse.Namespace.__repr__ is not int
    assert torch.Tensor.add is not int
    assert not hasattr(torch._utils._rebuild_tensor_v2, 'marker')
    assert HistoryBuffer._statistics_methods == statistics


@pytest.mark.parametrize('state', [b'(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft',
                                   b'(K\x03U\x01|NU\x01a\x85}K\x08K\x08K\x00t'])
def test_flags_and_fields_of_a_dtype_are_not_taken_over(tmp_path, state):
    path = write_zip(b'cnumpy\ndtype\nU\x02i8\x89\x88\x87R' + state + b'b', tmp_path / 'a.pth')
    dtype = load_checkpoint_file(path)
    assert dtype == np.dtype('i8')
    assert dtype.flags == np.dtype('i8').flags
    assert dtype.fields is None
