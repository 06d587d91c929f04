"""The collectives of a compiled program: what kind, over which mesh axes, how many bytes, how often, how hidden.

Reads the text of the optimised HLO (`compiled.as_text()`), as the compilers for TPUs, GPUs and CPUs write it. A program
for TPUs has two forms of its own: a reduce-scatter is a fusion, named `all-reduce-scatter`, of an all-reduce and a
slice; and an all-gather that runs beside products stands in several fusions, whose parts share a `chain_id`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "c64": 64,
         "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|bf16|c64|f8\w*|[fsu]\d+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?)\s([a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # such as [4,2]T(1,0)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program.

    Attributes:
        kind: One of `KINDS`.
        axes: The mesh axes whose devices take part.
        devices: How many devices exchange data with one another.
        bytes: Of the whole arrays on one device: after gathering, before scattering.
        times: How often it runs in one call of the program; loops run as often as their condition says.
        hidden: Whether the compiler lets it run beside other work (async start and done, or fused with products).
        shape: Dtypes and shapes of its result.
        source: Name of the operation in the traced program.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    bytes: int
    times: int
    hidden: bool
    shape: str
    source: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one call of the program, if devices form a ring."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.devices - 1) / self.devices * self.times


def collectives(hlo: str, mesh: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program, in the order in which they stand in it; those of one device are left out.

    Args:
        hlo: Text of the optimised HLO module, `compiled.as_text()`.
        mesh: Size of each mesh axis by name (`mesh.shape`), in the order of the mesh.

    Raises:
        ValueError: The text has no entry computation, or the groups of a collective are in an unknown form.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.core.collectives import collectives
        >>> mesh = gx.make_mesh({"data": jax.device_count()})
        >>> collectives(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text(), mesh.shape)
        []
    """
    computations, entry = _computations(hlo)
    if entry is None:
        raise ValueError("this is not the text of a compiled HLO module: it has no ENTRY computation")
    return list(_Walk(computations, mesh).inside(entry, 1, False))


def total(found: Iterable[Collective], kind: str | None = None, axis: str | None = None) -> float:
    """Bytes that one device sends in one call of the program.

    Args:
        found: From `collectives`.
        kind: Only those of this kind; None for all.
        axis: Only those over this mesh axis, alone or with others; None for all.
    """
    return sum(c.sent for c in found if kind in (None, c.kind) and (axis is None or axis in c.axes))


def table(found: Iterable[Collective]) -> list[str]:
    """Lines that sum up collectives by kind and mesh axes: how many run, bytes sent, and the share that is hidden."""
    groups: dict[tuple[str, str], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.kind, "+".join(c.axes)), []).append(c)
    lines = [f"{'collective':20}{'axes':24}{'runs':>6}{'MB sent':>12}{'hidden':>8}"]
    for (kind, axes), members in sorted(groups.items()):
        sent = total(members)
        hidden = total(c for c in members if c.hidden) / sent if sent else 0
        lines.append(f"{kind:20}{axes:24}{sum(c.times for c in members):6}{sent / 1e6:12.3f}{hidden:8.0%}")
    return lines


class _Walk:
    """The computations of a module, walked from the entry, so that what a loop calls counts as often as it runs."""

    def __init__(self, computations: dict[str, list[str]], mesh: Mapping[str, int]):
        self.computations, self.mesh, self.chains = computations, mesh, set[str]()

    def inside(self, name: str, times: int, hidden: bool) -> Iterator[Collective]:
        for line in self.computations.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            result, opcode = match.groups()
            kind = opcode.removesuffix("-start")
            if kind in KINDS:
                yield from self.one(name, kind, result, line, times, hidden or opcode != kind)
            elif not opcode.endswith(("-done", "-update")):
                runs = times * (self.trips(line) if opcode == "while" else 1)
                branches = [b.strip(" %") for names in _BRANCHES.findall(line) for b in names.split(",")]
                for called in [*_CALLED.findall(line), *branches]:
                    if opcode in ("while", "call", "conditional", "fusion", "async-start"):
                        yield from self.inside(called, runs, hidden or opcode == "async-start")

    def one(self, inside: str, kind: str, result: str, line: str, times: int, hidden: bool) -> Iterator[Collective]:
        if chain := re.search(r'chain_id="(\d+)"', line):
            if chain[1] in self.chains:
                return  # another part of one that was counted
            self.chains.add(chain[1])
        scatters = kind == "all-reduce" and inside.startswith("all-reduce-scatter")
        arrays = [_size(dtype, shape) for dtype, shape in _ARRAY.findall(result)]
        both = f" {kind}-start(" in line and kind != "all-reduce"  # operands and results stand side by side
        size = max(arrays) if both else sum(arrays)
        group = _group(line, math.prod(self.mesh.values()))
        if kind == "reduce-scatter":
            size *= len(group)
        axes = _axes(group, self.mesh)
        if axes:
            source = re.search(r'op_name="([^"]*)"', line)
            shape = ", ".join(f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(result))
            yield Collective(
                "reduce-scatter" if scatters else kind, axes, len(group), size, times, hidden or bool(chain), shape,
                source[1] if source else "",
            )  # fmt: skip

    def trips(self, line: str) -> int:
        """How often a loop runs: as the compiler notes it, or up to the constant in its condition."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        body = self.computations.get(condition[1], []) if condition else []
        bounds = [int(n) for text in body for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)]
        return max(bounds, default=1)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str | None]:
    """The lines of each computation by its name, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = None, list[str]()
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return found, entry


def _size(dtype: str, shape: str) -> int:
    bits = _BITS[dtype[:2] if dtype.startswith("f8") else dtype]
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _group(line: str, devices: int) -> list[int]:
    """The devices of the first group that exchange data, as indices into the mesh."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return [int(pairs[1]), int(pairs[2])]
    if explicit := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(n) for n in explicit[1].split(",")]
    if "replica_groups={}" in line:
        return list(range(devices))
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", line):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))[0].ravel().tolist()
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}:]*)\}}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2], named[3]) if named[2] else np.arange(math.prod(sizes.values()))
        taken = re.findall(r"'(\w+)'", named[4])
        places = tuple(slice(None) if name in taken else 0 for name in sizes)
        return ids.reshape(list(sizes.values()))[places].ravel().tolist()
    raise ValueError(f"the groups of this collective are in an unknown form: {line.strip()[:300]}")


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Consecutive numbers in that shape, their dimensions then in that order."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _axes(group: list[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return tuple(name for name, at in zip(mesh, places, strict=True) if len(set(at.tolist())) > 1)
