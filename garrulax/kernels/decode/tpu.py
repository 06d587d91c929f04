"""Decoding attention on TPUs: one pass over the blocks of the cache that are seen, all heads of a block at once."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from garrulax.kernels.blocks import pad_axis
from garrulax.kernels.call import Options
from garrulax.kernels.decode import work
from garrulax.kernels.decode.call import DecodeOperands
from garrulax.kernels.mask import Rule, Streams
from garrulax.kernels.parts import merge

LOG2E = math.log2(math.e)
NEVER = -0.7 * float(np.finfo(np.float32).max)  # score of a pair that does not attend; differences stay finite
LANES, SUBLANES = 128, 8
SCALARS = 1 << 17  # int32 words of scalar memory that a list of steps may take: half of it
AHEAD = 4  # heads whose scores are begun before a head's softmax, so that the matrix unit has something to do
MOST_ROWS = 1024  # query rows a key/value head


@dataclasses.dataclass(frozen=True)
class Kernel:
    """For TPUs; scores in float32, with base-2 exponentials.

    step_bytes: how many bytes of keys and values a step reads, about. most_keys: and at most of how many slots.
    splits: parts of about as many blocks that each sequence is cut into, for chips whose cores share a grid.
    vmem_bytes: what a program may use of a core's vector memory.
    interpret: as of `pallas_call`.
    """

    step_bytes: int = 1 << 21
    most_keys: int = 1024
    splits: int = 1
    vmem_bytes: int = 48 << 20
    interpret: Any = False

    def unsupported_reason(self, options: Options, cached: DecodeOperands) -> str | None:
        """As `decode.Implementation`."""
        c = cached
        plan = self.plan(c)
        dtypes = {x.dtype for x in (c.query, c.key)}
        page = c.key.shape[2]
        if c.steps is not None:
            return "it has no relative bias in steps"
        if not dtypes <= {jnp.dtype(x) for x in _TILES}:
            return f"it has no {', '.join(sorted(map(str, dtypes)))}"
        if c.table is not None and page % _TILES[c.key.dtype]:
            return f"pages of {page} slots are no multiple of {_TILES[c.key.dtype]}, as {c.key.dtype} needs"
        if plan.rows > MOST_ROWS:
            return f"{c.query.shape[1]} queries of {c.query.shape[2]} heads make {plan.rows} rows, above {MOST_ROWS}"
        if plan.columns >= work.MOST_COLUMNS or c.query.shape[0] >= work.MOST_ROWS:
            return f"{c.query.shape[0]} sequences of {plan.columns} blocks are beyond what a step's word can say"
        heads, widths = c.key.shape[1], c.key.shape[3] + c.value.shape[3]
        vmem = (
            2 * heads * plan.size * widths * c.key.dtype.itemsize
        )  # of which one is read while the other is waited for
        if vmem > self.vmem_bytes // 2:
            return f"{plan.size} slots of {heads} heads of widths {widths} in all do not fit into vector memory"
        words = self.splits * c.query.shape[0] * plan.columns * (1 + plan.pages)
        if words > SCALARS:
            return f"the {words} words of its list of steps do not fit into scalar memory ({SCALARS})"
        return None

    def __call__(self, options: Options, cached: DecodeOperands) -> tuple[jax.Array, jax.Array]:
        """As `decode.Implementation`."""
        plan = self.plan(cached)
        rule, streams = work.in_order(options, cached, plan.size)
        steps = self.steps(plan, rule, streams, cached)
        return _call(plan, dataclasses.replace(options, rule=rule), streams, steps, cached)

    def steps(self, plan: "Plan", rule: Rule, streams: Streams, cached: DecodeOperands) -> work.Work:
        """The blocks that it goes through. rule, streams: as from `work.in_order`."""
        B, n = cached.query.shape[0], plan.pages
        shape = (B, plan.columns * max(n, 1))
        some, every = work.blocks_seen(rule, cached.query_streams, streams, plan.size // max(n, 1), shape)
        if cached.table is None:
            return work.listed(some, every, self.splits)
        table = jnp.pad(cached.table, ((0, 0), (0, shape[1] - cached.table.shape[1])))
        some, every, table = (x.reshape(B, plan.columns, n) for x in (some, every, table))
        return work.listed(some, every, self.splits, table)

    def plan(self, cached: DecodeOperands) -> "Plan":
        """The sizes of a call."""
        (_, T, H, C), (_, K, slots, Cv) = cached.query.shape, cached.value.shape
        wanted = self.step_bytes // (K * (C + Cv) * cached.key.dtype.itemsize)
        wanted = max(LANES, min(wanted, self.most_keys) // LANES * LANES)
        if cached.table is None:
            pages, total, whole = 0, slots, 1
            size = total if total <= LANES else min(wanted, -(-total // LANES) * LANES)
        else:
            total = cached.table.shape[1] * slots
            whole = LANES // math.gcd(slots, LANES)  # pages that fill lanes
            pages = max(1, wanted // slots // whole) * whole
            pages = min(pages, -(-cached.table.shape[1] // whole) * whole)
            size = pages * slots
        rows = H // K * T
        tile = _TILES.get(cached.query.dtype, SUBLANES)
        return Plan(
            rows=-(-rows // tile) * tile,
            size=size,
            columns=-(-total // size),
            pages=pages,
            edge=total % size if cached.table is None else 0,
            turned=frozenset(name for name, n in (("key", C), ("value", Cv)) if n % LANES and whole == 1),
            queries=tuple(sorted(cached.query_streams)),
            splits=self.splits,
            vmem_bytes=self.vmem_bytes,
            interpret=self.interpret,
        )


_TILES = {
    jnp.dtype(d): n
    for d, n in ((jnp.float32, 8), (jnp.bfloat16, 16), (jnp.int8, 32), (jnp.float8_e4m3fn, 32), (jnp.float8_e5m2, 32))
}  # rows


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a call. rows: query rows a key/value head, filled up. size: slots a step. columns: steps a sequence, at
    most. pages: pages a step, 0 without. edge: slots of the last block inside a contiguous cache, 0 where it is whole.
    turned: those of "key" and "value" that are read as [.., width, slots], which is how XLA keeps arrays whose width
    does not fill lanes. queries: names of the query streams."""

    rows: int
    size: int
    columns: int
    pages: int
    edge: int
    turned: frozenset[str]
    queries: tuple[str, ...]
    splits: int
    vmem_bytes: int
    interpret: Any


