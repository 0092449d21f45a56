# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Let any mmengine runner load a quantized checkpoint."""
import os
from typing import Any, Dict

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from psaq_mm.adapters import matching_adapter
from psaq_mm.checkpoint import (
    build_manifest,
    extract_state_dict,
    find_weights,
    first_differences,
    guarded,
    is_quantized,
    prepare_for_loading,
    with_own_tables,
)
from psaq_mm.checkpoint.integrity import DIGEST_KEY, require_undamaged
from psaq_mm.errors import UserError
from psaq_mm.ops import named_quant_ops
from psaq_mm.registry import HOOKS


@HOOKS.register_module()
class QuantizedCheckpointHook(Hook):
    """Fits the runner's model to a quantized checkpoint that it is loading.

    Between reading a checkpoint and loading its weights, mmengine calls this
    hook: it puts the quantized ops of the manifest into the model and
    replaces the state dict by one that fits. A float checkpoint passes
    through, in the layout of the model if it was published in another. So
    mmdet's and mmseg's own test scripts evaluate both. What a runner saves of
    a quantized model it is training is marked as quantized, its weights still
    float, so that the runner resumes from it.

    Raises:
        UserError: If the checkpoint is damaged or does not fit; mmengine by
            itself would only warn.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not is_quantized(checkpoint):
            self._convert(runner, model, checkpoint)
            return
        path = str(getattr(runner, '_load_from', None) or 'the checkpoint')
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise UserError(f'{path} is quantized, and EMAHook averages a float copy of the '
                            'model, which it would test. Remove EMAHook from custom_hooks.')
        if DIGEST_KEY in checkpoint and os.path.isfile(path):  # mmengine has not looked at it
            with open(path, 'rb') as file:
                require_undamaged(file, path)
        checkpoint['state_dict'] = prepare_for_loading(model, checkpoint, path)
        runner.logger.info(f'{path} is quantized: '
                           f'{len(checkpoint["psaq_mm"]["modules"])} modules')

    def before_save_checkpoint(self, runner: Runner, checkpoint: Dict[str, Any]) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if next(named_quant_ops(model), None) is not None:
            checkpoint.update(guarded(checkpoint['state_dict'], build_manifest(model)))

    @staticmethod
    def _convert(runner: Runner, model: nn.Module, checkpoint: Dict[str, Any]) -> None:
        adapter = matching_adapter(model)
        if adapter is None:
            return
        try:
            extract_state_dict(checkpoint, 'the checkpoint')
        except UserError:
            return  # mmengine says what it makes of it
        state = find_weights(model, adapter, checkpoint, 'the checkpoint')
        if first_differences(model, state, allow_extra=True):
            state, layout = adapter.convert_state(model, state)
            runner.logger.info(f'layout of the weights: {layout or "unknown"}')
        checkpoint['state_dict'] = with_own_tables(model, state, 'the checkpoint')
