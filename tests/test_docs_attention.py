"""docs/attention.md: its tables are what the implementations' refusals say, its masks all that there are."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from garrulax.kernels import masks

pytestmark = pytest.mark.usefixtures("quick_compilation")

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def docs(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


def test_tables_are_what_the_refusals_say(docs):
    features = docs("features")
    page = features.PAGE.read_text(encoding="utf-8")
    for table in features.TABLES:
        assert table.parts(page)[1] == table.text(), f"{table.title}: run `make pictures`"


def test_every_mask_is_shown(docs):
    page = (DOCS / "attention.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[(\w+)\]\(pictures/\1\.png\)", page)
    assert pictures == list(docs("gallery").MASKS)
    assert all((DOCS / "pictures" / f"{name}.png").stat().st_size for name in pictures)
    for name, build in inspect.getmembers(masks, inspect.isfunction):
        if build.__module__ == masks.__name__ and not name.startswith("_"):
            assert f"`{name}({', '.join(inspect.signature(build).parameters)[:3]}" in page
