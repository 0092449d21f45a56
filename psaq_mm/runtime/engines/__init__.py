# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The engines that run exported graphs, one in each file."""
import argparse
from typing import Dict, Type

from .engine import Engine
from .onnxruntime_engine import ONNXRuntimeEngine
from .openvino_engine import OpenVINOEngine

_CLASSES = (ONNXRuntimeEngine, OpenVINOEngine)

ENGINES: Dict[str, Type[Engine]] = {engine.name: engine for engine in _CLASSES}
"""Name of an engine to its class."""

FORMATS: Dict[str, Type[Engine]] = {**{engine.format: engine for engine in _CLASSES},
                                    'tensorrt': ONNXRuntimeEngine}
"""Name of a format to the engine that checks it: TensorRT reads ONNX."""


def add_engine_options(parser: argparse.ArgumentParser, device: str = '--device') -> None:
    """Of what runs an engine.

    Args:
        parser (ArgumentParser): What they are added to.
        device (str): Name of the option for the device. Defaults to ``--device``.
    """
    parser.add_argument('--threads', type=int, default=0,
                        help='threads of the engine (default: as it likes)')
    parser.add_argument('--precision', choices=['fp32', 'bf16'], default='fp32',
                        help='of what the engine does not compute in integers')
    parser.add_argument(device, default='CPU', help="the engine's device: CPU, GPU, NPU, AUTO "
                        '(OpenVINO), CUDA (onnxruntime)')


__all__ = ['ENGINES', 'FORMATS', 'Engine', 'ONNXRuntimeEngine', 'OpenVINOEngine',
           'add_engine_options']
