"""Every code block of README and of the pages in docs/ runs, or says where its reader sees it what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_blocks import NO_CODE, PAGES, ROOT, Reader, blocks

# README's passt wants a network of the host's, which the lab has not.
pytestmark = pytest.mark.native


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_says_works(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: pytest.RecordProperty
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path)
    found = blocks(page)
    try:
        for block in found:
            reader.read(block)
    finally:
        reader.close()
    record_property("only its words were checked", reader.only_checked)
    # None was passed over.
    told = {entry.split(": ")[0] for entry in (*reader.ran, *reader.only_checked)}
    assert told == {repr(block) for block in found if block.language not in NO_CODE}
