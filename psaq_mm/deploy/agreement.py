# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Whether an engine decides as the simulation does: the same objects, classes and pixels."""
import math
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torchvision.ops import box_iou

from psaq_mm.ops import named_quant_ops
from psaq_mm.runtime import Classification, Detections, Segmentation
from psaq_mm.runtime.engines import Engine
from psaq_mm.runtime.images import Image, Prepared, prepare, read_image
from psaq_mm.runtime.masks import Crop
from psaq_mm.runtime.model import interpret

from .parity import parity_images
from .subgraph import Size, Subgraph

LEAST_IOU = 0.9
"""Of two boxes, or masks, that count as the same [choice]."""

LEAST_SCORE = 0.3
"""Of objects that must be found [choice]: below, noise decides what passes the threshold."""

BOUND = 0.8
"""Least share of objects that an engine must find, or of pixels that must agree, of those that
the simulation itself finds with rounding errors of its own [choice]."""

SUMS_DIFFER = 1e-6
"""How far a layer's outputs differ, relative to them, where sums are taken in another order: a
float model's do in both engines by about that [measured]."""

MADE_UP = 4
"""How many images are made up where none are given [choice]."""


class ExportError(RuntimeError):
    """An engine decides something else than the simulation. The files are kept."""


def pairs_of(expected: Detections, found: Detections) -> List[Tuple[int, Optional[int]]]:
    """For each expected object the one found of the same class with the largest IoU, each once;
    None if no IoU is over :data:`LEAST_IOU`."""
    ious = box_iou(torch.from_numpy(expected.boxes), torch.from_numpy(found.boxes))
    ious = ious.nan_to_num(0.).numpy()  # of boxes without an area
    ious[expected.labels[:, None] != found.labels[None]] = 0
    pairs: List[Tuple[int, Optional[int]]] = []
    for index in range(len(expected)):
        best = int(ious[index].argmax()) if len(found) else -1
        if best < 0 or ious[index, best] <= LEAST_IOU:
            pairs.append((index, None))
            continue
        pairs.append((index, best))
        ious[:, best] = 0
    return pairs


def compare_results(expected: Any, found: Any) -> Dict[str, Any]:
    """Compare what an engine decides with what the simulation decides, in one image.

    Args:
        expected (Result): Of the simulation.
        found (Result): Of the engine.

    Returns:
        dict: ``compared``, how many objects, pixels or images; ``share``, of which of them the
        engine decides the same, 1 for none; of detections also ``extra``, how many the engine
        found beside them, ``score``, the largest difference of scores, and with masks ``masks``,
        the share of found objects whose masks are the same.
    """
    if isinstance(expected, Segmentation):
        equal = expected.labels == found.labels
        return dict(compared=int(equal.size), share=float(equal.mean()))
    if isinstance(expected, Classification):
        return dict(compared=1, share=float(expected.scores.argmax() == found.scores.argmax()))
    pairs = [(i, j) for i, j in pairs_of(expected, found) if expected.scores[i] >= LEAST_SCORE]
    same = [(i, j) for i, j in pairs if j is not None]
    known = {j for _, j in same}
    # As many more as there are below the limit of one and above it in the other.
    extra = sum(score >= LEAST_SCORE + 0.1 and j not in known
                for j, score in enumerate(found.scores))
    row = dict(compared=len(pairs), share=len(same) / len(pairs) if pairs else 1.,
               extra=int(extra), score=max((abs(float(expected.scores[i] - found.scores[j]))
                                            for i, j in same), default=0.))
    if expected.masks is not None and found.masks is not None:
        alike = []
        for i, j in same:
            union = (expected.masks[i] | found.masks[j]).sum()
            common = (expected.masks[i] & found.masks[j]).sum()
            alike.append(union == 0 or common / union > LEAST_IOU)
        row['masks'] = float(np.mean(alike)) if alike else 1.
    return row


