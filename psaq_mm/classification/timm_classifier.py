# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A timm model as mmengine's runner wants it."""
import difflib
from typing import Any, Dict, List, Optional, Sequence, Union

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel, ImgDataPreprocessor
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from psaq_mm.errors import UserError
from psaq_mm.registry import MODELS


def require_timm_model(name: str) -> None:
    """Raise a :class:`UserError` that gives the nearest names unless timm has this model."""
    known = timm.is_model(name)
    try:
        timm.get_pretrained_cfg(name)  # raises for a wrong tag
    except RuntimeError:
        known = False
    if not known:
        names = timm.list_models()
        # A name is more often cut short than misspelt.
        near = [longer for longer in names if longer.startswith(name)]
        near += difflib.get_close_matches(name, [*names, *timm.list_pretrained()], cutoff=0.5)
        hint = f' The nearest: {", ".join(list(dict.fromkeys(near))[:3])}.' if near else ''
        raise UserError(f'{name!r} is no model of timm {timm.__version__}.{hint} '
                        'timm.list_models() lists all of them.')


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """An image classifier of timm.

    The weights come from a checkpoint: nothing is downloaded. timm's models
    see RGB images, and so does this one.

    Args:
        name (str): Name of the model in timm, e.g. ``deit_tiny_patch16_224``.
        data_preprocessor (dict or nn.Module, optional): Normalizes pixels in
            [0, 255]. Defaults to None, which means the mean and standard
            deviation that timm has for the model.
        init_cfg (dict, optional): As of :class:`mmengine.model.BaseModule`.
            Defaults to None.
        **model_args: As of ``timm.create_model``, e.g. ``num_classes=10``.

    Raises:
        UserError: If timm has no such model.
    """

    def __init__(self, name: str, data_preprocessor: Union[dict, nn.Module, None] = None,
                 init_cfg: Optional[dict] = None, **model_args: Any) -> None:
        require_timm_model(name)
        for key in model_args:
            if key.startswith(('pretrained', 'checkpoint_path')):
                raise UserError(f'TimmClassifier takes no {key}: the weights come from the '
                                'checkpoint that the tool is given')
        try:
            model = timm.create_model(name, pretrained=False, **model_args)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f'TimmClassifier: timm cannot build {name!r} with {model_args} '
                            f'({type(error).__name__}: {error})') from error
        if data_preprocessor is None:
            data = resolve_model_data_config(model)  # for pixels in [0, 1]
            data_preprocessor = ImgDataPreprocessor(
                mean=[255 * value for value in data['mean']],
                std=[255 * value for value in data['std']])
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        self.model = model

    def forward(self, inputs: Tensor, data_samples: Optional[Sequence[int]] = None,
                mode: str = 'tensor') -> Union[Tensor, Dict[str, Tensor], List[Dict[str, Any]]]:
        """Run the model.

        Args:
            inputs (Tensor): Normalized images of shape (B, C, H, W).
            data_samples (Sequence[int], optional): The label of each image;
                needed for the loss. Defaults to None.
            mode (str): ``tensor``, ``loss`` or ``predict``. Defaults to
                ``tensor``.

        Returns:
            Tensor or dict or list:
            - ``tensor``: the logits, shape (B, num_classes).
            - ``loss``: a dict with the cross entropy, ``loss``.
            - ``predict``: a dict for each image with its ``logits``, shape
              (num_classes, ), and its ``label``, None if there is none.
        """
        embed = getattr(self.model, 'patch_embed', None)
        size = getattr(embed, 'img_size', None)
        if size is not None and getattr(embed, 'strict_img_size', False) \
                and tuple(inputs.shape[-2:]) != tuple(size):
            got = tuple(inputs.shape[-2:])
            raise UserError(
                f'images of {got} pixels reach a model that takes {tuple(size)}; set '
                f'transform.input_size=(3, {size[0]}, {size[1]}) of the data set')
        logits = self.model(inputs)
        if mode == 'tensor':
            return logits
        if mode == 'loss':
            labels = torch.as_tensor(data_samples, device=logits.device)
            return dict(loss=F.cross_entropy(logits, labels))
        if mode == 'predict':
            return [dict(logits=row, label=None if data_samples is None else int(data_samples[i]))
                    for i, row in enumerate(logits)]
        raise ValueError(f"mode must be 'tensor', 'loss' or 'predict', got {mode!r}")
