# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Packaging of psaq_mm: the metadata, and the configs and tools that travel with it."""
import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def link_mim() -> None:
    """Put configs and tools where mmengine and ``mim run`` look for them.

    mmengine resolves ``pkg::path`` in ``<package>/.mim/configs/path``, and ``mim run pkg tool``
    runs ``<package>/.mim/tools/tool.py``. They are links, in a checkout and while a wheel is
    built from it: setuptools packs the files that they lead to.
    """
    mim = ROOT / 'psaq_mm' / '.mim'
    mim.mkdir(exist_ok=True)
    for source in (ROOT / 'configs', ROOT / 'tools', ROOT / 'configs' / 'model-index.yml'):
        target, link = mim / source.name, os.path.relpath(source, mim)
        if target.is_symlink() and os.readlink(target) == link:
            continue  # others may be reading through it
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():  # of an unpacked source distribution
            shutil.rmtree(target)
        os.symlink(link, target)


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
        python_requires='>=3.9',  # run with 3.11: see README.md
        packages=find_packages(include=['psaq_mm', 'psaq_mm.*']),
        package_data={'psaq_mm': [
            '.mim/*.yml', '.mim/configs/*.py', '.mim/configs/*/*.py',
            '.mim/configs/*/*/*.py', '.mim/tools/*.py', 'py.typed',
            'report/templates/*.html']},
        entry_points={'console_scripts': ['psaq_mm = psaq_mm.__main__:main']},
        # The host libraries exist under two families of names (onedl-* and
        # upstream) with the same import names. Naming one here would pull it
        # over the other, so the user installs the hosts first: see README.md.
        install_requires=requirements(),
        extras_require={
            'test': ['pytest>=7,<10', 'pytest-xdist>=3.5,<4', 'hypothesis>=6,<7',
                     # a client of the exported files that is not ours
                     'openvino-model-api>=0.4,<0.5; python_version >= "3.11"'],
            # What exports, and the engines that run it: imported when used.
            'deploy': ['onnx>=1.16,<2', 'onnxruntime>=1.18,<2', 'openvino>=2025'],
            'lint': ['ruff>=0.6,<1', 'mypy>=1.8', 'codespell>=2.3,<3'],
            'docs': ['sphinx>=7.4,<9', 'myst-parser>=3,<6', 'furo>=2024.8',
                     'sphinx-copybutton>=0.5,<1'],
        },
    )


if __name__ == '__main__':
    link_mim()
    main()