def total(rows: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """Those of :func:`compare_results` of several images as one; masks only if all have them."""
    compared = sum(row['compared'] for row in rows)
    same = [row['share'] * row['compared'] for row in rows]
    found: Dict[str, Any] = dict(compared=compared, share=sum(same) / compared if compared else 1.)
    if 'extra' in rows[0]:
        found.update(extra=sum(row['extra'] for row in rows),
                     score=max(row['score'] for row in rows))
    if all('masks' in row for row in rows):
        alike = sum(row['masks'] * count for row, count in zip(rows, same))
        found['masks'] = alike / sum(same) if sum(same) else 1.
    return found


@contextmanager
def sums_in_another_order(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Within the block, outputs of quantized layers differ as by sums in another order.

    A value halfway between two integers is then rounded to the other one, and over a deep
    network that adds up to as much as quantization itself: two programs that are both right
    decide otherwise on some objects.
    """
    generator = torch.Generator().manual_seed(seed)

    def shake(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # a patch embedding: tokens, and how many
            return (shake(module, args, output[0]), *output[1:])
        return output * (1 + SUMS_DIFFER * torch.randn(output.shape, generator=generator))

    with ExitStack() as hooks:
        for _, op in named_quant_ops(model):
            hooks.enter_context(op.register_forward_hook(shake))
        yield


def check_decisions(subgraph: Subgraph, engine: Engine, info: Mapping[str, Any],
                    images: Sequence[Image], size: Size) -> Dict[str, Any]:
    """Compare what an engine finds in images with what the host's own code finds.

    Args:
        subgraph (Subgraph): Of a whole model.
        engine (Engine): It has loaded the file.
        info (Mapping): What the file says.
        images (Sequence[str, Path or np.ndarray]): Files, or uint8 BGR of shape (H, W, 3),
            resized as the file says; none for some that are made up. One is in memory at a time.
        size (tuple[int, int]): Height and width of those.

    Returns:
        dict: As of :func:`compare_results`, how many ``images`` there were, and of a quantized
        model ``own``: the same of the simulation by :func:`sums_in_another_order`.
    """
    low, high = torch.zeros(1, 3, 1, 1), torch.full((1, 3, 1, 1), 255.)
    made_up = [] if images else [
        parity_images(size, low, high, seed=seed)[0].permute(1, 2, 0).round().byte().numpy()
        for seed in range(MADE_UP)]
    quantized = next(iter(named_quant_ops(subgraph.model)), None) is not None
    found, own = [], []
    for image in images or made_up:
        pixels = read_image(image)
        prepared = prepare(pixels, info, resize=bool(images), shrink=True)

        def simulated(like: Any, prepared: Prepared = prepared, pixels: Any = pixels) -> Any:
            with torch.no_grad():
                outputs = subgraph.run(torch.from_numpy(prepared.array))
            return _as_result([o.numpy() for o in outputs], prepared, info, pixels, like)

        result = interpret(engine.run(prepared.array), prepared, info, pixels)
        expected = simulated(result)
        found.append(compare_results(expected, result))
        if quantized:
            with sums_in_another_order(subgraph.model):
                own.append(compare_results(expected, simulated(result)))
    row = dict(total(found), images=len(found))
    if quantized:
        row['own'] = {key: value for key, value in total(own).items() if key in ('share', 'masks')}
    return row


def _as_result(outputs: Sequence[np.ndarray], prepared: Prepared, info: Mapping[str, Any],
               pixels: np.ndarray, found: Any) -> Any:
    """The host's own results; its masks are those of the image that the graph takes."""
    if not isinstance(found, Detections):
        return interpret(outputs, prepared, info, pixels)
    result = interpret(outputs[:2], prepared, info, pixels)
    if len(outputs) > 2:
        if prepared.array.shape[2:] != prepared.original:  # compare what can be compared
            found.crops = None
        else:
            result.crops = [Crop(0, 0, mask) for mask in outputs[2]]
    return result


def describe_agreement(row: Mapping[str, Any]) -> str:
    """What :func:`check_decisions` found, in words."""
    if not row['compared']:
        return f'nothing to compare: no object scores {LEAST_SCORE} in {row["images"]} images'
    words = f'{100 * row["share"]:.1f} % of {row["compared"]} decisions are the same'
    if 'masks' in row:
        words += f', {100 * row["masks"]:.1f} % of the masks'
    if 'own' in row:
        words += ' (' + ', '.join(f'{100 * share:.1f}' for share in row['own'].values()) + \
            ' % where the simulation sums in another order)'
    if 'extra' in row:
        words += f'; {row["extra"]} more objects; scores differ by {row["score"]:.3f} at most'
    return words


def require_agreement(row: Mapping[str, Any], file: Any, least: float = BOUND) -> None:
    """Check that an engine decides as the simulation does.

    Args:
        row (dict): Of :func:`compare_results`.
        file (Path): What was exported, for the message.
        least (float): Least share, of that which the simulation has with itself where sums are
            taken in another order; less two standard errors of so many. Defaults to 0.8.

    Raises:
        ExportError: If not. The file stays where it is.
    """
    for key, what in (('share', 'of what the simulation finds'), ('masks', 'of its masks')):
        share, bound = row.get(key, 1.), least * row.get('own', {}).get(key, 1.)
        if 0 < bound < 1:  # of a few objects a few more may differ by chance
            bound -= 2 * math.sqrt(bound * (1 - bound) / max(1, row['compared']))
        if share < bound:
            raise ExportError(
                f'{file}: the engine decides otherwise than the simulation: it finds '
                f'{100 * share:.1f} % {what}, {100 * bound:.0f} % are expected ({row["compared"]} '
                'compared). The file is kept, but do not use it as it is')
