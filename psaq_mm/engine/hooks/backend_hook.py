# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Test a model with an engine instead of its torch modules."""
from pathlib import Path
from typing import Optional

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from psaq_mm.registry import HOOKS


@HOOKS.register_module()
class BackendHook(Hook):
    """Puts exported graphs in the place of the runner's model before a test, or into it.

    Args:
        backend (str): ``onnxruntime`` or ``openvino``.
        checkpoint (str): The checkpoint that is tested.
        sha256 (str): Its digest; graphs of another checkpoint are refused.
        folder (str, optional): Where ``tools/export.py`` wrote the graphs.
            Defaults to None: export now, to the work directory.
        threads (int): Threads of the engine; 0 lets it choose. Defaults to 0.
        precision (str): ``fp32`` or ``bf16``, for what is not in integers.
            Defaults to ``fp32``.
        engine_device (str): Device of the engine. Defaults to ``CPU``.
    """

    def __init__(self, backend: str, checkpoint: str, sha256: str, folder: Optional[str] = None,
                 threads: int = 0, precision: str = 'fp32',
                 engine_device: str = 'CPU') -> None:
        self.backend, self.folder = backend, folder
        self.source = dict(checkpoint=checkpoint, sha256=sha256)
        self.threads, self.precision, self.device = threads, precision, engine_device
        self.description = ''
        """str: Engine, version, threads and precision; empty before the test."""

    def before_test(self, runner: Runner) -> None:
        from psaq_mm.deploy import ENGINES, Graphs, export_graphs
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        folder = self.folder
        model.built_from = getattr(runner, 'cfg', None)  # says what pixels the model sees
        if folder is None:
            target = ENGINES[self.backend].format
            folder = str(Path(runner.work_dir) / f'test_export_{target}')  # not the user's own
            export_graphs(model, folder, target, about=self.source, part='model',
                          config=runner.cfg, least_share=0.)  # the test itself will tell
        graphs = Graphs(folder, self.backend, self.threads, self.precision,
                        self.source['sha256'], self.device)
        if graphs.manifest.get('part') == 'model':
            from psaq_mm.engine.graph_model import GraphModel
            runner.model = GraphModel(graphs)  # nothing of the model stays in torch
        else:
            graphs.install(model)
        self.description = graphs.describe()
        runner.logger.info(f'{graphs.manifest["modules"]}: run by {self.description}, '
                           f'from {folder}')


def describe_backend(runner: Runner) -> str:
    """Return what ran the model of a runner, in a few words."""
    found = [hook.description for hook in runner.hooks if isinstance(hook, BackendHook)]
    return found[0] if found else f'torch {torch.__version__}'
