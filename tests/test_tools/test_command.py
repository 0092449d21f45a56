# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The command ``psaq_mm``, in a checkout and from a wheel."""
import os
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import DEMO, ROOT

import psaq_mm
from psaq_mm.__main__ import COMMANDS, main

PACKED = ('psaq_mm', 'configs', 'tools', 'setup.py', 'pyproject.toml', 'MANIFEST.in',
          'requirements.txt', 'README.md', 'LICENSE')


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code or 0, capsys.readouterr()


def test_help_lists_all_tools(capsys):
    status, printed = call(capsys, '--help')
    assert status == 0
    tools = {path.stem for path in (ROOT / 'tools').glob('*.py')}
    assert set(COMMANDS) == tools
    assert all(f'\n  {name} ' in printed.out for name in tools)


def test_version(capsys):
    status, printed = call(capsys, '--version')
    assert status == 0 and printed.out == f'psaq_mm {psaq_mm.__version__}\n'


@pytest.mark.parametrize('arguments', [['quantise'], [], ['--quantize'], ['__init__']])
def test_unknown_command(capsys, arguments):
    status, printed = call(capsys, *arguments)
    assert status == 2 and 'usage: psaq_mm' in printed.err
    if arguments in (['quantise'], ['__init__']):
        assert all(name in printed.err for name in COMMANDS)


@pytest.mark.parametrize('command', sorted(COMMANDS))
def test_help_of_a_tool(capsys, monkeypatch, command):
    monkeypatch.setattr(sys, 'argv', [])
    status, printed = call(capsys, command, '--help')
    assert status == 0 and printed.out.startswith(f'usage: psaq_mm {command} ')


def test_status_of_a_tool(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])
    status, printed = call(capsys, 'quantize', 'nowhere.py', 'nowhere.pth')
    assert status == 2 and printed.err.startswith('error: config nowhere.py does not exist')


def test_shipped_config_by_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])
    status, printed = call(capsys, 'quantize', 'psaq_mm::mask_rcnn_swin_t_w8a8.py', 'no.pth')
    assert status == 2 and 'no.pth' in printed.err
    status, printed = call(capsys, 'quantize', 'psaq_mm::mask_rcnn.py', 'no.pth')
    assert status == 2 and 'configs/mask_rcnn.py does not exist' in printed.err


def test_not_installed(capsys, monkeypatch, tmp_path):
    import psaq_mm.__main__ as command
    monkeypatch.setattr(command, '__file__', str(tmp_path / '__main__.py'))
    status, printed = call(capsys, 'quantize')
    assert status == 2 and 'psaq_mm is not installed' in printed.err


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_wheel(tmp_path, demo_checkpoint):
    """Built from a copy of the checkout, installed elsewhere, and used from a third folder."""
    source, target, elsewhere = (tmp_path / name for name in ('source', 'target', 'elsewhere'))
    for folder in (source, elsewhere):
        folder.mkdir()
    for name in PACKED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(str(ROOT / name), str(source / name), **(
            dict(ignore=shutil.ignore_patterns('.mim', '__pycache__'))
            if copy is shutil.copytree else {}))
    pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
    run(*pip, 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', tmp_path, source)
    wheel, = tmp_path.glob('psaq_mm-*.whl')
    packed = set(zipfile.ZipFile(str(wheel)).namelist())
    for folder in ('configs', 'tools'):
        link = source / 'psaq_mm' / '.mim' / folder
        assert link.is_symlink() and link.resolve() == source / folder  # as before a build
        assert {f'psaq_mm/.mim/{folder}/{path.relative_to(ROOT / folder)}' for path in
                (ROOT / folder).rglob('*.py')} == {
                    name for name in packed if name.startswith(f'psaq_mm/.mim/{folder}/')}
    run(*pip, 'install', '--no-deps', '--no-index', '--target', target, wheel)

    for file in ('mask_rcnn_swin_demo.py', 'mask_rcnn_swin_demo_w8a8.py'):
        text = (DEMO / file).read_text()
        (elsewhere / file).write_text(text.replace('../configs/', 'psaq_mm::'))
    assert 'psaq_mm::_base_/w8a8.py' in (elsewhere / 'mask_rcnn_swin_demo_w8a8.py').read_text()
    options = dict(cwd=str(elsewhere), env={**os.environ, 'PYTHONPATH': str(target)})
    where = run(sys.executable, '-c', 'import importlib.util as u; '
                'print(u.find_spec("psaq_mm").origin)', **options)
    assert where.splitlines()[-1] == str(target / 'psaq_mm' / '__init__.py')
    run(sys.executable, target / 'bin' / 'psaq_mm', 'quantize', 'mask_rcnn_swin_demo_w8a8.py',
        demo_checkpoint, '--device', 'cpu', '--cfg-options', 'synthesis.steps=2',
        'synthesis.num_images=2', 'synthesis.image_size=64', 'calibration.image_size=None',
        'quantization.weight.rounding=nearest', 'log_level=WARNING', **options)
    file = elsewhere / 'work_dirs' / 'mask_rcnn_swin_demo_w8a8' / 'quantized.pth'
    assert 'psaq_mm' in torch.load(str(file), weights_only=False)  # torch 2.1 knows no other way
