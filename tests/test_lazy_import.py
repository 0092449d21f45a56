# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""``import psaq_mm`` imports no torch, and all names are there."""
import subprocess
import sys

import pytest

import psaq_mm


def test_torch_is_imported_when_it_is_needed():
    code = ('import sys, psaq_mm, psaq_mm.runtime, psaq_mm.__main__\n'
            'hosts = {"torch", "torchvision", "mmcv", "mmengine", "mmdet", "mmseg", "timm"}\n'
            'assert not hosts & set(sys.modules), hosts & set(sys.modules)\n'
            'assert psaq_mm.Recipe.shipped("w4a4") and "quantize" in dir(psaq_mm)\n'
            'assert psaq_mm.quantization.QuantSpec\n')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_all_names():
    for name in psaq_mm.__all__:
        assert getattr(psaq_mm, name) is not None
    with pytest.raises(AttributeError, match='no_such'):
        psaq_mm.no_such  # noqa: B018
