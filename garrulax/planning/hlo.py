"""Reads the text of a compiled program: its computations, the instructions in them, and how often loops run.

Only what costs are computed from is read. The text is that of `compiled.as_text()`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64,
         "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
         "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8, "token": 0}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
        dtype: XLA's name of it, such as bf16.
        shape: Sizes.
        near: Whether it lies in memory beside the processor (a TPU's VMEM), not in HBM.
    """

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def count(self) -> int:
        """Number of its entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of its entries, without padding."""
        return self.count * _BITS.get(self.dtype, 32) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Unique in its computation.
        opcode: Such as fusion.
        text: The whole line, for its attributes.
        arrays: Types of its results.
        operands: Names of the instructions that it reads.
        is_root: Whether its result is that of the computation.
    """

    name: str
    opcode: str
    text: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of its results."""
        return sum(a.bytes for a in self.arrays)

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        return tuple(name for group in _CALLED.findall(self.text) for name in _names(group))

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the line; None if it does not occur."""
        found = re.search(pattern, self.text)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
        entry: Name of the computation that runs first.
        computations: Instructions of every computation, by its name and theirs.
    """

    entry: str
    computations: dict[str, dict[str, Instruction]]

    def trips(self, loop: Instruction) -> int:
        """How often the body of a `while` runs: the constant that its condition compares a counter with; 1 if none."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", {})
        limits = [i.attribute(r"constant\((\d+)\)") for i in condition.values() if i.opcode == "constant"]
        return max((int(limit) for limit in limits if limit), default=1)

    def scheduled(self, name: str | None = None, times: int = 1) -> Iterator[tuple[str, int]]:
        """The computations whose instructions are scheduled one after another, and how often each runs.

        These are the entry, the bodies of loops and what `call` and `conditional` call (of branches all, as if each
        ran); not the insides of fusions.
        """
        name = self.entry if name is None else name
        yield name, times
        for i in self.computations[name].values():
            if i.opcode == "while":
                body = i.attribute(r"body=%?([\w.\-]+)")
                assert body is not None
                yield from self.scheduled(body, times * self.trips(i))
            elif i.opcode in ("call", "conditional"):
                for called in i.called:
                    yield from self.scheduled(called, times)

    def inside(self, i: Instruction) -> Iterator[tuple[str, Instruction]]:
        """An instruction of a computation that an instruction calls, with the name of that computation; recursively."""
        for called in i.called:
            for inner in self.computations.get(called, {}).values():
                yield called, inner
                yield from self.inside(inner)


def read_module(text: str) -> Module:
    """The program of a text."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith("  ") and current is not None:
            instruction = _read_instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
        elif line.endswith("{") and not line.startswith("HloModule"):
            is_entry = line.startswith("ENTRY ")
            name = _NAME.match(line.removeprefix("ENTRY "))
            assert name is not None
            current = computations.setdefault(name[1], {})
            entry = name[1] if is_entry else entry
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return Module(entry, computations)


def arrays_in(text: str) -> tuple[Array, ...]:
    """The arrays of a type."""
    return tuple(
        Array(dtype, tuple(map(int, sizes.split(","))) if sizes else (), "S(1)" in (layout or ""))
        for dtype, sizes, layout in _ARRAY.findall(text)
    )


def _read_instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    is_root = left.startswith("ROOT ")
    name = left.removeprefix("ROOT ").removeprefix("%")
    kind, rest = _split_type(right)
    opcode, _, arguments = rest.partition("(")
    inner = arguments[: _closing(arguments)]
    return Instruction(name, opcode.strip(), right, _types(kind), _operands(inner), is_root)


@functools.lru_cache(maxsize=65536)
def _types(kind: str) -> tuple[Array, ...]:
    return arrays_in(kind)


def _operands(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.\-]+)", text))


def _names(group: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", group)


def _split_type(text: str) -> tuple[str, str]:
    """The type of an instruction, and the rest of its line."""
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    end = _closing(text[1:]) + 2
    return text[:end], text[end:].lstrip()


def _closing(text: str) -> int:
    """Index of the parenthesis that closes one opened before the text; the length of the text if there is none."""
    depth = 1
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)
