"""docs/caches.md: every example runs, and prints what its comments say."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "caches.md"


@pytest.mark.slow
def test_examples_run(capsys):
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, {})
    assert capsys.readouterr().out.split() == ["1000", "8", "True"]
