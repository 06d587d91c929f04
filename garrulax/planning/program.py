"""The costs of a compiled program on one chip: operations, bytes and seconds, as often as loops run."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from garrulax.core.collectives import KINDS, Collective, collectives
from garrulax.planning.chips import Chip
from garrulax.planning.hlo import Instruction, Module, read_module
from garrulax.planning.operations import FREE, in_scope, kernel_pass, memory_bytes, product_flops
from garrulax.planning.topology import HOST, Topology
from garrulax.train.step import OPTIMIZER

#: Share of the peak that products reach. The TPU's compiler estimates 0.90 to 0.95 for bare ones, and 0.4 to 0.75 for
#: those with a norm fused into them; published runs are faster than that (docs/plan.md, "How far off").
PRODUCTS = 0.9


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of operations that XLA schedules: the program itself, or the body of a loop. Numbers are of one run.

    Attributes:
        times: How often it runs in a step.
        flops: FLOPs of matrix products.
        kernel_flops: FLOPs of attention's kernels.
        bytes: Bytes of HBM that are read and written.
        compute: Seconds without collectives: products at `PRODUCTS` of the peak, the rest by the compiler's cycles.
        cycles: The same with the compiler's cycles for products too, which is slower than published runs.
    """

    times: int
    flops: int
    kernel_flops: float
    bytes: int
    compute: float
    cycles: float


@dataclasses.dataclass(frozen=True)
class Part:
    """The cost of one part of a program, such as the optimizer, in a step on one chip.

    Attributes:
        flops: Of its matrix products.
        compute: Seconds without collectives.
        sent: Bytes that it sends.
        hidden: Seconds of its collectives during which computation goes on.
        exposed: Seconds of its collectives for which computation waits.
    """

    flops: int = 0
    compute: float = 0.0
    sent: float = 0.0
    hidden: float = 0.0
    exposed: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step on one chip.

    Attributes:
        computations: The program itself, and the bodies of its loops.
        counted: FLOPs by the compiler's `cost_analysis`, which counts the body of a loop once; None if it has none.
        collectives: Those of a step.
        hidden: Seconds a step of collectives during which computation goes on.
        exposed: Seconds a step of collectives for which computation waits.
        optimizer: The part of all this that updates the parameters.
    """

    computations: tuple[Computation, ...]
    counted: float | None
    collectives: tuple[Collective, ...]
    hidden: float
    exposed: float
    optimizer: Part = Part()

    @property
    def flops(self) -> float:
        """FLOPs of a step without attention's kernels: what the compiler counted, and the other runs of loops."""
        if self.counted is None:
            return sum(c.times * c.flops for c in self.computations)
        return self.counted + sum((c.times - 1) * c.flops for c in self.computations)

    @property
    def kernel_flops(self) -> float:
        """FLOPs of attention's kernels, which the compiler does not count."""
        return sum(c.times * c.kernel_flops for c in self.computations)

    @property
    def bytes(self) -> int:
        """Bytes of HBM that a step reads and writes."""
        return sum(c.times * c.bytes for c in self.computations)

    @property
    def compute(self) -> float:
        """Seconds a step without collectives."""
        return sum(c.times * c.compute for c in self.computations)

    @property
    def seconds(self) -> float:
        """Of a step: hidden collectives take no time of their own unless they are longer than the computation."""
        return max(self.compute, self.hidden) + self.exposed

    @property
    def slow_seconds(self) -> float:
        """Of a step, if products take as many cycles as the compiler estimates."""
        return max(sum(c.times * c.cycles for c in self.computations), self.hidden) + self.exposed


def read_program(
    text: str, counted: float | None, topology: Topology, mesh: Mesh, keys: Callable[[int], float]
) -> Program:
    """The costs of a compiled program.

    Args:
        text: Of the program, `compiled.as_text()`.
        counted: "flops" of its `cost_analysis`.
        topology: What it was compiled for.
        mesh: What it was compiled for.
        keys: Number of keys that a kernel of attention visits a query, a mean, from the number that it is given.
    """
    module = read_module(text)
    scheduled = tuple(_computation(module, name, times, topology.chip, keys) for name, times in module.scheduled())
    found = tuple(collectives(text, mesh.shape))
    hidden, exposed = _waits(found, topology, mesh)
    optimizer = _part(module, OPTIMIZER, found, topology, mesh)
    return Program(scheduled, counted, found, hidden, exposed, optimizer)


def _waits(found: Sequence[Collective], topology: Topology, mesh: Mesh) -> tuple[float, float]:
    """Seconds of the collectives beside which computation goes on, and of the others."""
    waits = [(c.hidden, c.sent / bandwidth(topology, mesh, c.axes)) for c in found]
    return sum(w for hidden, w in waits if hidden), sum(w for hidden, w in waits if not hidden)


def _part(module: Module, scope: str, found: Sequence[Collective], topology: Topology, mesh: Mesh) -> Part:
    """The part of a program that was traced in a `jax.named_scope`.

    An instruction with products belongs to the scope of these, any other to the scope if a part of it does.
    """
    flops, compute = 0, 0.0
    for name, times in module.scheduled():
        for i in module.computations[name].values():
            every, own = (product_flops(module, name, i, which) for which in ("", scope))
            flops += times * own
            if i.opcode in FREE:
                continue
            if own if every else any(in_scope(part, scope) for part in (i, *(inner for _, inner in module.inside(i)))):
                compute += times * _seconds(module, i, topology.chip, every, memory_bytes(module, name, i))
    mine = [c for c in found if f"/{scope}/" in c.source]
    return Part(flops, compute, sum(c.sent for c in mine), *_waits(mine, topology, mesh))


