"""The families, as the tests know them: every test that runs over families takes them from here."""

import importlib

from entry import Entry

from garrulax import models

#: By name; each family of the library must have a file of its name in `families/`.
FAMILIES: dict[str, Entry] = {
    family.__name__: importlib.import_module(f"families.{family.__name__}").ENTRY for family in models.FAMILIES
}
#: Of README's table.
ROWS = tuple(row for entry in FAMILIES.values() for row in entry.rows)
#: Reference cases of causal language models -> row.
CAUSAL = {case: row for entry in FAMILIES.values() for case, row in entry.oracles.items()}
