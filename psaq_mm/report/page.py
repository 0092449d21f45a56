# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The page of one run, and how all pages are filled in."""
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from .charts import Runs, block_chart, cost_chart, loss_chart, module_chart, range_chart
from .pictures import embedded
from .summary import bits_of, duration, megabytes, module_values

Picture = Tuple[Image.Image, str]
"""A picture, and the sentence under it."""

SQNR_CHART: Callable[[Runs], str] = partial(
    module_chart, key='sqnr_db', label='SQNR, dB')
SENSITIVITY_CHART: Callable[[Runs], str] = partial(
    module_chart, key='sensitivity', label='sensitivity, %', factor=100., log=True)


def fill_in(template: str, **values: Any) -> str:
    """Fill a template of ``templates/`` in."""
    environment = Environment(
        loader=FileSystemLoader(str(Path(__file__).parent / 'templates')), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters['megabytes'] = megabytes
    return environment.get_template(template).render(**values)


def charts(runs: Runs) -> Dict[str, str]:
    """The charts that one run has as well as two."""
    return dict(losses=loss_chart(runs), blocks=block_chart(runs), cost=cost_chart(runs),
                sensitivity=SENSITIVITY_CHART(runs), sqnr=SQNR_CHART(runs))


def report_page(report: Mapping[str, Any], pictures: Sequence[Picture] = (),
                shown: Sequence[Picture] = (), bits: Optional[Image.Image] = None) -> str:
    """A page that says what a run did. It needs nothing else: all pictures are in it.

    Args:
        report (Mapping): What ``report.json`` holds.
        pictures (Sequence[Picture]): Of synthetic images. Defaults to none.
        shown (Sequence[Picture]): Predictions, float and quantized side by side. Defaults to
            none.
        bits (Image, optional): The bits that were chosen for a budget. Defaults to None.

    Returns:
        str: HTML.
    """
    runs = dict(run=report)
    size = report['size']
    sqnr = module_values(report, 'sqnr_db')
    cards = [
        (bits_of(report), f'in {len(report["modules"])} quantized modules'),
        (f'{size["float_bytes"] / size["stored_bytes"]:.1f} times smaller',
         f'{megabytes(size["float_bytes"])} of weights become '
         f'{megabytes(size["stored_bytes"])}'),
        (duration(sum(report['seconds'].values())), 'for all of it')]
    if sqnr:
        cards.append((f'{statistics.median(sqnr):.1f} dB', 'median SQNR of a module'))
    errors = sorted(((entry['sensitivity'], entry['name']) for entry in report['modules']
                     if entry.get('sensitivity')), reverse=True)
    return fill_in(
        'report.html', title=f'Quantization of {Path(report["config"] or "a model").stem}',
        report=report, cards=cards, images=report['images'],
        shown=[(embedded(image, 1100), words) for image, words in shown],
        pictures=[(embedded(image), words) for image, words in pictures],
        bits=_bits(report, bits), ranges=range_chart(runs),
        sensitivity_images=report['images_of_sensitivity'],
        worst=[(name, f'{100 * error:.2g} %') for error, name in errors[:3]],
        settings=json.dumps(report['settings'], indent=2),
        rows=[_row(entry) for entry in report['modules']], **charts(runs))


def _bits(report: Mapping[str, Any], picture: Optional[Image.Image]) -> Dict[str, Any]:
    """What is said of the bits that were chosen for a budget; nothing if none were."""
    chosen = report.get('allocation')
    if not chosen:
        return {}
    most = report['settings']['quantization'].get('max_drop')
    where = 'the images' if most is None else 'images that nothing else has seen'
    words = (f'Chosen for {chosen["budget"]}: {chosen["weights"]:.2f} bits of weights and '
             f'{chosen["activations"]:.2f} of activations on the average. Of the power of the '
             f'outputs {100 * chosen["predicted"]:.3g} % was predicted to become error, and '
             f'{100 * chosen["measured"]:.3g} % became so on {where}.')
    return dict(words=words, over=most is not None and 100 * chosen['measured'] > most,
                address=picture and embedded(picture, 1200))


def _row(entry: Mapping[str, Any]) -> List[str]:
    bits = ', '.join(f'{role} {tensor["bits"]}' for role, tensor in entry['tensors'].items())
    sqnr, error = entry['sqnr_db'], entry.get('sensitivity')
    return [entry['name'], bits, '' if sqnr is None else f'{sqnr:.1f}',
            '' if error is None else f'{100 * error:.2g}']