def _computation(module: Module, name: str, times: int, chip: Chip, keys: Callable[[int], float]) -> Computation:
    flops, moved, kernels, compute, slow = 0, 0, 0.0, 0.0, 0.0
    for i in module.computations[name].values():
        own_flops, own_bytes = product_flops(module, name, i), memory_bytes(module, name, i)
        of_kernels = _kernel_flops(module, name, i, keys)
        flops, moved, kernels = flops + own_flops, moved + own_bytes, kernels + of_kernels
        if of_kernels:
            seconds = cycles = of_kernels / (chip.peak * chip.kernel)
        elif i.opcode in FREE:
            continue
        else:
            seconds = _seconds(module, i, chip, own_flops, own_bytes)
            cycles = max(seconds, _cycles(i, chip) or 0.0)
        compute, slow = compute + seconds, slow + cycles
    return Computation(times, flops, kernels, moved, compute, slow)


def _kernel_flops(module: Module, where: str, i: Instruction, keys: Callable[[int], float]) -> float:
    """FLOPs of attention's kernels in an instruction, also in a fusion."""
    inside = () if i.opcode in FREE else module.inside(i)
    found = [(name, inner) for name, inner in [(where, i), *inside] if kernel_pass(inner)]
    return sum(kernel_flops(module.computations[name], inner, keys) for name, inner in found)


def _seconds(module: Module, i: Instruction, chip: Chip, flops: int, moved: int) -> float:
    """Products by the peak; what has none by the compiler's cycles, else by its bytes; 0 for what only communicates."""
    if flops:
        return max(flops / (PRODUCTS * chip.peak), moved / chip.bandwidth)
    cycles = _cycles(i, chip)
    if cycles is not None:
        return cycles
    if any(each.opcode.startswith(KINDS) for each in (i, *(inner for _, inner in module.inside(i)))):
        return 0.0
    return moved / chip.bandwidth


def _cycles(i: Instruction, chip: Chip) -> float | None:
    """Seconds by the compiler's own estimate of cycles; None where it has none."""
    cycles = i.attribute(r'"estimated_cycles":"(\d+)"')
    return None if cycles is None or chip.clock is None else int(cycles) / chip.clock


def kernel_flops(computation: dict[str, Instruction], i: Instruction, keys: Callable[[int], float]) -> float:
    """FLOPs of a kernel of attention: 2 products of queries and keys forward, and 5 backward.

    Args:
        computation: That the instruction is in.
        i: The instruction. Of the arrays that it reads, those of queries have the most heads: [..., S, C], or with
            cuDNN [B, S, K, C]. Where devices share a sequence, keys may be longer than queries.
        keys: Number of keys that it visits a query, a mean, from the number S that it is given.
    """
    read = [a for name in i.operands for a in computation[name].arrays if len(a.shape) >= 4 and "f" in a.dtype]
    largest = max(read, key=lambda a: a.count)
    like = [a for a in read if (a.dtype, a.shape[-1]) == (largest.dtype, largest.shape[-1])]  # no sums in float32
    tokens = 1 if "fmha" in i.text else -2
    query = max(like, key=lambda a: a.count // a.shape[tokens])
    others = [a for a in like if a.shape[tokens] != query.shape[tokens]]
    key = max(others, key=lambda a: a.count, default=query)
    products = 2 if kernel_pass(i) == "forward" else 5
    return 2.0 * products * query.count * keys(key.shape[tokens])


def bandwidth(topology: Topology, mesh: Mesh, axes: Sequence[str]) -> float:
    """Bytes/s that a device can send while the devices along some mesh axes communicate with one another.

    On a torus these are the links of every dimension in which they differ: two where they are a whole ring, else one.
    GPUs in one host use NVLink; those in several send through as many adapters as a host has GPUs of the group.

    Args:
        topology: The chips.
        mesh: Over them.
        axes: Names of mesh axes.
    """
    chip = topology.chip
    places = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = np.atleast_1d(mesh.devices[places]).reshape(-1)
    if chip.platform == "gpu":
        size = math.prod(mesh.shape[name] for name in axes)
        local = len({d.id // HOST for d in group})
        return chip.link if local == 1 else min(chip.link, chip.network * size / local)
    coordinates = np.array([d.coords for d in group])
    links = 0
    for found, size in zip(coordinates.T, topology.shape, strict=False):
        extent = len(set(found.tolist()))
        links += 0 if extent == 1 else 2 if extent == size and size % chip.wraps_at == 0 else 1
    return chip.link * links


def memory_of(error: str, held: int) -> int | None:
    """Bytes of HBM that a program would use, from the compiler's message that it does not fit; None from another one.

    Args:
        error: The message.
        held: Bytes of the program's arguments, for a message that says only what else it needs.
    """
    size = r"([\d.]+)([KMGT]?)"
    for pattern, others in (
        (rf"[Uu]sed {size}i?B? of [\d.]+\w* hbm", 0),
        (rf"HLO temporaries \({size}\) exceeds", held),
    ):
        if found := re.search(pattern, error):
            units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
            return int(float(found[1]) * units[found[2]]) + others
    return None
