# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Links of README and docs lead somewhere as GitHub shows them; ``make docs`` checks the site."""
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / '.github').rglob('*.md'),
                *(p for p in (ROOT / 'docs').rglob('*.md') if '_build' not in p.parts)])
LINK = re.compile(r'\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)')


def prose(page: Path) -> str:
    """A page without blocks of code."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r'`[^`\n]*`', lambda m: m[0] if '](' not in m[0] else '', text)


def anchors(page: Path):
    """Anchors that GitHub gives to headings."""
    for heading in re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE):
        shown = re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).strip().lower()
        yield re.sub(r'[^\w\- ]', '', shown).replace(' ', '-')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f'{target} is not there'
        if anchor:
            assert anchor in {*anchors(file)}, f'{file.name} has no heading #{anchor}'


def test_a_missing_anchor_would_be_found(tmp_path):
    page = tmp_path / 'a.md'
    page.write_text('# A `b`: c!\n\n[x](a.md#a-b-c) [y](#gone)\n\n```\n[no](link)\n```\n')
    assert [*anchors(page)] == ['a-b-c']
    with pytest.raises(AssertionError, match='no heading #gone'):
        test_links_lead_somewhere(page)


def test_readme_is_one_screenful_of_pages():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 149
