"""The VLIW bundles of compiled TPU kernels, read from the folder into which libtpu wrote its final schedules.

The schedule is static: a bundle is a cycle but for waiting on memory. The table of a kernel has a row a bundle and a
column a kind of unit (MXU: matrix products); its third line says how many units of each kind there are.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

_TABLE = "*final_hlo-static-per-bundle-utilization.txt"


class Body(NamedTuple):
    """A stretch of a kernel's bundles without a long pause between matrix products: the work on one block.

    bundles: from the first to the last with a matrix product. used: share of the units of each kind that they keep
    busy.
    """

    bundles: int
    used: dict[str, float]


class Schedule(NamedTuple):
    """All bundles of a kernel, and its bodies in the order of the program."""

    total: int
    bodies: list[Body]


def flags(folder: str) -> str:
    """What LIBTPU_INIT_ARGS must hold for a process that is to write its schedules into a folder."""
    return f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"


def read(folder: str, kernels: list[str], pause: int = 200) -> dict[str, Schedule]:
    """Schedules by kernel name, of those names.

    pause: bundles without a matrix product that part two bodies.
    """
    found = {}
    for path in sorted(Path(folder).glob(_TABLE)):
        name = re.sub(r"^\d+-|-\d+-final.*", "", path.name)
        for kernel in kernels:
            if re.fullmatch(rf"{kernel}(\.\d+)?", name):
                found[kernel] = schedule(path.read_text(), pause)
    return found


def schedule(table: str, pause: int) -> Schedule:
    """The schedule in a table's text."""
    lines = table.splitlines()
    kinds = [kind.strip() for kind in lines[1].split(",")]
    units = [int(n) for n in lines[2].split()]
    rows = [[int(n) for n in line.split()] for line in lines[4:] if line[:1].isdigit()]
    busy = [i for i, row in enumerate(rows) if row[0]]
    bodies = []
    for i in busy:
        if bodies and i - bodies[-1][1] <= pause:
            bodies[-1][1] = i
        else:
            bodies.append([i, i])
    return Schedule(len(rows), [_body(rows[a : b + 1], kinds, units) for a, b in bodies])


def _body(rows, kinds, units):
    counts = [sum(column) for column in zip(*rows, strict=True)]
    used = {k: round(n / (len(rows) * u), 3) for k, n, u in zip(kinds, counts, units, strict=False) if u}
    return Body(len(rows), used)


if __name__ == "__main__":
    for name in sorted(os.listdir(sys.argv[1])):
        if name.endswith(_TABLE[1:]):
            print(name, schedule(Path(sys.argv[1], name).read_text(), 200))
