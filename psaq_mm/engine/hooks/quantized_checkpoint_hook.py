# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Let any mmengine runner load a quantized checkpoint."""
from typing import Any, Dict

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from psaq_mm.adapters import matching_adapter
from psaq_mm.checkpoint import is_quantized, prepare_for_loading
from psaq_mm.registry import HOOKS


@HOOKS.register_module()
class QuantizedCheckpointHook(Hook):
    """Fits the runner's model to a quantized checkpoint that it is loading.

    Between reading a checkpoint and loading its weights, mmengine calls this
    hook: it puts the quantized ops of the manifest into the model and
    replaces the state dict by one that fits. A float checkpoint passes
    through, in the layout of the model if it was published in another. So
    mmdet's and mmseg's own test scripts evaluate both.

    Raises:
        UserError: If the checkpoint does not fit; mmengine by itself would
            only warn.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not is_quantized(checkpoint):
            self._convert(runner, model, checkpoint)
            return
        path = str(getattr(runner, '_load_from', None) or 'the checkpoint')
        checkpoint['state_dict'] = prepare_for_loading(model, checkpoint, path)
        runner.logger.info(f'{path} is quantized: '
                           f'{len(checkpoint["psaq_mm"]["modules"])} modules')

    @staticmethod
    def _convert(runner: Runner, model: nn.Module, checkpoint: Dict[str, Any]) -> None:
        adapter = matching_adapter(model)
        # mmengine takes the weights from 'state_dict', else from the top.
        state = checkpoint.get('state_dict', checkpoint)
        if adapter is None or not all(isinstance(v, Tensor) for v in state.values()):
            return
        checkpoint['state_dict'], layout = adapter.convert_state(model, state)
        if layout:
            runner.logger.info(f'layout of the weights: {layout}')
