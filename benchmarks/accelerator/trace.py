"""A table of the kernels of a traced program by part of a training step.

XLA's profiler names the instruction that each kernel belongs to. The text of the compiled program says in which
functions of this library the instruction was made, which tells the part:

- attention: made in `kernels/`, or a kernel of cuDNN's attention;
- optimizer: made outside the loss and its gradient: clipping, norms of gradients, updates, with Muon's products;
- copies: slices of stacked layers, transposes, casts of parameters, copies and fills of memory;
- products: matrix products of the model, with what is fused into them;
- loss: what else is computed outside the layers: embedding, softmax, cross-entropy;
- elementwise: what else is computed in the layers: norms, rotary embedding, activations, residuals.
"""

import glob
import re
from collections import Counter
from typing import NamedTuple

import jax

PARTS = ("products", "attention", "elementwise", "loss", "optimizer", "copies", "other")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|^dot|_dot_|matmul", re.IGNORECASE)
_ATTENTION = re.compile(r"sdpa|flash|fmha|attention", re.IGNORECASE)
#: XLA names the fusion of a single operation, whatever it is, `wrapped_` and the operation.
_COPY = re.compile(
    r"^(Mem|mem|copy|wrapped_(copy|slice|transpose|dynamic_|concatenate|broadcast|pad)|input_transpose_fusion"
    r"|loop_(transpose|broadcast|concatenate|pad)_fusion)"
)
_MOVES = ("dynamic_slice", "dynamic_update_slice", "transpose", "copy", "reshape", "squeeze")


class Kernel(NamedTuple):
    """A kernel of a traced program.

    Attributes:
        ms: Milliseconds a step.
        calls: How often it runs in a step.
        op: The instruction that it belongs to.
        name: Of the kernel.
    """

    ms: float
    calls: float
    op: str
    name: str


class Origin(NamedTuple):
    """Where an instruction was made.

    Attributes:
        op_name: JAX's path of transformations and primitives, such as "jit(step)/jvp()/while/body/mul".
        frames: "file:function" of the functions that made it, the innermost first.
    """

    op_name: str
    frames: tuple[str, ...]


def kernels(folder: str, steps: int) -> tuple[list[Kernel], float]:
    """The kernels of a trace, those that take longest first, and the milliseconds a step from the first to the last.

    On CPUs, of which XLA traces threads, these are the instructions.
    """
    path = sorted(glob.glob(f"{folder}/**/*.xplane.pb", recursive=True))[-1]
    planes = list(jax.profiler.ProfileData.from_file(path).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    times: Counter = Counter()
    calls: Counter = Counter()
    first, last = float("inf"), 0.0
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                op = dict(event.stats).get("hlo_op")
                if op is None and not devices:
                    continue
                key = str(op or event.name), event.name
                times[key] += event.duration_ns
                calls[key] += 1
                first, last = min(first, event.start_ns), max(last, event.start_ns + event.duration_ns)
    found = [Kernel(ns / 1e6 / steps, calls[key] / steps, *key) for key, ns in times.most_common()]
    return found, max(0.0, last - first) / 1e6 / steps


def origins(text: str) -> dict[str, Origin]:
    """The origin of every instruction of a compiled program; of a fusion without one, that of what it computes.

    Args:
        text: `compiled.as_text()`.
    """
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    found: dict[str, tuple[str, int]] = {}
    inside: dict[str, list[tuple[str, int]]] = {}
    calls: dict[str, str] = {}
    table = computation = ""
    for line in text.splitlines():
        if line in _TABLES:
            table = line
        elif table and (row := re.match(r"(\d+) (.*)", line)):
            tables[table][int(row[1])] = row[2].strip('"')
        elif line.endswith("{") and (head := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", line)):
            table, computation = "", head[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            name, origin = re.search(r'op_name="([^"]*)"', line), re.search(r"stack_frame_id=(\d+)", line)
            if name or origin:
                found[instruction[1]] = (name[1] if name else "", int(origin[1]) if origin else 0)
                inside.setdefault(computation, []).append(found[instruction[1]])
            if called := re.search(r"\bcalls=%?([\w.\-]+)", line):
                calls[instruction[1]] = called[1]
    for name, called in calls.items():
        if (name not in found or not found[name][1]) and called in inside:
            found[name] = max(inside[called], key=lambda origin: origin[1])
    stacks = _stacks(tables)
    return {name: Origin(op, stacks.get(frame, ())) for name, (op, frame) in found.items()}


def _stacks(tables: dict[str, dict[int, str]]) -> dict[int, tuple[str, ...]]:
    """The functions of each stack frame, the innermost first."""

    def field(text: str, name: str) -> int:
        number = re.search(rf"{name}=(\d+)", text)
        return int(number[1]) if number else 0

    frames = tables["StackFrames"]
    shift = 1 if field(frames.get(1, ""), "parent_frame_id") == 1 else 0  # some versions write the parent + 1
    stacks: dict[int, tuple[str, ...]] = {}
    for number, text in frames.items():  # parents come first
        location = tables["FileLocations"].get(field(text, "file_location_id"), "")
        file = tables["FileNames"].get(field(location, "file_name_id"), "")
        function = tables["FunctionNames"].get(field(location, "function_name_id"), "")
        stacks[number] = (f"{file}:{function}", *stacks.get(field(text, "parent_frame_id") - shift, ()))
    return stacks


def part_of(kernel: Kernel, origin: Origin | None) -> str:
    """The part of a training step that a kernel belongs to; one of `PARTS`."""
    op_name, frames = origin or Origin("", ())

    def made_in(text: str) -> bool:
        return any(text in frame for frame in frames)

    if _ATTENTION.search(kernel.name) or _ATTENTION.search(kernel.op) or made_in("garrulax/kernels/"):
        return "attention"
    if frames and not made_in("train/objectives.py"):
        return "copies" if made_in("compute_dtype") else "optimizer"
    if _PRODUCT.search(kernel.name) or _PRODUCT.search(kernel.op):
        return "products"
    if _COPY.match(kernel.name) or op_name.rsplit("/", 1)[-1] in _MOVES:
        return "copies"
    if "dot_general" in op_name and kernel.op.startswith("custom-call"):
        return "products"
    if not frames:
        return "other"
    return "elementwise" if made_in("layers/stack.py") else "loss"


def by_part(found: list[Kernel], text: str) -> dict[str, float]:
    """Milliseconds of a step by part.

    Args:
        found: The kernels.
        text: Of the compiled program.
    """
    places = origins(text)
    total: Counter = Counter()
    for kernel in found:
        total[part_of(kernel, places.get(kernel.op))] += kernel.ms
    return {part: total[part] for part in PARTS if total[part]}
