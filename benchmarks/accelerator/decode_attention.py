"""Decoding attention on this device: compared with XLA's in float32, case by case, and its bytes a second.

One token a sequence over its cache, and 8 drafts; 32 heads over 8, width 128. The bytes are those of keys and values.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accelerator import device, timing
from accelerator.comparing import report, report_error
from accelerator.workers import emit, plan, wait_for_turn
from garrulax.kernels.decode import decode
from garrulax.kernels.mask import INF, Band, Bits, KRange, Mask

IMPLEMENTATIONS = {"gpu": ("pallas_gpu", "xla"), "tpu": ("pallas_tpu", "xla"), "cpu": ("xla",)}
HEADS, KV_HEADS, WIDTH, CACHES = 32, 8, 128, 4
SHAPES = ((1, 32768), (8, 16384), (64, 4096))  # sequences, slots of each
TINY_SHAPES = ((2, 256),)
CAUSAL = Band("rank", 0, INF)
Rules = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        name: For people.
        rule: Over the streams `rank` and `position`.
        queries: Of each sequence.
        width: Of a head.
        dtype: Of queries, and of the cache unless `cache` says another.
        cache: Of a cache with scales.
        page: Slots of a page; 0 is a contiguous cache.
        more: Further arguments of `decode`.
    """

    name: str
    rule: Any = CAUSAL
    queries: int = 1
    width: int = WIDTH
    dtype: str = "bfloat16"
    cache: str | None = None
    page: int = 0
    more: tuple[str, ...] = ()


CASES = (
    *(Case(f"D{width} {dtype}", width=width, dtype=dtype) for width in (64, 72, 80, 96, 112, 128, 256)
      for dtype in ("bfloat16", "float16")),
    Case("8 drafts", queries=8),
    Case("64 queries", queries=64),
    Case("window", Band("position", 0, 100)),
    Case("sinks and window", CAUSAL & (Band("position", -INF, 90) | KRange("position", 0, 3))),
    Case("ALiBi", more=("alibi",)),
    Case("softcap", more=("softcap",)),
    Case("sinks", more=("sinks",)),
    Case("pages of 64", page=64),
    Case("pages of 16", page=16),
    Case("int8", cache="int8"),
    Case("float8_e4m3fn", cache="float8_e4m3fn"),
    Case("float8_e5m2, pages of 64", cache="float8_e5m2", page=64),
)  # fmt: skip


def operands(case: Case, seed: int, slots: int) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Arrays of a request, float32 where they are numbers, and the rest of its arguments."""
    r, B = np.random.default_rng(seed), 3

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(r.normal(size=shape), jnp.float32)

    lengths = r.integers(case.queries, slots + 1, B)
    last = lengths[:, None] - case.queries + np.arange(case.queries)
    arrays = {"query": normal(B, case.queries, HEADS, case.width)}
    rows, size = (B * (slots // case.page), case.page) if case.page else (B, slots)
    for name in ("key", "value"):
        arrays[name] = normal(rows, KV_HEADS, size, case.width)
        if case.cache:
            arrays[f"{name}_scales"] = jnp.asarray(r.uniform(0.5, 2, (rows, KV_HEADS, size)), jnp.float32)
    slot = np.broadcast_to(np.arange(slots), (B, slots))
    if case.page:
        table = r.permutation(rows).reshape(B, -1).astype(np.int32)
        stream = np.zeros((rows, size), np.int32)
        stream[table.reshape(-1)] = slot.reshape(rows, size)
        arrays["table"], slot = jnp.asarray(table), stream
    streams = [{name: jnp.asarray(x, jnp.int32) for name in ("rank", "position")} for x in (last, slot)]
    more: dict[str, Any] = {"mask": Mask(*streams, case.rule), "lengths": jnp.asarray(lengths, jnp.int32)}
    extras = {
        "alibi": jnp.asarray(2.0 ** -np.linspace(1, 8, HEADS), jnp.float32),
        "softcap": 3.0,
        "sinks": normal(HEADS),
    }
    return arrays, more | {name: extras[name] for name in case.more}


def rounded(case: Case, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The arrays in the dtypes of the case."""
    done = {**arrays, "query": arrays["query"].astype(case.dtype)}
    for name in ("key", "value"):
        x = arrays[name]
        done[name] = (
            jnp.clip(jnp.round(20 * x), -127, 127).astype(jnp.int8)
            if case.cache == "int8"
            else x.astype(case.cache or case.dtype)
        )
    return done


