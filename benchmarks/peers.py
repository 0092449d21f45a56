# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The engines' own int8, which wants images: NNCF and onnxruntime's quantize_static.

Needs `pip install '.[deploy]' nncf`.
"""
import logging
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np


def size_of(path: Path) -> float:
    """Megabytes of a graph with its weights."""
    weights = path.with_suffix('.bin')
    return (path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)) / 1e6


def openvino_peers(plain: Path, samples: List[np.ndarray], folder: Path) -> Dict[str, Path]:
    """OpenVINO's files of a float ONNX graph: fp32, and NNCF's int8 for transformers.

    Args:
        plain (Path): The float graph.
        samples (List[np.ndarray]): Inputs to calibrate on.
        folder (Path): Where files are written.

    Returns:
        Dict[str, Path]: Side to its file.
    """
    import nncf
    import openvino
    logging.getLogger('nncf').setLevel(logging.ERROR)
    source = openvino.Core().read_model(str(plain))
    files = {'openvino fp32': folder / 'plain.xml', 'openvino nncf': folder / 'nncf.xml'}
    openvino.save_model(source, str(files['openvino fp32']), compress_to_fp16=False)
    options: Dict[str, Any] = dict(subset_size=len(samples),
                                   model_type=nncf.ModelType.TRANSFORMER)
    start = time.time()
    try:
        peer = nncf.quantize(source, nncf.Dataset(samples), **options)
    except nncf.InternalError as error:  # it does not take UperNet's heads as they are
        print(f'nncf: {" ".join(str(error).split())[:160]}; again without the decode head')
        scope = nncf.IgnoredScope(patterns=['.*decode_head.*'], validate=False)
        peer = nncf.quantize(source, nncf.Dataset(samples), ignored_scope=scope, **options)
    print(f'nncf: {time.time() - start:.0f} s on {len(samples)} images', flush=True)
    openvino.save_model(peer, str(files['openvino nncf']), compress_to_fp16=False)
    return files


def quantize_static(plain: Path, samples: List[np.ndarray], folder: Path) -> Path:
    """onnxruntime's int8 (QDQ) of a float ONNX graph; also writes `prepared.onnx`.

    Args:
        plain (Path): The float graph.
        samples (List[np.ndarray]): Inputs to calibrate on.
        folder (Path): Where files are written.

    Returns:
        Path: Its file.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process
    prepared, static = folder / 'prepared.onnx', folder / 'static.onnx'
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    name = onnx.load(str(plain), load_external_data=False).graph.input[0].name

    class Samples(quantization.CalibrationDataReader):
        left = list(samples)

        def get_next(self) -> Any:
            return {name: self.left.pop()} if self.left else None

    quantization.quantize_static(str(prepared), str(static), Samples(), per_channel=True,
                                 quant_format=quantization.QuantFormat.QDQ)
    return static
