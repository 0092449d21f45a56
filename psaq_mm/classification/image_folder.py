# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images in one folder for each class, prepared as timm prepares them."""
import inspect
import os
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import timm
import torchvision
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import is_image_file

from psaq_mm.errors import UserError
from psaq_mm.registry import DATASETS
from psaq_mm.sections import is_integer, nearest

from .timm_classifier import require_timm_model

# These change what an item is, or act on normalized images alone.
_FIXED = ('is_training', 'normalize', 'separate', 'use_prefetcher', 'naflex', 'patchify',
          'patchify_channels_last', 'patchify_flatten', 'patch_size', 'max_seq_len', 're_prob',
          're_mode', 're_count', 're_num_splits')


@DATASETS.register_module()
class ImageFolder(Dataset):
    """Images in ``<root>/<class>/<image>``, as ImageNet's validation set is laid
    out once it is sorted into folders by WordNet id.

    Labels count the folders in alphabetical order. Images go through timm's
    own transform, but for the normalization: that is the model's.

    Args:
        root (str): Folder of the class folders.
        model (str): Name of a timm model; images are resized and cropped as
            timm does for it.
        transform (dict, optional): Arguments of ``timm.data.create_transform``
            to set otherwise, e.g. ``dict(crop_pct=1.0)``. Defaults to None.
        training (bool): Whether to augment. Defaults to False.

    Raises:
        UserError: If the folder is missing or is not laid out so, timm has no
            such model, or an argument of the transform is unknown.
    """

    def __init__(self, root: str, model: str, transform: Optional[Mapping[str, Any]] = None,
                 training: bool = False) -> None:
        self.transform = build_transform(model, transform, training)
        expected = 'expected <root>/<class>/<image>, e.g. val/n01440764/0293.JPEG'
        if not os.path.isdir(root):
            raise UserError(f'ImageFolder: the folder {root} does not exist; {expected}')
        try:
            self.images = _ClassFolders(root, self.transform)
        except FileNotFoundError as error:
            raise UserError(f'ImageFolder: {str(error)[:200]}; {expected}') from error

    @property
    def metainfo(self) -> Dict[str, List[str]]:
        """dict: Names of the ``classes``, in the order of the labels."""
        return dict(classes=list(self.images.classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """Returns:
            dict: ``inputs``, an RGB image of shape (3, H, W) in uint8, and
            ``data_samples``, its label.
        """
        image, label = self.images[index]
        return dict(inputs=image, data_samples=label)


def build_transform(model: str, transform: Optional[Mapping[str, Any]] = None,
                    training: bool = False) -> Callable[[Any], Tensor]:
    """The transform of :class:`ImageFolder`, whose arguments these are.

    Returns:
        Callable: Takes an RGB image of Pillow, returns a uint8 tensor of shape (3, H, W).

    Raises:
        UserError: If timm has no such model, or an argument is unknown.
    """
    require_timm_model(model)
    settings = timm.get_pretrained_cfg(model)
    if settings is None:
        raise UserError(f'ImageFolder: timm has no preprocessing settings for {model!r}; name '
                        'a model that has the same')
    config = resolve_data_config(pretrained_cfg=settings.to_dict())
    config.update(_checked(transform or {}))
    try:
        # Without normalization timm leaves pixels as they are, uint8.
        return create_transform(**config, is_training=training, normalize=False)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f'ImageFolder: transform {dict(transform or {})} is refused by timm '
                        f'({type(error).__name__}: {error})') from error


class _ClassFolders(torchvision.datasets.ImageFolder):
    """Counts empty folders as classes, so that a part of a data set keeps its
    labels. (torchvision's ``allow_empty`` is newer than what we support.)"""

    def find_classes(self, directory: str) -> Tuple[List[str], Dict[str, int]]:
        classes, labels = super().find_classes(directory)
        filled = {name: label for name, label in labels.items()
                  if any(entry.is_dir() or is_image_file(entry.name)
                         for entry in os.scandir(os.path.join(directory, name)))}
        if not filled:
            raise FileNotFoundError(f'there are no images in {directory}')
        return classes, filled


def _checked(transform: Mapping[str, Any]) -> Dict[str, Any]:
    """The user's arguments of ``create_transform``."""
    known = [name for name in inspect.signature(create_transform).parameters
             if name not in _FIXED]
    given = {key: value for key, value in transform.items() if key != '_scope_'}
    for key in given:
        if key not in known:
            raise UserError(f'ImageFolder: transform has the unknown key {key!r}.'
                            f'{nearest(key, known)} Known keys: {", ".join(known)}')
    size = given.get('input_size', (3, 1, 1))
    if not isinstance(size, (list, tuple)) or len(size) != 3 \
            or not all(is_integer(side) and side > 0 for side in size):
        raise UserError('ImageFolder: transform.input_size must be (channels, height, width), '
                        f'got {size!r}')
    return given
