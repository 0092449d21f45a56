# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A float model as the one that teaches."""
from contextlib import contextmanager
from typing import Callable, Iterator, Tuple

from torch import Tensor, nn

from psaq_mm.adapters import TapRecord, find_adapter
from psaq_mm.prior import TeacherRecord
from psaq_mm.recipe import SynthesisSettings


@contextmanager
def float_teacher(
        model: nn.Module, settings: SynthesisSettings, groups: Tuple[str, ...] = ()
) -> Iterator[Callable[[Tensor], Tuple[TeacherRecord, TapRecord]]]:
    """Within the block, a function that runs a float model on images and gives
    what the prior and the taps need."""
    adapter = find_adapter(model)
    heads = any(term.needs_batch_norm for term in settings.build_priors().values())
    with adapter.record_attention(model) as attention, \
            adapter.record_batch_norm(model, heads) as batch_norms:

        def run(images: Tensor) -> Tuple[TeacherRecord, TapRecord]:
            attention.pop_all()
            batch_norms.pop_all()
            taps = TapRecord({})
            if groups:
                taps = adapter.forward_taps(model, images, groups)
            if groups and heads:  # the taps' pass ran some heads, not all
                attention.pop_all()
                batch_norms.pop_all()
            if heads:
                adapter.forward_norms(model, images)
            elif not groups:
                adapter.forward_backbone(model, images)
            return TeacherRecord(attention.pop_all(), batch_norms.pop_all()), taps

        yield run
