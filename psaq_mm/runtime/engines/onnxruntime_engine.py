# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""ONNX Runtime."""
from typing import Any, List

import numpy as np

from psaq_mm.errors import UserError

from ..packages import require_package
from .engine import INFO_KEY, Engine


class ONNXRuntimeEngine(Engine):
    """ONNX Runtime; its devices are its execution providers (CPU, CUDA, ...)."""

    name = 'onnxruntime'
    package = 'onnxruntime'
    suffix = '.onnx'
    format = 'onnx'

    @classmethod
    def devices(cls) -> List[str]:
        ending = 'ExecutionProvider'
        return sorted(name[:-len(ending)].upper() for name in
                      require_package(cls.package).get_available_providers())

    def _load(self) -> None:
        runtime = require_package(self.package)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        # Where a weight alone is quantized it would round the input to 8 bits, unasked: 1 is
        # float32 [onnxruntime, MatMulNBits].
        options.add_session_config_entry('session.qdq_matmulnbits_accuracy_level', '1')
        providers = [name for name in runtime.get_available_providers()
                     if name.upper().startswith(f'{self.device}EXECUTION')]
        self._session: Any = runtime.InferenceSession(str(self.path), options,
                                                      providers=providers)
        self._session.disable_fallback()  # a device that fails is an error, not the CPU
        if self._session.get_providers()[:1] != providers[:1]:
            raise UserError(f'device {self.device}: onnxruntime {self.version()} cannot use it, '
                            'and would compute on the CPU; look at its driver and libraries, or '
                            'choose CPU')
        self._input = self._session.get_inputs()[0].name

    def _info(self) -> str:
        return str(self._session.get_modelmeta().custom_metadata_map.get(INFO_KEY, ''))

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        outputs: List[np.ndarray] = self._session.run(None, {self._input: images})
        return outputs
