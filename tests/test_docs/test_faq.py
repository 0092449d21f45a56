# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Messages that the FAQ explains are messages of the code."""
import ast
import re

from conftest import ROOT

ANYTHING = '\0'
SPLIT = re.compile(r'\.\.\.|\bN\b|\bH (?:x )?W\b')


def texts(node) -> str:
    """The constant parts of a string in the source, what is filled in as one character."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(texts, node.values))
    if isinstance(node, ast.BinOp):
        return texts(node.left) + texts(node.right)
    return ANYTHING


def strings_of_the_code() -> str:
    files = [*(ROOT / 'psaq_mm').rglob('*.py'), *(ROOT / 'tools').glob('*.py')]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return '\n'.join(texts(node) for node in nodes
                     if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)))


def test_messages_of_the_faq_exist():
    page = (ROOT / 'docs' / 'faq.md').read_text().split('## Traps')[0]
    quoted = re.findall(r'^\| `(.+?)` ', page, re.MULTILINE)
    code = strings_of_the_code()
    assert len(quoted) > 30
    missing = [part for message in quoted for part in SPLIT.split(message)
               if len(part.strip()) > 8 and part.strip() not in code]
    assert not missing
