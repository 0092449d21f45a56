# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ONNX Runtime."""
from typing import Any, List

import numpy as np

from ..packages import require_package
from .engine import Engine


class ONNXRuntimeEngine(Engine):
    """ONNX Runtime with its CPU kernels."""

    name = 'onnxruntime'
    package = 'onnxruntime'
    suffix = '.onnx'
    format = 'onnx'

    def _load(self) -> None:
        runtime = require_package(self.package)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        self._session: Any = runtime.InferenceSession(
            str(self.path), options, providers=['CPUExecutionProvider'])
        self._input = self._session.get_inputs()[0].name

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        outputs: List[np.ndarray] = self._session.run(None, {self._input: images})
        return outputs
