# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The engines that run exported graphs, one in each file."""
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

__all__ = ['ENGINES', 'FORMATS', 'Engine', 'ONNXRuntimeEngine', 'OpenVINOEngine']
