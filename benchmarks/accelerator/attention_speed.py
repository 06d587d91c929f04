"""TFLOP/s of attention, forward and backward, of every implementation and peer on this device.

16,384 tokens, heads x width = 2048, bfloat16. FLOPs are 4 * pairs * heads * width forward and 2.5 times that backward,
where pairs is the number of (query, key) pairs that the mask allows. The rate "of blocks" counts all pairs of the
blocks of 128 x 128 in which some pair is allowed: what a kernel cannot avoid to compute. The backward time is that of
forward and backward together minus that of forward. Masks are operands, so the time includes finding the active blocks.

Implementations of one row are measured in turns; each call takes another of several sets of operands; medians. Peers in
this process: cuDNN through jax.nn, and jax's own kernels.
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
from accelerator.workers import emit, wait_for_turn
from garrulax.kernels import masks
from garrulax.kernels.attention import REGISTRY, attention, request
from garrulax.kernels.mask import INF, SAME_SEGMENT, Band, Mask

WINDOW, DOCUMENT, SETS, BLOCK = 1024, 1500, 3, 128
IMPLEMENTATIONS = {"gpu": ("pallas_gpu", "cudnn"), "tpu": ("pallas_tpu", "xla"), "cpu": ("xla",)}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The measured sizes.

    Attributes:
        lengths: Of the texts, in tokens.
        widths: Of a head.
        tokens: Of a batch.
        model: Heads x width.
    """

    lengths: tuple[int, ...] = (4096, 16384)
    widths: tuple[int, ...] = (64, 128, 256)
    tokens: int = 16384
    model: int = 2048


