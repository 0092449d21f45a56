# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A model that comes with its weights, for hosts that would load them otherwise."""
from pathlib import Path
from typing import Any, Dict, List, Union

from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor

from psaq_mm.errors import UserError
from psaq_mm.registry import MODELS

from .config import load_config
from .model import init_model


def inferencer_config(config: Union[str, Path], checkpoint: Union[str, Path]) -> Config:
    """A config whose model brings its weights, for the inferencers of the hosts.

    .. code-block:: python

        DetInferencer(psaq_mm.inferencer_config('my_model_w8a8.py', 'quantized.pth'))

    Args:
        config (str or Path): The model's config.
        checkpoint (str or Path): A float or a quantized checkpoint.

    Returns:
        Config: The config, with a :class:`CheckpointModel` for its model. No ``weights``
        are to be given beside it.

    Raises:
        UserError: If the config cannot be read, or there is no such checkpoint.
    """
    if not Path(checkpoint).is_file():
        raise UserError(f'checkpoint {checkpoint} does not exist')
    ready = load_config(config)
    ready.model = dict(type='psaq_mm.CheckpointModel', config=str(config),
                       checkpoint=str(checkpoint))
    return ready


@MODELS.register_module()
class CheckpointModel(BaseModel):
    """The model of another config, with the weights of a checkpoint, quantized or not.

    For what builds a model from a config and takes no module, such as ``DetInferencer`` and
    ``MMSegInferencer``: :func:`inferencer_config` gives such a config.

    Args:
        config (str): The config that the checkpoint is of.
        checkpoint (str): A float or a quantized checkpoint.
        **kwargs: What hosts add to any model; not used.

    Raises:
        UserError: If a file cannot be read, or they do not belong together.
    """

    def __init__(self, config: str, checkpoint: str, **kwargs: Any) -> None:
        model: Any = init_model(config, checkpoint)
        super().__init__(data_preprocessor=model.data_preprocessor)
        self.model = model
        self._meta = {key: model.dataset_meta[key] for key in ('classes', 'palette')}

    @property
    def dataset_meta(self) -> Dict[str, Any]:
        """dict: ``classes`` and ``palette`` of the checkpoint. A host that loads no weights
        assigns those of COCO or Cityscapes: they are not taken over."""
        return self._meta

    @dataset_meta.setter
    def dataset_meta(self, value: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise UserError('this model brings the weights of its checkpoint: give no weights beside '
                        'it, such as weights= of an inferencer')

    def forward(self, inputs: Tensor, data_samples: Any = None,
                mode: str = 'tensor') -> Union[Tensor, Dict[str, Tensor], List[Any]]:
        """As the model's own."""
        return self.model(inputs, data_samples, mode)
