# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The engines that run exported graphs, one a file."""
from typing import Dict, Type

from .engine import Engine
from .onnxruntime_engine import ONNXRuntimeEngine
from .openvino_engine import OpenVINOEngine

ENGINES: Dict[str, Type[Engine]] = dict(onnxruntime=ONNXRuntimeEngine, openvino=OpenVINOEngine)
"""Name of an engine to its class."""

ENGINE_OF_FORMAT = dict(onnx='onnxruntime', openvino='openvino')
"""The engine that a format is checked with."""

__all__ = ['ENGINES', 'ENGINE_OF_FORMAT', 'Engine', 'ONNXRuntimeEngine', 'OpenVINOEngine']
