# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Test a model with an engine in the place of its torch modules."""
from pathlib import Path
from typing import Optional

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from psaq_mm.registry import HOOKS


@HOOKS.register_module()
class BackendHook(Hook):
    """Puts exported graphs into the runner's model before it is tested.

    Args:
        backend (str): ``onnxruntime`` or ``openvino``.
        folder (str, optional): Where ``tools/export.py`` wrote the graphs.
            Defaults to None: they are exported now, into the work directory.
        checkpoint (str): The checkpoint that is tested.
        sha256 (str): Its hash; graphs of another one are refused.
        threads (int): Threads of the engine, 0 for as many as it likes.
            Defaults to 0.
        precision (str): ``fp32`` or ``bf16``, beside the integers. Defaults to
            ``fp32``.
    """

    def __init__(self, backend: str, checkpoint: str, sha256: str, folder: Optional[str] = None,
                 threads: int = 0, precision: str = 'fp32') -> None:
        self.backend, self.folder = backend, folder
        self.source = dict(checkpoint=checkpoint, sha256=sha256)
        self.threads, self.precision = threads, precision
        self.description = ''
        """str: Engine, version, threads and precision, once it runs."""

    def before_test(self, runner: Runner) -> None:
        from psaq_mm.deploy import ENGINES, Graphs, export_graphs
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        folder = self.folder
        if folder is None:
            target = ENGINES[self.backend].format
            folder = str(Path(runner.work_dir) / f'export_{target}')
            export_graphs(model, folder, target, about=self.source)
        graphs = Graphs(folder, self.backend, self.threads, self.precision, self.source['sha256'])
        graphs.install(model)
        self.description = graphs.describe()
        runner.logger.info(f'{graphs.manifest["part"]}: run by {self.description}, from {folder}')


def describe_backend(runner: Runner) -> str:
    """What ran the model of a runner."""
    found = [hook.description for hook in runner.hooks if isinstance(hook, BackendHook)]
    return found[0] if found else f'torch {torch.__version__}'
