"""The VLIW bundles of compiled TPU kernels, read from the folder into which libtpu wrote its final schedules.

A schedule is static: a bundle is a cycle, but for waiting on memory. The table of a kernel has a row a bundle and a
column a kind of unit (MXU: matrix products); its third line says how many units of each kind there are.
"""

import itertools
import re
from pathlib import Path
from typing import NamedTuple

_TABLE = "*final_hlo-static-per-bundle-utilization.txt"


class Schedule(NamedTuple):
    """A kernel's bundles: all, those from the first to the last matrix product ("hot": the work on a block of each of
    its bodies), the longest stretch of them without one (what lies between two bodies), and the share of the units of
    each kind that the hot ones keep busy."""

    total: int
    hot: int
    pause: int
    used: dict[str, float]


def flags(folder: str) -> str:
    """What LIBTPU_INIT_ARGS must hold in a process that is to write its schedules into a folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def read(folder: str, names: list[str]) -> dict[str, Schedule]:
    """Schedules by the name of the kernel, of those of the names that were compiled."""
    found = {}
    for path in sorted(Path(folder).glob(_TABLE)):
        kernel = re.sub(r"^\d+-|(\.\d+)?-\d+-final.*", "", path.name)
        if kernel in names:
            found[kernel] = schedule(path.read_text())
    return found


def schedule(table: str) -> Schedule:
    """The schedule in a table's text."""
    lines = table.splitlines()
    kinds = [kind.strip() for kind in lines[1].split(",")]
    units = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line[:1].isdigit()]
    products = [i for i, row in enumerate(rows) if row[kinds.index("MXU")]]
    hot = rows[products[0] : products[-1] + 1] if products else []
    pause = max((b - a - 1 for a, b in itertools.pairwise(products)), default=0)
    sums = [sum(column) for column in zip(*hot, strict=True)]
    used = {k: round(n / (len(hot) * u), 3) for k, n, u in zip(kinds, sums, units, strict=False) if u}
    return Schedule(len(rows), len(hot), pause, used)
