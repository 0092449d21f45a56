# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Images from a float model alone."""
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional

from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.adapter import module_device, require_float32
from psaq_mm.errors import UserError
from psaq_mm.recipe import SynthesisSettings
from psaq_mm.synthesis import Synthesizer

from psaq_mm.synthesis.teacher import float_teacher, frozen


def check_synthesis(model: nn.Module, settings: SynthesisSettings) -> None:
    """Raise if images cannot be made from a model so, before any step.

    Args:
        model (nn.Module): The float model.
        settings (SynthesisSettings): The ``synthesis`` section.

    Raises:
        UserError: If the model takes no images of that size or is not in float32,
            or a term needs BatchNorm statistics that the model does not have.
    """
    adapter = find_adapter(model)
    require_float32(model)
    adapter.check_image_size(model, settings.size)
    adapter.warn_of_padding(model, settings.size)
    for name, term in settings.build_priors().items():
        if term.needs_batch_norm and not adapter.batch_norms(model):
            raise UserError(f'synthesis.priors.{name} needs BatchNorm statistics, and this model '
                            f'has none; drop it by synthesis.priors.{name}=None')


@contextmanager
def synthesizer(model: nn.Module, seed: int = 0, **settings: Any) -> Iterator[Synthesizer]:
    """A :class:`Synthesizer` on a float model, to be stepped within the block.

    The model is in evaluation mode and its parameters need no gradient
    inside; both are as before after it.

    Args:
        model (nn.Module): The float model.
        seed (int): Seed of all randomness. Defaults to 0.
        **settings: Of :class:`SynthesisSettings`.
    """
    chosen = SynthesisSettings.from_dict(settings)
    lower, upper = find_adapter(model).valid_range(model)
    check_synthesis(model, chosen)
    with frozen(model), float_teacher(model, chosen) as teacher:
        yield Synthesizer(chosen, lambda images: teacher(images)[0], lower, upper, seed,
                          module_device(model))


def synthesize(model: nn.Module, seed: int = 0,
               progress: Optional[Callable[[Dict[str, float]], None]] = None,
               **settings: Any) -> Tensor:
    """Make images from a float model alone.

    Args:
        model (nn.Module): The float model.
        seed (int): Seed of all randomness. Defaults to 0.
        progress (Callable, optional): Called with the losses of each step.
            Defaults to None.
        **settings: Of :class:`SynthesisSettings`.

    Returns:
        Tensor: Normalized images of shape (num_images, C, H, W), on the CPU.

    Raises:
        UserError: If a setting is wrong or the backbone is not one of those.
        FloatingPointError: If a loss is not finite.
    """
    with synthesizer(model, seed, **settings) as images:
        while not images.done:
            losses = images.step()
            if progress is not None:
                progress(losses)
        return images.images
