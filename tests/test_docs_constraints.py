"""docs/constraints.md: every example runs, and prints what its comments say."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "constraints.md"


def test_examples_run(capsys):
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "23"
    assert lines[
        1
    ] == "json_schema: the shortest text that was found needs 23 tokens with its end token, more than " + (
        "max_new_tokens=10"
    )
    assert re.fullmatch(r'\{"name": ".*", "age": \d+\}', lines[2])
    assert lines[3:] == ["['n', 'y']", "{'city': 'Paris'}"]