def check(case: Case, seed: int, slots: int) -> None:
    """Reports a row for the kernel of this device."""
    arrays, more = operands(case, seed, slots)
    own = rounded(case, arrays)
    wide = {**own, "query": own["query"].astype(jnp.float32)}
    if not case.cache:
        wide |= {name: own[name].astype(jnp.float32) for name in ("key", "value")}
    name = IMPLEMENTATIONS[jax.default_backend()][0]
    title = f"decoding {case.name} {name}"
    row: dict[str, Any] = {"case": case.name, "implementation": name, "seed": seed}
    try:
        program = timing.program(functools.partial(decode, implementation=name, **more), own)
        got, again = (np.asarray(program(own)) for _ in range(2))
        with jax.default_matmul_precision("highest"):
            reference = timing.program(functools.partial(decode, implementation="xla", **more), wide)
        report(title, case.dtype, got, again, np.asarray(reference(wide)), row)
    except Exception as error:  # the other cases are compared
        report_error(title, error, row)


def drafts_mask(batch: int, slots: int, drafts: int) -> Mask:
    """A chain of drafts as a tree over the cache: a bit for each draft, and one for all committed tokens."""
    own = [1 << i for i in range(drafts)]
    ancestors = [(1 << 30) | (2 << i) - 1 for i in range(drafts)]
    row = jnp.array([1 << 30] * (slots - drafts) + own, jnp.int32)
    query = jnp.broadcast_to(jnp.array(ancestors, jnp.int32), (batch, drafts))
    return Mask({"tree": query}, {"tree": jnp.broadcast_to(row, (batch, slots))}, Bits("tree"))


@functools.partial(jax.jit, static_argnums=0)
def _random(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def chain(name: str) -> Callable:
    """Several caches read one after another, so that none is found in a cache of the processor."""

    def run(query, caches, mask):
        for key, value in caches:
            query = query + jnp.bfloat16(1e-3) * decode(query, key, value, mask=mask, implementation=name)
        return query

    return run


def speed(batch: int, slots: int, drafts: int, program: dict[str, Any], rounds: int) -> None:
    """Reports a row for each implementation."""
    keys = jax.random.split(jax.random.key(batch + drafts), 2 * CACHES)
    arrays = [_random((batch, KV_HEADS, slots, WIDTH), key) for key in keys]
    query = _random((batch, drafts, HEADS, WIDTH), keys[0])
    sets = [[query, list(zip(arrays[::2], arrays[1::2], strict=True)), drafts_mask(batch, slots, drafts)]]
    moved = CACHES * 2 * arrays[0].nbytes
    for name, error in program.items():
        if isinstance(error, str):
            emit("decode kernel", f"B{batch} S{slots} drafts {drafts} {name}", f"  {name}: {error}", error=error)
    runs = {name: (f, sets) for name, f in program.items() if not isinstance(f, str)}
    for name, seconds in timing.in_turns(runs, rounds).items():
        rate = moved / seconds
        title = f"B{batch} S{slots} drafts {drafts} {name}"
        emit(
            "decode kernel", title, f"  {title:36s} {rate / 1e12:5.2f} TB/s ({rate / timing.bandwidth():4.0%})",
            batch=batch, slots=slots, drafts=drafts, implementation=name, TBs=rate / 1e12, us=1e6 * seconds / CACHES,
        )  # fmt: skip


def main() -> None:
    """Compares, compiles, waits and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "speed"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny:
        device.accelerator()
    if args.what == "check":
        some = CASES[::8] if args.tiny else CASES
        plan(len(some))
        timing.in_threads(
            lambda job: check(job[1], args.seed + job[0], 256 if args.tiny else 1024), enumerate(some), threads=2
        )
        return
    jobs = [(*shape, drafts) for shape in (TINY_SHAPES if args.tiny else SHAPES) for drafts in (1, 8)]

    def build(job: tuple[int, int, int]) -> dict[str, Any]:
        batch, slots, drafts = job
        query, cache = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16)
            for shape in ((batch, drafts, HEADS, WIDTH), (batch, KV_HEADS, slots, WIDTH))
        )
        operands = query, [(cache, cache)] * CACHES, drafts_mask(batch, slots, drafts)
        return {name: timing.compiled(chain(name), *operands) for name in IMPLEMENTATIONS[jax.default_backend()]}

    programs = timing.in_threads(build, jobs)
    wait_for_turn()
    for job, program in zip(jobs, programs, strict=True):
        with timing.reported("decode kernel", f"B{job[0]} S{job[1]} drafts {job[2]}"):
            speed(*job, program, 2 if args.tiny else 5)


if __name__ == "__main__":
    main()