FULL = Sizes()
TINY = Sizes(lengths=(256,), widths=(64,), tokens=256, model=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask and further arguments.

    Attributes:
        name: Of the case.
        mask: Builds the mask from batch and length.
        allowed: Which pairs attend, of arrays of queries and keys.
        alibi: Whether to add ALiBi.
    """

    name: str
    mask: Callable[[int, int], Mask | None]
    allowed: Callable[[np.ndarray, np.ndarray], np.ndarray]
    alibi: bool = False


def _index(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def _window(batch: int, length: int) -> Mask:
    index = _index(batch, length)
    return Mask({"position": index, "segment": 0 * index}, rule=Band("position", 0, WINDOW - 1) & SAME_SEGMENT)


def _causal_alibi(batch: int, length: int) -> Mask:
    index = _index(batch, length)
    return Mask({"position": index, "rank": index}, rule=Band("rank", 0, INF))


def _packed(batch: int, length: int) -> Mask:
    return masks.packed(_index(batch, length) // DOCUMENT)


CASES = (
    Case("full", lambda batch, length: None, lambda q, k: np.full(np.broadcast_shapes(q.shape, k.shape), True)),
    Case("causal", masks.causal, lambda q, k: k <= q),
    Case("window", _window, lambda q, k: (k <= q) & (q - k < WINDOW)),
    Case("packed", _packed, lambda q, k: (k <= q) & (q // DOCUMENT == k // DOCUMENT)),
    Case("alibi", _causal_alibi, lambda q, k: k <= q, alibi=True),
)


def pairs(case: Case, length: int) -> tuple[int, int]:
    """How many pairs attend, and how many lie in blocks in which some pair attends."""
    key = np.arange(length)
    allowed = active = 0
    for first in range(0, length, BLOCK):
        rows = case.allowed(np.arange(first, min(first + BLOCK, length))[:, None], key)
        allowed += int(rows.sum())
        active += int(np.add.reduceat(rows.any(axis=0), np.arange(0, length, BLOCK)).astype(bool).sum()) * BLOCK**2
    return allowed, active


@functools.partial(jax.jit, static_argnums=0)
def _random(shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def inputs(case: Case, batch: int, length: int, heads: int, width: int, seed: int) -> list:
    """query, key, value and a cotangent of the output, bfloat16, and the mask."""
    keys = jax.random.split(jax.random.key(seed), 4)
    return [*(_random((batch, length, heads, width), key) for key in keys), case.mask(batch, length)]


def _slopes(case: Case, heads: int) -> jax.Array | None:
    return jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32) if case.alibi else None


def ours(name: str, case: Case, heads: int) -> Callable:
    """attention(query, key, value, mask) by one implementation."""

    def call(query, key, value, mask):
        return attention(query, key, value, mask=mask, alibi=_slopes(case, heads), implementation=name)

    return call


def peers(case: Case, length: int) -> dict[str, Callable]:
    """jax's own kernels, for the masks that they support."""
    causal, backend = case.name == "causal", jax.default_backend()
    if case.name not in ("full", "causal"):
        return {}
    if backend == "gpu":

        def mgpu(query, key, value, _):
            from jax.experimental.pallas.ops.gpu import attention_mgpu

            backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
            config = attention_mgpu.TuningConfig(64, 128, max_concurrent_steps=2, causal=causal, **backward)
            scaled = query * query.shape[-1] ** -0.5
            return attention_mgpu.attention(*(x.astype(jnp.float16) for x in (scaled, key, value)), config)

        return {"jax mgpu (f16)": mgpu}
    if backend == "tpu":

        def splash(query, key, value, _):
            from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
            from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as kinds

            kind = kinds.CausalMask if causal else kinds.FullMask
            run = kernel.make_splash_mha_single_device(kinds.MultiHeadMask([kind((length, length))] * query.shape[2]))
            q, k, v = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
            return jax.vmap(run)(q, k, v).swapaxes(1, 2)

        return {"jax splash": splash}
    return {}


def passes(call: Callable) -> tuple[Callable, Callable]:
    """The forward pass, and forward and backward together."""

    def forward(query, key, value, cotangent, mask):
        return call(query, key, value, mask)

    def both(query, key, value, cotangent, mask):
        out, back = jax.vjp(lambda *x: call(*x, mask), query, key, value)
        return out, back(cotangent.astype(out.dtype))

    return forward, both


def picked(case: Case, heads: int, operands: list) -> str:
    """The implementation that is picked where none is named."""
    found: list[Any] = []

    def ask(query, key, value, mask):
        parts = request(query, key, value, mask, None, _slopes(case, heads), None, None, None, None, 0.0, None)
        found.append(REGISTRY.pick(None, *parts))
        return query

    jax.eval_shape(ask, *operands[:3], operands[4])
    names = {entry.split(":")[1]: name for name, entry in REGISTRY.implementations.items()}
    chosen = type(found[0].inner).__name__
    return names.get(chosen, chosen)


@dataclasses.dataclass(frozen=True)
class Job:
    """A row of the table: a case and its sizes."""

    case: Case
    width: int
    length: int
    batch: int
    heads: int

    def sets(self, count: int = SETS) -> list:
        """Operands, for each of the sets."""
        return [inputs(self.case, self.batch, self.length, self.heads, self.width, seed) for seed in range(count)]

    def calls(self) -> dict[str, Callable]:
        """attention(query, key, value, mask) of all that are compared."""
        names = IMPLEMENTATIONS[jax.default_backend()]
        return {name: ours(name, self.case, self.heads) for name in names} | peers(self.case, self.length)


def built(job: Job) -> dict[str, list]:
    """The programs of a row: forward, and both passes, or why there is none."""
    operands = job.sets(1)[0]
    return {name: [timing.compiled(f, *operands) for f in passes(call)] for name, call in job.calls().items()}


def measure(job: Job, programs: dict[str, list], rounds: int) -> None:
    """Reports a row for each implementation."""
    sets, best = job.sets(), picked(job.case, job.heads, job.sets(1)[0])
    found: list[dict[str, float]] = []
    for i in range(2):
        runs = {name: (done[i], sets) for name, done in programs.items() if not isinstance(done[i], str)}
        found.append(timing.in_turns(runs, rounds))
    allowed, active = pairs(job.case, job.length)
    flops = 4.0 * job.batch * job.heads * job.width * allowed
    for name, done in programs.items():
        title = f"{job.case.name} D{job.width} T{job.length} {name}"
        if isinstance(done[0], str):
            if "cannot compute this" not in done[0]:
                emit("speed", title, f"  {title}: {done[0][:120]}", error=done[0])
            continue
        seconds = found[0][name]
        back = found[1].get(name, float("nan")) - seconds
        row = {
            "case": job.case.name, "width": job.width, "length": job.length, "implementation": name,
            "picked": name == best, "forward": flops / seconds / 1e12, "backward": 2.5 * flops / back / 1e12,
            "forward_ms": 1e3 * seconds, "backward_ms": 1e3 * back, "blocks": active / allowed,
        }  # fmt: skip
        text = (
            f"  {title:36s} forward {row['forward']:6.1f} TFLOP/s ({row['forward'] / timing.peak() * 1e12:4.0%}),"
            f" backward {row['backward']:6.1f} ({row['backward'] / timing.peak() * 1e12:4.0%});"
            f" of blocks {row['forward'] * row['blocks']:6.1f}, {row['backward'] * row['blocks']:6.1f}"
            f"{'  picked' if row['picked'] else ''}"
        )
        if isinstance(done[1], str):
            text += f"  no backward pass: {done[1][:80]}"
        emit("speed", title, text, **row)


def main() -> None:
    """Compiles a share of the rows, waits, and measures them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th row from the i-th on")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny:
        device.accelerator()
    first, step = map(int, args.share.split("/"))
    sizes = TINY if args.tiny else FULL
    jobs = [
        Job(case, width, length, sizes.tokens // length, sizes.model // width)
        for width in sizes.widths
        for length in sizes.lengths
        for case in CASES
    ][first::step]
    programs = timing.in_threads(built, jobs)
    wait_for_turn()
    for job, some in zip(jobs, programs, strict=True):
        title = f"{job.case.name} D{job.width} T{job.length}"
        with timing.reported("speed", title):
            measure(job, some, 2 if args.tiny else 5)


if __name__ == "__main__":
    main()