class Specs:
    """Block specs of a call's arrays: which block of an array a step has in vector memory."""

    def __init__(self, plan: Plan, batch: int) -> None:
        self.plan, self.steps = plan, batch * plan.columns

    def _at(self, shape: tuple[int, ...], place: Any) -> pl.BlockSpec:
        """A block, at place(word, split) of the array."""
        return pl.BlockSpec(shape, lambda s, i, words, _: place(words[s * self.steps + i], s))

    def of_row(self, *shape: int) -> pl.BlockSpec:
        """What there is of each sequence."""
        return self._at((1, *shape), lambda word, _: (work.row_of(word), *[0] * len(shape)))

    def of_part(self, *shape: int) -> pl.BlockSpec:
        """What there is of each split of each sequence."""
        return self._at((1, 1, *shape), lambda word, split: (split, work.row_of(word), *[0] * len(shape)))

    def of_slots(self, axis: int, *shape: int) -> pl.BlockSpec:
        """What there is of each slot of each sequence, with the slots along this axis of the shape."""

        def place(word: Any, _: Any) -> tuple:
            return (work.row_of(word), *(work.column_of(word) if a == axis else 0 for a in range(len(shape))))

        return self._at((1, *shape), place)

    def of_page(self, j: int, *shape: int) -> pl.BlockSpec:
        """The j-th page of a step."""
        n = self.plan.pages

        def place(s: Any, i: Any, _: Any, pages: Any) -> tuple:
            return (pages[(s * self.steps + i) * n + j], *[0] * len(shape))

        return pl.BlockSpec((1, *shape), place)


