# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Show the bits that were chosen for a budget, and write them down as a config."""
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

from matplotlib.figure import Figure
from PIL import Image

from psaq_mm.checkpoint import save_bytes
from psaq_mm.recipe.quantization import BUDGETS
from psaq_mm.registry import HOOKS
from psaq_mm.student import Allocation

from .psaq_hook import PSAQHook

if TYPE_CHECKING:
    from ..runner import PSAQRunner


def bits_config(base: str, budget: str, allocation: Allocation) -> str:
    """The text of a config with the chosen bits.

    Args:
        base (str): Path of the config that has all else, from where the text will stand.
        budget (str): What the bits were chosen for.
        allocation (Allocation): The bits.
    """
    lines = [f'# Bits of each module, chosen for {budget}. Edit them, and quantize with this '
             'config.', f'_base_ = {base!r}', 'quantization = dict(',
             *(f'    {key}=None,' for key in BUDGETS), '    overrides={']
    chosen = {name for group in allocation.groups if len(group.losses) > 1
              for name, _ in group.tensors}
    for name, changes in allocation.settings.overrides.items():
        if name in chosen:
            lines.append(f'        {name!r}: dict(')
            lines += [f'            {role}={_shown(values)},' for role, values in changes.items()]
            lines[-1] = lines[-1][:-1] + '),'
    return '\n'.join([*lines, '    })', ''])


def _shown(values: Any) -> str:
    """A dict as a config has it; ``observer`` replaces the one below."""
    if not isinstance(values, dict):
        return repr(values)
    parts = {key: dict(value, _delete_=True) if key == 'observer' else value
             for key, value in values.items()}
    return 'dict(' + ', '.join(f'{key}={_shown(value)}' for key, value in parts.items()) + ')'


def bits_picture(allocation: Allocation, title: str) -> bytes:
    """A PNG: bits of each group of weights and activations, in the order of the model, and what
    the outputs lose if it alone has the fewest bits."""
    rows: Dict[str, List[Tuple[str, int, float]]] = dict(weights=[], activations=[])
    for group, bits in zip(allocation.groups, allocation.bits):
        name, role = group.tensors[0]
        kind = 'weights' if group.is_weight else 'activations'
        shown = name if role in ('weight', 'input') else f'{name}, {role}'
        rows[kind].append((shown, bits, 100 * group.losses[min(group.losses)]))
    longest = max(map(len, rows.values()))
    figure = Figure(figsize=(16, 1.5 + 0.15 * longest))  # pyplot's are the user's
    for axes, (kind, entries) in zip(figure.subplots(1, 2), rows.items()):
        axes.barh(range(len(entries)), [bits for _, bits, _ in entries], color='C0', alpha=0.6)
        axes.set_yticks(range(len(entries)))
        axes.set_yticklabels([name for name, _, _ in entries], fontsize=6)
        axes.set_ylim(len(entries) - 0.5, -0.5)
        axes.set_xlim(0, 8.2)
        mean = allocation.mean_bits(kind == 'weights')
        axes.set_xlabel(f'bits of {kind} (bars; {mean:.2f} on the average)')
        above = axes.twiny()
        seen = [(i, loss) for i, (_, _, loss) in enumerate(entries) if loss > 0]
        above.plot([loss for _, loss in seen], [i for i, _ in seen], '.', color='C3')
        if seen:
            above.set_xscale('log')
        above.set_xlabel('sensitivity: % of the power of the outputs that is lost where it alone '
                         'has the fewest bits (dots)', color='C3', fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format='png', dpi=100)
    return file.getvalue()


@HOOKS.register_module()
class BitsHook(PSAQHook):
    """Where bits were chosen for a budget, writes ``<work-dir>/bits.png`` and a config with
    them, ``<work-dir>/<config>_bits.py``."""

    def after_quantize(self, runner: 'PSAQRunner') -> None:
        allocation = runner.pipeline.allocation
        if allocation is None:
            return
        budget = runner.pipeline.recipe.quantization.budget
        picture = Path(runner.work_dir) / 'bits.png'
        drawn = bits_picture(allocation, budget)
        save_bytes(drawn, picture)
        runner.bits_picture = Image.open(io.BytesIO(drawn))
        runner.logger.info(f'bits of each module: {picture}')
        if runner.cfg.filename is not None:
            name = Path(runner.cfg.filename)
            base, config = (Path(runner.work_dir) / file for file in (
                name.name, f'{name.stem}_bits.py'))
            if name.exists() and base.samefile(name):  # not dumped there: it lacks the options
                base = base.with_name(f'{name.stem}_merged.py')
                runner.cfg.dump(base)
            save_bytes(bits_config(f'./{base.name}', budget, allocation).encode(), config)
            runner.logger.info(f'the same as a config, to edit and use again: {config}')
