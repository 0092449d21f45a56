# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A table of docs/configuration.md, from the typed settings themselves.

    python docs/settings.py synthesis          # a section of psaq_mm.Recipe, or QuantSpec
    python docs/settings.py quantization roles # a default that no cell can hold

``python benchmarks/fill_results.py docs/configuration.md`` writes all of them; a test fails
where they are stale.
"""
import inspect
import pprint
import re
import sys
from dataclasses import fields
from typing import Any, Dict, Tuple

import psaq_mm
from psaq_mm.quantization import QuantSpec

ARGUMENT = re.compile(r'^    (\w+) \((.+?)\):\s', re.MULTILINE)


def described(settings: type) -> Dict[str, Tuple[str, str]]:
    """Name of each argument to its type and its meaning, as the docstring has them."""
    text = inspect.cleandoc(settings.__doc__ or '')
    text = text.split('Args:\n')[1].split('\n\nRaises:')[0]
    parts = ARGUMENT.split(re.sub(r'\n {5,}', ' ', text))[1:]
    return {name: (kind, ' '.join(meaning.split()))
            for name, kind, meaning in zip(parts[::3], parts[1::3], parts[2::3])}


def markdown(text: str) -> str:
    """Text of a docstring in a cell of a table."""
    text = re.sub(r':\w+:`~?(?:psaq_mm\.)?([^`]+)`', r'`\1`', text)
    text = text.replace('``', '`').replace('|', '\\|').replace(' [measured]', '')
    return re.sub(r' Defaults to [^.:;]+(?:\.\d+[^.:;]*)*\.(?= |$)', '', text)


def shown(default: Any) -> str:
    """A default that fits into a cell."""
    if isinstance(default, QuantSpec) or (isinstance(default, dict) and len(str(default)) > 40):
        return 'see below'
    if isinstance(default, float):
        return f'`{default:g}`'
    return f'`{default!r}`'


def table(settings: type) -> str:
    """A line for each setting."""
    lines = ['| key | default | type | meaning |', '|---|---|---|---|']
    defaults, meanings = settings(), described(settings)
    for item in fields(settings):
        kind, meaning = meanings[item.name]
        lines.append(f'| `{item.name}` | {shown(getattr(defaults, item.name))} | '
                     f'{kind.replace("|", " or ")} | {markdown(meaning)} |')
    return '\n'.join(lines)


def section(name: str) -> type:
    """The class of a section of a recipe, or ``QuantSpec``."""
    return QuantSpec if name == 'QuantSpec' else type(getattr(psaq_mm.Recipe(), name))


def output(name: str, *keys: str) -> str:
    """What the command prints for a section, or for some of its settings."""
    if not keys:
        return f'{name}\n\n{table(section(name))}'
    settings = psaq_mm.Recipe().to_dict()[name]
    values = {key: settings[key] for key in keys}
    return f'{name}\n\n```python\n{pprint.pformat(values, width=99, sort_dicts=False)}\n```'


if __name__ == '__main__':
    print(output(*sys.argv[1:]))