def _call(
    plan: Plan, options: Options, streams: Streams, steps: work.Work, c: DecodeOperands
) -> tuple[jax.Array, jax.Array]:
    (B, T, H, _), (_, K, _, Cv) = c.query.shape, c.value.shape
    specs, names = Specs(plan, B), tuple(sorted(streams))
    inputs = _inputs(plan, specs, streams, c)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan, options, tuple(inputs), names, c.query.dtype),
        out_shape=[jax.ShapeDtypeStruct((plan.splits, B, K, plan.rows, n), jnp.float32) for n in (Cv, LANES)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.splits, steps.most),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[specs.of_part(K, plan.rows, n) for n in (Cv, LANES)],
            scratch_shapes=[pltpu.VMEM((K, plan.rows, n), jnp.float32) for n in (LANES, LANES, Cv)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem_bytes
        ),
        interpret=plan.interpret,
        name="decode",
    )(steps.words, steps.pages, *[x for x, _ in inputs.values()])
    out = out[:, :, :, : H // K * T].reshape(-1, B, H, T, Cv).swapaxes(2, 3)
    lse = lse[:, :, :, : H // K * T, 0].reshape(-1, B, H, T)
    if plan.splits == 1:
        return out[0].astype(c.query.dtype), lse[0]
    written = steps.shared > 0
    out = jnp.where(written[:, :, None, None, None], out, 0)
    out, lse = merge(out, jnp.where(written[:, :, None, None], lse, -jnp.inf))
    return out.astype(c.query.dtype), lse


def _inputs(plan: Plan, specs: Specs, streams: Streams, c: DecodeOperands) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """The arrays that the kernel reads and their blocks, by name. Query heads of one key/value head are rows g·T + t of
    it, filled up; pages are arrays of their own, "key0", "key1", ..."""
    (B, T, H, C), K = c.query.shape, c.value.shape[1]
    G = H // K
    more = plan.rows - G * T
    x = c.query.reshape(B, T, K, G, C).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, C)
    inputs = {"query": (pad_axis(x, more, 2), specs.of_row(K, plan.rows, C))}
    if plan.queries:
        x = jnp.stack([c.query_streams[name] for name in plan.queries], axis=2)
        inputs["query_streams"] = pad_axis(jnp.tile(x, (1, G, 1)), more, 1, "edge"), specs.of_row(plan.rows, x.shape[2])
    if streams:
        x = jnp.stack([streams[name] for name in sorted(streams)], axis=1)
        inputs["key_streams"] = x, specs.of_slots(1, x.shape[1], plan.size)
    if c.slopes is not None:
        x = pad_axis(jnp.repeat(c.slopes.reshape(K, G, 1) * LOG2E, T, axis=1), more, 1)
        inputs["slopes"] = x, pl.BlockSpec(x.shape, lambda *_: (0, 0, 0))
    for name, scales in (("key_scales", c.key_scales), ("value_scales", c.value_scales)):
        if scales is not None:
            inputs[name] = _along(scales, c, plan), specs.of_slots(1, K, plan.size)
    for name, x in (("key", c.key), ("value", c.value)):
        x = x.swapaxes(2, 3) if name in plan.turned else x
        if plan.pages:
            inputs |= {f"{name}{j}": (x, specs.of_page(j, *x.shape[1:])) for j in range(plan.pages)}
        else:
            turned = name in plan.turned
            shape = (x.shape[2], plan.size) if turned else (plan.size, x.shape[3])
            inputs[name] = x, specs.of_slots(1 + turned, K, *shape)
    return inputs


def _along(scales: jax.Array, c: DecodeOperands, plan: Plan) -> jax.Array:
    """Scales [B, K, slots] in the order of the sequences, zeros behind them."""
    if c.table is not None:
        scales = jnp.moveaxis(jnp.take(scales, c.table, axis=0, mode="clip"), 2, 1)
        scales = scales.reshape(*scales.shape[:2], -1)
    return jnp.pad(scales, ((0, 0), (0, 0), (0, plan.columns * plan.size - scales.shape[2])))


def _kernel(
    plan: Plan,
    options: Options,
    inputs: tuple[str, ...],
    names: tuple[str, ...],
    dtype: Any,
    words: Any,
    _pages: Any,
    *refs: Any,
) -> None:
    ref = dict(zip(inputs, refs, strict=False))
    out, lse, top, total, sums = refs[len(inputs) :]
    K, rows = top.shape[:2]
    word = words[pl.program_id(0) * (words.shape[0] // plan.splits) + pl.program_id(1)]

    @pl.when((word & work.FIRST) != 0)
    def _():
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def block(name, h):
        if plan.pages:
            x = [ref[f"{name}{j}"][0, h] for j in range(plan.pages)]
            return jnp.concatenate(x, axis=int(name in plan.turned)) if len(x) > 1 else x[0]
        return ref[name][0, h]

    def streams():
        q = {name: ref["query_streams"][0, :, i : i + 1] for i, name in enumerate(plan.queries)}
        k = {name: ref["key_streams"][0, i : i + 1] for i, name in enumerate(names)}
        return q, {name: jnp.broadcast_to(x, (rows, plan.size)) for name, x in k.items()}

    def step(masked):
        q, k = streams()
        seen = options.rule.evaluate(q, k) if masked else None
        distance = (k["position"] - q["position"]).astype(jnp.float32) if "slopes" in ref else None
        # What lies behind the cache's end may be anything, and 0 times anything need not be 0.
        last = work.column_of(word) == plan.columns - 1
        inside = jnp.where(last, plan.edge, plan.size)

        def scores(h):
            x = _product(ref["query"][0, h], block("key", h).astype(dtype), int("key" not in plan.turned))
            if "key_scales" in ref:
                x = x * ref["key_scales"][0, h : h + 1]
            if options.softcap is None:
                x = x * (options.scale * LOG2E)
            else:
                x = jnp.tanh(x * (options.scale / options.softcap)) * (options.softcap * LOG2E)
            if distance is not None:
                x = x + ref["slopes"][h] * distance
            return x if seen is None else jnp.where(seen, x, NEVER)

        waiting = [scores(h) for h in range(min(AHEAD, K))]
        for h in range(K):
            if h + AHEAD < K:
                waiting.append(scores(h + AHEAD))
            x = waiting[h]
            before = top[h]
            now = jnp.maximum(before, x.max(axis=1, keepdims=True))
            top[h] = now
            p = jnp.exp2(x - _wide(now, plan.size))
            fade = jnp.exp2(before - now)
            total[h] = fade * total[h] + p.sum(axis=1, keepdims=True)
            if "value_scales" in ref:
                p = p * ref["value_scales"][0, h : h + 1]
            v = block("value", h)
            turned = int("value" in plan.turned)
            if masked and plan.edge:
                v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, turned) < inside, v, 0)
            sums[h] = sums[h] * _wide(fade, sums.shape[2]) + _product(p.astype(dtype), v.astype(dtype), turned)

    partial = word & (work.PARTIAL | work.IDLE)
    pl.when(partial == 0)(lambda: step(False))
    pl.when(partial == work.PARTIAL)(lambda: step(True))

    @pl.when((word & work.LAST) != 0)
    def _():
        for h in range(K):
            empty = top[h] <= NEVER / 2
            divisor = jnp.where(empty, 1, total[h])
            out[0, 0, h] = jnp.where(_wide(empty, sums.shape[2]), 0, sums[h] / _wide(divisor, sums.shape[2]))
            lse[0, 0, h] = jnp.where(empty, -jnp.inf, (top[h] + jnp.log2(divisor)) / LOG2E)


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """x times y over x's last axis and this one of y's, in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _wide(x: jax.Array, width: int) -> jax.Array:
    """x [rows, LANES], the same in every lane, as [rows, width]."""
    if width > x.shape[1]:
        x = jnp.tile(x, (1, -(-width // x.shape[1])))
    return x[:, :width]
