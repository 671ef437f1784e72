"""The examples of docs/reference/remote.md and docs/how-to/langchain.md run as they stand, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.mark.parametrize("page", ["reference/remote.md", "how-to/langchain.md"])
def test_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_the_catalogue_of_the_page_is_one(tmp_path: Path) -> None:
    from viaticum.catalogue import Catalogue

    (text,) = re.findall(
        r"^```toml\n(.*?)^```", (DOCS / "reference" / "remote.md").read_text(encoding="utf-8"), re.M | re.S
    )
    (tmp_path / "catalogue.toml").write_text(text)
    catalogue = Catalogue.load(tmp_path / "catalogue.toml")
    assert catalogue["our-server"].api_base == "http://10.0.0.7:8000/v1"
