# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""What a run left behind, read and checked."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Union

from psaq_mm.errors import UserError

REPORT = 'report.json'
NEEDED = dict(modules=list, losses=dict, seconds=dict, size=dict, settings=dict, versions=dict)
"""Keys that every report has, and what they are."""


@dataclass(frozen=True)
class Run:
    """A run that has ended.

    Args:
        name (str): What tells it from another.
        report (dict): What its ``report.json`` holds.
        sheet (Path, optional): The images that it made. Defaults to None: there are none.
    """
    name: str
    report: Dict[str, Any]
    sheet: Optional[Path] = None


def read_run(path: Union[str, Path]) -> Run:
    """Read the report of a run.

    Args:
        path (str or Path): A work directory of ``tools/quantize.py``, or a ``report.json``.

    Raises:
        UserError: If there is no report, or it is none of ours.
    """
    given = Path(path)
    file = given / REPORT if given.is_dir() else given
    try:
        report = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'{file} does not exist; expected a work directory of tools/quantize.py '
                        f'that has ended, or its {REPORT}') from None
    except (OSError, ValueError) as error:
        raise UserError(f'{file} cannot be read as JSON: {error}') from error
    missing = [key for key, kind in NEEDED.items()
               if not isinstance(report, dict) or not isinstance(report.get(key), kind)]
    if missing or not _has_modules(report):
        raise UserError(f'{file} is not a report of tools/quantize.py'
                        + (f': it has no {", ".join(missing)}' if missing else ''))
    sheet = file.parent / 'synthetic.png'
    made = (report.get('images') or {}).get('synthetic')
    name = file.resolve().parent.name if file.name == REPORT else file.stem
    return Run(name or str(file), report, sheet if made and sheet.is_file() else None)


def _has_modules(report: Dict[str, Any]) -> bool:
    return bool(report['modules']) and all(
        isinstance(entry, dict) and {'name', 'op', 'tensors'} <= {*entry}
        for entry in report['modules'])
