# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whole graphs as files: what psaq_mm.runtime finds is what mmdet finds."""
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmdet.apis import inference_detector
from mmengine.registry import init_default_scope

from psaq_mm.errors import UserError
from psaq_mm.runtime import Model
from psaq_mm.runtime.__main__ import main as infer

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('openvino')

ENGINES = ['onnxruntime', 'openvino']


@pytest.fixture(scope='module')
def models(whole_graphs):
    return {engine: Model(whole_graphs[engine], threads=1) for engine in ENGINES}


@pytest.fixture(params=ENGINES)
def model(request, models):
    return models[request.param]


@pytest.fixture(scope='module')
def images(scenes):
    """Scenes as they are, wide, high, of odd sides, large, and one without any object; the
    graph runs on one after the other."""
    first, second = (scenes.render(1_000_000 + i)[0] for i in range(2))
    both = np.concatenate([first, second], 1)
    return dict(square=first, landscape=both, portrait=np.concatenate([first, second], 0),
                nothing=np.zeros_like(first), odd=first[:131, :173],
                large=cv2.resize(both, None, fx=3.1, fy=2.9), second=second)


def test_the_boxes_of_mmdet(model, float_demo, images):
    """The same boxes to a thousandth of a pixel of the resized image, and the same masks."""
    init_default_scope('mmdet')  # a test before may have run a segmentor
    for name, pixels in images.items():
        with torch.no_grad():
            expected = inference_detector(float_demo, pixels).pred_instances.numpy()
        found = model(pixels)
        assert len(found) == len(expected.bboxes), name
        assert len(found) == 0 if name == 'nothing' else len(found) > 5, name
        assert found.masks.shape == (len(found), *pixels.shape[:2])
        if not len(found):
            continue
        scale = max(1, max(pixels.shape) / 224)
        assert np.abs(found.boxes - expected.bboxes).max() < 1e-3 * scale, name
        assert np.abs(found.scores - expected.scores).max() < 1e-4
        assert np.array_equal(found.labels, expected.labels)
        # A pixel that is 0.5 to the last digit may be on either side.
        assert (found.masks != expected.masks).mean() < 1e-5, name


def test_several_images_are_one_call(model, images):
    batch = [images['square'], images['landscape'], images['nothing']]
    for one, many in zip(batch, model(batch)):
        alone = model(one)
        assert np.array_equal(alone.boxes, many.boxes) and len(alone) == len(many)
        assert np.array_equal(alone.masks, many.masks)


@pytest.mark.parametrize('change', [
    lambda x: cv2.cvtColor(x, cv2.COLOR_BGR2BGRA), lambda x: x.astype(np.uint16) * 257,
    lambda x: x], ids=['RGBA', '16 bits', 'path'])
def test_kinds_of_images(model, images, tmp_path, change):
    expected = model(images['square'])
    pixels = change(images['square'])
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    for image in (pixels, tmp_path / 'image.png', str(tmp_path / 'image.png')):
        assert np.array_equal(model(image).boxes, expected.boxes)


def test_gray(model, images, tmp_path):
    gray = cv2.cvtColor(images['square'], cv2.COLOR_BGR2GRAY)
    cv2.imwrite(str(tmp_path / 'gray.png'), gray)
    expected = model(np.repeat(gray[..., None], 3, 2))
    for image in (gray, gray[..., None], tmp_path / 'gray.png'):
        assert np.array_equal(model(image).boxes, expected.boxes)


def test_bad_images(model, tmp_path):
    (tmp_path / 'no.png').write_bytes(b'no image')
    (tmp_path / 'empty.png').touch()
    for image, words in ((tmp_path / 'no.png', 'no.png cannot be read'),
                         (tmp_path / 'empty.png', 'empty.png cannot be read'),
                         ('/nowhere.jpg', 'No such'), (np.zeros((4, 4, 3)), 'float64'),
                         (np.zeros((4, 4, 2), np.uint8), '4, 4, 2'),
                         (torch.zeros(4, 4, 3, dtype=torch.uint8), 'got Tensor')):
        with pytest.raises(UserError, match=words):
            model(image)


def test_drawn(model, images):
    found = model(images['square'])
    drawn = found.draw()
    assert drawn.shape == images['square'].shape and (drawn != images['square']).mean() > 0.01
    assert np.array_equal(found.draw(score_thr=2), images['square'])
    assert np.array_equal(model(images['nothing']).draw(), images['nothing'])


def test_plain_values(model, images):
    mask_util = pytest.importorskip('pycocotools.mask')
    found = model(images['square'])
    rows = json.loads(json.dumps(found.plain(0.3)))['instances']
    assert len(rows) == (found.scores >= 0.3).sum() and rows[0]['class'] in model.classes
    run_lengths = rows[0]['segmentation']
    decoded = mask_util.decode(mask_util.frPyObjects(run_lengths, *run_lengths['size']))
    assert np.array_equal(decoded.astype(bool), found.masks[0])


