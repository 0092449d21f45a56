# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What the hook does to checkpoints that any mmengine runner is loading."""
import copy
import time
import types

import pytest
import torch
from conftest import DEMO, ROOT, load_script
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from psaq_mm.checkpoint import (
    load_checkpoint_file,
    load_quantized_state,
    quantized_checkpoint,
    save_torch,
)
from psaq_mm.engine import build_float_model, load_config
from psaq_mm.engine.hooks import QuantizedCheckpointHook
from psaq_mm.errors import UserError
from psaq_mm.ops import apply_plan
from psaq_mm.quantization import QuantSpec

LAYOUTS = load_script(ROOT / 'benchmarks' / 'published_layouts.py')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(1)
    return build_float_model(load_config(DEMO / 'upernet_swin_demo.py'))


def loaded(model, checkpoint):
    """A fresh model after a runner's load_checkpoint with the hook."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    runner = types.SimpleNamespace(model=fresh, logger=MMLogger.get_current_instance())
    QuantizedCheckpointHook().after_load_checkpoint(runner, checkpoint)
    fresh.load_state_dict(checkpoint['state_dict'])
    return fresh


@pytest.mark.parametrize('convert', [dict, LAYOUTS.to_swin_authors_detection])
@pytest.mark.parametrize('wrap', [
    lambda s: dict(state_dict=s, meta={}), lambda s: s, lambda s: dict(model=s),
    lambda s: dict(state_dict={f'module.{k}': v for k, v in s.items()})])
def test_float_checkpoints_of_published_layouts(model, convert, wrap):
    """The stock test scripts, too, see the weights in the model's own layout."""
    state = model.state_dict()
    fresh = loaded(model, wrap(convert(state)))
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())


def test_other_float_checkpoints_pass(model):
    checkpoint = dict(state_dict={'encoder.weight': torch.ones(1)})
    runner = types.SimpleNamespace(model=model, logger=MMLogger.get_current_instance())
    QuantizedCheckpointHook().after_load_checkpoint(runner, checkpoint)
    assert list(checkpoint['state_dict']) == ['encoder.weight']
    checkpoint = dict(epoch=3)  # mmengine itself says what is wrong
    QuantizedCheckpointHook().after_load_checkpoint(runner, checkpoint)
    assert checkpoint == dict(epoch=3)


# Runners that are not ours


class Toy(BaseModel):
    """Learns a linear map."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x, y, mode='tensor'):
        out = self.layers(x).squeeze(1)
        return {'loss': (out - y).square().mean()} if mode == 'loss' else list(out)


class Data(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', ))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.x[index], self.x[index].sum()


class Mean(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results += [float(value) for value in data_samples]

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


def toy_runner(folder, hook=True, epochs=2, **kwargs):
    data = dict(batch_size=4, num_workers=0, dataset=Data(),
                sampler=dict(type='DefaultSampler', shuffle=False),
                collate_fn=dict(type='default_collate'))
    return Runner(
        model=Toy(), work_dir=folder, train_dataloader=data, test_dataloader=data,
        train_cfg=dict(by_epoch=True, max_epochs=epochs), test_cfg=dict(),
        test_evaluator=Evaluator(Mean()),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        custom_hooks=[dict(type='psaq_mm.QuantizedCheckpointHook')] * hook,
        default_scope='mmengine', experiment_name=f'toy_{time.monotonic_ns()}', **kwargs)


@pytest.fixture(scope='module')
def student(tmp_path_factory):
    """A quantized toy with the file that it is saved in."""
    torch.manual_seed(3)
    model = Toy()
    apply_plan(model, {'layers.0': dict(weight=QuantSpec(granularity='per_channel'),
                                        input=QuantSpec(bits=4, symmetric=False))})
    op = model.layers[0]
    op.weight_quantizer.set_range(-torch.ones(8), torch.ones(8))
    op.quantizers['input'].set_range(torch.tensor([-2.]), torch.tensor([2.]))
    path = tmp_path_factory.mktemp('student') / 'quantized.pth'
    save_torch(quantized_checkpoint(model), path)
    return load_quantized(path), path


def load_quantized(path):
    model = Toy()
    load_quantized_state(model, load_checkpoint_file(path), str(path))
    return model


def test_stock_runner_tests_a_quantized_file(student, tmp_path):
    model, path = student
    runner = toy_runner(tmp_path, load_from=str(path))
    with torch.no_grad():
        expected = float(torch.stack(model(Data.x, Data.x[:, 0])).mean())
    assert runner.test() == dict(mean=pytest.approx(expected, abs=1e-6))
    assert type(runner.model.layers[0]).__name__ == 'QuantLinear'


def test_stock_runner_trains_and_resumes_a_quantized_file(student, tmp_path):
    """Two epochs in one run end as they do with a stop between them."""
    whole = toy_runner(tmp_path / 'whole', load_from=str(student[1]))
    whole.train()
    toy_runner(tmp_path / 'half', load_from=str(student[1]), epochs=1).train()
    resumed = toy_runner(tmp_path / 'half', resume=True)
    resumed.train()
    assert resumed.epoch == 2
    assert type(resumed.model.layers[0]).__name__ == 'QuantLinear'
    expected, state = whole.model.state_dict(), resumed.model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in state.items())
    assert not torch.equal(state['layers.0.weight'], student[0].state_dict()['layers.0.weight'])
    # What it saved is no float checkpoint for others, and a quantized one for us.
    saved = tmp_path / 'half' / 'epoch_2.pth'
    with pytest.raises(UserError, match='psaq_mm.init_model'):
        toy_runner(tmp_path / 'other', hook=False, load_from=str(saved)).test()
    with torch.no_grad():
        ours = load_quantized(saved)(Data.x, Data.x[:, 0])
        assert torch.equal(torch.stack(ours), torch.stack(resumed.model(Data.x, Data.x[:, 0])))


def test_stock_runner_without_the_hook(student, tmp_path):
    with pytest.raises(UserError, match='QuantizedCheckpointHook'):
        toy_runner(tmp_path, hook=False, load_from=str(student[1])).test()


def test_float_training_is_not_marked(tmp_path):
    toy_runner(tmp_path, epochs=1).train()
    assert 'psaq_mm' not in torch.load(tmp_path / 'epoch_1.pth', weights_only=False)


def test_damaged_file_in_a_stock_runner(student, tmp_path):
    data = bytearray(student[1].read_bytes())
    weights = load_checkpoint_file(student[1])['quantized_state_dict']['layers.2.weight']
    data[data.index(weights.numpy().tobytes())] ^= 4
    (tmp_path / 'damaged.pth').write_bytes(data)
    with pytest.raises(UserError, match='damaged.pth is damaged'):
        toy_runner(tmp_path, load_from=str(tmp_path / 'damaged.pth')).test()
