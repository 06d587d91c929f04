"""README's table of families, from what the tests of one run measured (`make table`)."""

import pathlib

README = pathlib.Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- table of families: written by `make table` -->\n", "<!-- end of the table -->\n"
COLUMNS = ("full", "cached", "padded", "parity", "export", "presets", "tokenizer")
HEADS = (
    "", "full pass", "cached", "padded rows", "live parity", "export loads in transformers", "presets", "tokenizer",
)  # fmt: skip


def write(found):
    """Puts the cells (row, column, value) into README: of errors the greatest, of texts each once."""
    import registry  # imports jax, which conftest must set up first

    cells = {}
    for row, column, value in found:
        cells.setdefault((row, column), []).append(value)
    lines = [HEADS, ("---",) * len(HEADS)]
    lines += [(row, *(_cell(cells.get((row, column), [])) for column in COLUMNS)) for row in registry.ROWS]
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"README has no line {BEGIN!r}"
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    README.write_text(before + BEGIN + table + END + after, encoding="utf-8")


def _cell(values):
    if not values:
        return "–"
    if any(isinstance(value, float) for value in values):
        return f"{max(values):.0e}".replace("e-0", "e-").replace("0e+00", "0")
    if all(isinstance(value, int) for value in values):
        return str(sum(values))
    return ", ".join(dict.fromkeys(map(str, values)))