def test_what_files_say(models):
    first, second = (model.info for model in models.values())
    assert first == second
    assert first['resize'] == dict(mode='fit', size=[224, 224]) and first['size'] is None
    assert first['classes'][0] == 'disc' and first['task'] == 'instance segmentation'
    assert first['padding'] == pytest.approx([103.53, 116.28, 123.675])


def test_damaged_and_wrong_files(whole_graphs, tmp_path):
    for engine in ENGINES:
        folder = tmp_path / engine
        shutil.copytree(whole_graphs[engine].parent, folder)
        file = folder / whole_graphs[engine].name
        weights = file.with_suffix('.bin') if engine == 'openvino' else file
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
        with pytest.raises(UserError, match=f'{weights.name} is damaged'):
            Model(file)
        (folder / 'export.json').unlink()  # a file alone: the engine must notice
        weights.write_bytes(data[:100])
        with pytest.raises(UserError, match='cannot load'):
            Model(file)
        with pytest.raises(UserError, match='cannot be read|does not exist'):
            Model(folder / f'other{file.suffix}')
    with pytest.raises(UserError, match='no file of an engine; expected .onnx or .xml'):
        Model(tmp_path / 'model.engine')


def test_features_are_no_model(tmp_path):
    """Nor is a file of another tool."""
    file = tmp_path / 'model.onnx'
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    result = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    onnx.save(onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', [value],
                               [result]),
        opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8), str(file))
    with pytest.raises(UserError, match='features alone'):
        Model(file)


def test_missing_engine_and_device(whole_graphs, monkeypatch):
    for engine in ENGINES:
        with pytest.raises(UserError, match=f'^device TPU: {engine} .* has .*CPU'):
            Model(whole_graphs[engine], device='TPU')
        monkeypatch.setitem(sys.modules, engine, None)
        with pytest.raises(UserError, match=f'{engine} is not installed'):
            Model(whole_graphs[engine])


def test_bare_environment(whole_graphs, photos, tmp_path):
    """Nothing but numpy, OpenCV and the engine can be imported."""
    allowed = {'numpy', 'cv2', 'openvino', 'onnxruntime', 'psaq_mm'}
    script = (
        'import sys\n'
        'class Block:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        top = name.split(".")[0]\n'
        f'        if top not in {allowed} | sys.stdlib_module_names \\\n'
        '                and not top.startswith("_"):\n'
        '            raise ImportError(f"{name} is blocked")\n'
        'sys.meta_path.insert(0, Block())\n'
        'from psaq_mm.__main__ import main\n'
        'main(sys.argv[1:])\n')
    for engine in ENGINES:
        done = subprocess.run(
            [sys.executable, '-c', script, 'infer', '--threads', '1', str(whole_graphs[engine]),
             str(photos), '--out-dir', str(tmp_path / engine)],
            capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        rows = json.loads((tmp_path / engine / 'predictions.json').read_text())
        assert [row['picture'] for row in rows] == ['0.png', '1.png']
        assert all(len(row['predictions']['instances']) > 2 for row in rows)
        assert cv2.imread(str(tmp_path / engine / '1.png')).shape == (224, 224, 3)


@pytest.mark.parametrize('arguments, words', [
    (['/nowhere.xml', '{folder}'], '/nowhere.xml does not exist'),
    (['{file}', '/nowhere.png'], '/nowhere.png does not exist'),
    (['{file}', '{folder}', '--out-dir', '{folder}'], 'would be overwritten')])
def test_mistakes_on_the_command_line(whole_graphs, photos, capsys, arguments, words):
    arguments = [a.format(file=whole_graphs['openvino'], folder=photos) for a in arguments]
    with pytest.raises(SystemExit) as status:
        infer(arguments)
    assert status.value.code == 2 and words in capsys.readouterr().err


def test_one_bad_image_of_several(whole_graphs, photos, tmp_path, capsys):
    """The others are done."""
    (tmp_path / 'bad.png').write_bytes(b'no image')
    arguments = [str(whole_graphs['openvino']), str(photos / '0.png'), str(tmp_path / 'bad.png'),
                 str(photos / '1.png'), '--out-dir', str(tmp_path / 'out')]
    with pytest.raises(SystemExit) as status:
        infer(arguments)
    error = capsys.readouterr().err
    assert status.value.code == 2 and 'bad.png cannot be read' in error
    assert f'(1 of 3 images; the others are done, in {tmp_path / "out"})' in error
    rows = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert [row['picture'] for row in rows] == ['0.png', '1.png']


def test_a_device_that_fails_is_no_cpu(whole_graphs, monkeypatch):
    """onnxruntime falls back to the CPU, where a provider that it lists cannot be used."""
    runtime = pytest.importorskip('onnxruntime')
    if 'CUDAExecutionProvider' in runtime.get_available_providers():
        pytest.skip('onnxruntime has CUDA here')
    monkeypatch.setattr(runtime, 'get_available_providers', lambda: [
        'CUDAExecutionProvider', 'CPUExecutionProvider'])
    with pytest.raises(UserError, match='device CUDA: .* cannot use it'):
        Model(whole_graphs['onnxruntime'], device='CUDA')
