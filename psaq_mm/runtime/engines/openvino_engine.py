# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""OpenVINO."""
from typing import Any, Dict, List

import numpy as np

from ..packages import require_package
from .engine import INFO_KEY, Engine


class OpenVINOEngine(Engine):
    """OpenVINO; its devices are CPU, GPU, NPU and AUTO, where they are."""

    name = 'openvino'
    package = 'openvino'
    suffix = '.xml'
    format = 'openvino'
    precisions = ('fp32', 'bf16')

    @classmethod
    def devices(cls) -> List[str]:
        return [*require_package(cls.package).Core().available_devices, 'AUTO']

    def _load(self) -> None:
        openvino = require_package(self.package)
        options: Dict[str, Any] = {
            'INFERENCE_PRECISION_HINT': 'bf16' if self.precision == 'bf16' else 'f32',
            'PERFORMANCE_HINT': 'LATENCY', 'NUM_STREAMS': 1}
        if self.threads and self.device in ('CPU', 'AUTO'):
            options['INFERENCE_NUM_THREADS'] = self.threads
        core = openvino.Core()
        model = core.read_model(str(self.path))
        self._outputs = len(model.outputs)
        place = ['psaq_mm', INFO_KEY]
        self._text = str(model.get_rt_info(place).astype(str)) if model.has_rt_info(place) else ''
        self._request: Any = core.compile_model(model, self.device, options).create_infer_request()

    def _info(self) -> str:
        return self._text

    def run(self, images: np.ndarray) -> List[np.ndarray]:
        self._request.infer({0: images})
        # Copies: the request writes to the same memory again.
        return [self._request.get_output_tensor(i).data.copy() for i in range(self._outputs)]
