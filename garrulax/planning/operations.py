"""Floating-point operations and bytes of memory of single instructions of a compiled program."""

import math
import re

from garrulax.planning.hlo import Array, Instruction, Module

#: Instructions that move nothing, or whose work is that of what they call.
FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "copy-start",
     "copy-done", "partition-id", "replica-id", "after-all", "opt-barrier", "async-start", "async-update", "async-done"}
)  # fmt: skip


def product_flops(module: Module, where: str, i: Instruction, scope: str = "") -> int:
    """FLOPs of the matrix products in an instruction, and in the fusions that it calls; not of what a kernel computes.

    Args:
        module: The program.
        where: Name of the instruction's computation.
        i: The instruction.
        scope: Only those of operations that were traced in this `jax.named_scope`; "" is all.
    """
    # What a loop or a condition calls is counted on its own.
    inside = () if i.opcode in ("while", "call", "conditional") else module.inside(i)
    found = [(where, i), *inside]
    return sum(_product(module.computations[name], inner) for name, inner in found if in_scope(inner, scope))


def in_scope(i: Instruction, scope: str) -> bool:
    """Whether an operation was traced in a `jax.named_scope`; "" is any."""
    return not scope or f"/{scope}/" in (i.attribute(r'op_name="([^"]*)"') or "")


def _product(computation: dict[str, Instruction], i: Instruction) -> int:
    if i.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation[name].arrays[0] for name in i.operands[:2])
    if i.opcode == "dot":
        contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2 * i.arrays[0].count * math.prod(left.shape[int(d)] for d in contracted.split(",") if d)
    return _convolution(i, left, right)


def _convolution(i: Instruction, left: Array, right: Array) -> int:
    """TPUs write products as convolutions: batches and contracted dimensions are windows, most of them padding."""
    labels = i.attribute(r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
    assert labels is not None
    of_left, of_right, of_out = re.split(r"_|->", labels)
    out = i.arrays[0]
    pairs = 1
    for d in (c for c in of_out if c.isdigit()):
        window = {name: _window(i, name, int(d)) for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")}
        pairs *= _pairs(left.shape[of_left.index(d)], out.shape[of_out.index(d)], window)
    others = out.shape[of_out.index("b")] * out.shape[of_out.index("f")] * right.shape[of_right.index("i")]
    return 2 * others * pairs


def _window(i: Instruction, name: str, d: int) -> int:
    """An attribute of a window in one dimension; of `pad` what stands before."""
    found = i.attribute(rf"window=\{{[^}}]*\b{name}=([-\d_x]+)")
    if found is None:
        return 0 if name == "pad" else 1
    return int(found.split("x")[d].split("_")[0])


def _pairs(inputs: int, outputs: int, window: dict[str, int]) -> int:
    """How many pairs of an output and a place in the window read an entry of the input, not padding or a hole."""
    if window["size"] == 1 and window["pad"] == 0 and window["lhs_dilate"] == 1:
        return outputs
    count = 0
    for k in range(window["size"]):
        first = k * window["rhs_dilate"] - window["pad"]
        places = (first + o * window["stride"] for o in range(outputs))
        holes = window["lhs_dilate"]
        count += sum(place % holes == 0 and 0 <= place // holes < inputs for place in places)
    return count


def memory_bytes(module: Module, where: str, i: Instruction) -> int:
    """Bytes of HBM that an instruction reads and writes.

    Of an array of which it reads or writes one slice, such as a layer of a stack, the slice counts.

    Args:
        module: The program.
        where: Name of the instruction's computation.
        i: The instruction.
    """
    if i.opcode in FREE or i.opcode.endswith(("-start", "-done")):
        return 0
    computation = module.computations[where]
    read = [computation[name].arrays for name in i.operands if name in computation]
    if i.opcode == "dynamic-slice":
        return 2 * _far(i.arrays)
    if i.opcode == "dynamic-update-slice":
        return 2 * _far(read[1])
    called = i.called
    if i.opcode == "fusion" and called and called[0] in module.computations:
        inner = module.computations[called[0]]
        return sum(_read(inner, n, arrays) for n, arrays in enumerate(read)) + _written(inner, i)
    return _far(i.arrays) + sum(map(_far, read))


def _far(arrays: tuple[Array, ...]) -> int:
    return sum(a.bytes for a in arrays if not a.near)


def _read(inner: dict[str, Instruction], number: int, arrays: tuple[Array, ...]) -> int:
    """Bytes that a fusion reads of its operand of that number."""
    whole = _far(arrays)
    own = next((i for i in inner.values() if i.opcode == "parameter" and f"parameter({number})" in i.text), None)
    if own is None or not whole:
        return whole
    users = [i for i in inner.values() if own.name in i.operands]
    if users and all(u.opcode == "dynamic-slice" for u in users):
        return min(whole, sum(u.bytes for u in users))
    if users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == own.name for u in users):
        return 0  # it is written in place
    return whole


def _written(inner: dict[str, Instruction], fusion: Instruction) -> int:
    """Bytes that a fusion writes."""
    root = next(i for i in inner.values() if i.is_root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.arrays):
        return _far(fusion.arrays)
    return sum(
        0 if array.near else _update(inner, result, array) for array, result in zip(fusion.arrays, results, strict=True)
    )


def _update(inner: dict[str, Instruction], result: Instruction, array: Array) -> int:
    while result.opcode in ("bitcast", "copy") and result.operands[0] in inner:
        result = inner[result.operands[0]]
    if result.opcode == "dynamic-update-slice":
        return inner[result.operands[1]].bytes
    return array.bytes


def kernel_pass(i: Instruction) -> str | None:
    """Whether an instruction is a kernel of attention: "forward", "backward", or None."""
    if i.opcode != "custom-call":
        return None
    target = i.attribute(r'custom_call_target="([^"]*)"') or ""
    if "fmha" in target:
        return "backward" if "Backward" in target else "forward"
    source = i.attribute(r'op_name="([^"]*)"') or ""
    found = re.search(r"attention_(forward|backward)(?![a-z_])", f"{i.name} {source}")
    return found[1] if found and ("tpu" in target or "mosaic" in target or "triton" in target) else None
