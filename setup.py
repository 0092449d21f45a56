# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Packaging of psaq_mm: the metadata, and the configs that travel with it."""
import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def place_configs(copy: bool) -> None:
    """Put ``configs/`` where mmengine looks up ``psaq_mm::...`` configs.

    mmengine resolves ``pkg::path`` in ``<package>/.mim/configs/path``. As in
    OpenMMLab's own packages it is a link in a checkout and a copy in a wheel.
    """
    mim = ROOT / 'psaq_mm' / '.mim'
    mim.mkdir(exist_ok=True)
    for source, target in ((ROOT / 'configs', mim / 'configs'),
                           (ROOT / 'configs' / 'model-index.yml', mim / 'model-index.yml')):
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        if not copy:
            os.symlink(os.path.relpath(source, mim), target)
        elif source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


def requirements() -> list:
    """Ranges from requirements.txt, comments and blank lines dropped."""
    lines = (line.split('#')[0].strip() for line in
             (ROOT / 'requirements.txt').read_text().splitlines())
    # The hosts, and the setuptools that each family needs, are the user's to install.
    lines = [line for line in lines if line and not line.startswith(('onedl-', 'setuptools'))]
    # timm needs Python 3.10; without it there are detectors and segmentors.
    return [line + '; python_version >= "3.10"' if line.startswith('timm') else line
            for line in lines]


def main() -> None:
    """Run setuptools."""
    version = {}
    exec((ROOT / 'psaq_mm' / 'version.py').read_text(), version)
    setup(
        name='psaq_mm',
        version=version['__version__'],
        description='Data-free quantization of Swin models in OpenMMLab and timm (PSAQ-ViT V2)',
        long_description=(ROOT / 'README.md').read_text(),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        python_requires='>=3.8',
        packages=find_packages(include=['psaq_mm', 'psaq_mm.*']),
        package_data={'psaq_mm': [
            '.mim/*.yml', '.mim/configs/*.py', '.mim/configs/*/*.py',
            '.mim/configs/*/*/*.py', 'py.typed']},
        # The host libraries exist under two families of names (onedl-* and
        # upstream) with the same import names. Naming one here would pull it
        # over the other, so the user installs the hosts first: see README.md.
        install_requires=requirements(),
        extras_require={
            'test': ['pytest>=7,<10', 'pytest-xdist>=3.5,<4', 'hypothesis>=6,<7', 'scipy>=1.9'],
            # What exports, and the engines that run it: imported when used.
            'deploy': ['onnx>=1.16,<2', 'onnxruntime>=1.18,<2', 'openvino>=2024.4'],
            'lint': ['ruff>=0.6,<1', 'mypy>=1.8'],
        },
    )


if __name__ == '__main__':
    place_configs(copy=bool({'bdist_wheel', 'sdist'} & set(sys.argv)))
    try:
        main()
    finally:
        place_configs(copy=False)  # a checkout keeps links, whatever was built from it
