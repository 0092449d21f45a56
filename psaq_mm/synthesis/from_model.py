# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images from a float model alone."""
from contextlib import contextmanager
from dataclasses import replace
from typing import Callable, Dict, Iterator, Optional, Sequence

from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.devices import module_device, require_float32
from psaq_mm.errors import UserError
from psaq_mm.modes import evaluating
from psaq_mm.recipe import SynthesisSettings
from psaq_mm.recipe.checks import check_progress, check_seed

from .synthesizer import Synthesizer
from .teacher import float_teacher


def sized_for(model: nn.Module, settings: SynthesisSettings) -> SynthesisSettings:
    """Settings with the image size of a model, if they have none of their own.

    Args:
        model (nn.Module): The float model.
        settings (SynthesisSettings): The ``synthesis`` section.
    """
    if settings.image_size is not None:
        return settings
    return replace(settings, image_size=find_adapter(model).image_size(model))


def check_synthesis(model: nn.Module, settings: SynthesisSettings) -> None:
    """Raise if images cannot be made from a model so, before any step.

    Args:
        model (nn.Module): The float model.
        settings (SynthesisSettings): The ``synthesis`` section.

    Raises:
        UserError: If the model takes no images of that size or is not in float32, it is not
            known how its images are normalized, or a term needs BatchNorm statistics that the
            model does not have.
    """
    adapter = find_adapter(model)
    require_float32(model)
    adapter.check_image_size(model, sized_for(model, settings).size)
    adapter.check_pixels(model)
    for name, term in settings.build_priors().items():
        if term.needs_batch_norm and not adapter.batch_norms(model):
            raise UserError(f'synthesis.priors.{name} needs BatchNorm statistics, and this model '
                            f'has none; drop it by synthesis.priors.{name}=None')


@contextmanager
def synthesizer(model: nn.Module, settings: Optional[SynthesisSettings] = None, seed: int = 0,
                indices: Optional[Sequence[int]] = None) -> Iterator[Synthesizer]:
    """A :class:`Synthesizer` on a float model, to be stepped within the block.

    The model is in evaluation mode and its parameters need no gradient
    inside; both are as before after it.

    Args:
        model (nn.Module): The float model.
        settings (SynthesisSettings, optional): How images are made. Defaults to None: the
            defaults.
        seed (int): Seed of all randomness. Defaults to 0.
        indices (Sequence[int], optional): Numbers of the images to make, of
            ``num_images``. Defaults to None: all.
    """
    settings = settings or SynthesisSettings()
    check_seed(seed, 'seed')
    check_synthesis(model, settings)
    settings = sized_for(model, settings)
    adapter = find_adapter(model)
    adapter.warn_of_padding(model, settings.size)
    lower, upper = adapter.valid_range(model)
    with evaluating(model), float_teacher(model, settings) as teacher:
        yield Synthesizer(settings, lambda images: teacher(images)[0], lower, upper, seed,
                          module_device(model), indices)


def synthesize(model: nn.Module, settings: Optional[SynthesisSettings] = None, seed: int = 0,
               progress: Optional[Callable[[Dict[str, float]], None]] = None) -> Tensor:
    """Make images from a float model alone.

    Args:
        model (nn.Module): The float model; it stays as it is.
        settings (SynthesisSettings, optional): How images are made. Defaults to None: the
            defaults.
        seed (int): Seed of all randomness. Defaults to 0.
        progress (Callable, optional): Called with the losses of each step.
            Defaults to None.

    Returns:
        Tensor: Normalized images of shape (num_images, C, H, W), on the CPU.

    Raises:
        UserError: If a setting is wrong or the backbone is not one of those.
        FloatingPointError: If a loss is not finite.
    """
    check_progress(progress)
    with synthesizer(model, settings, seed) as images:
        while not images.done:
            losses = images.step()
            if progress is not None:
                progress(losses)
        return images.images
