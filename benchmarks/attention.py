"""Correctness and speed of attention on a GPU or TPU.

    python benchmarks/attention.py [--torch-python PATH] [--quick] [--out results.json] [--plot attention.png]

1. Correctness: output and gradients of every implementation that supports the request, on new random inputs, against
   the dense formula in float32; |error| / |reference| in the 2-norm. The benchmark stops at the first large error.
2. Training: TFLOP/s forward and backward for head widths x lengths x masks, with 16384 tokens and heads x width = 2048.
   FLOPs are 4 * pairs * heads * width forward and 2.5 times that backward, where pairs is the number of (query, key)
   pairs that the mask allows. Percentages are of --peak, the dense bfloat16 TFLOP/s of the device. The backward time is
   the time of forward and backward together minus that of forward.
3. Decoding: one token per sequence over its cache, and 8 drafts of a tree. Bytes of keys and values read per second,
   with percentages of --bandwidth; for comparison the rate of a copy (bytes read plus bytes written).

All implementations run in turns, round after round; each call takes another of several sets of operands, and the
medians are reported. Masks are operands, so the time includes finding the active blocks. Peers: cuDNN through jax.nn,
jax's own kernels, and with --torch-python PyTorch's SDPA in a separate process.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels import attention, masks
from garrulax.kernels.attention import IMPLEMENTATIONS
from garrulax.kernels.decode import decode
from garrulax.kernels.mask import INF, SAME_SEGMENT, Band, Bits, Mask

WINDOW, DOCUMENT, SETS = 1024, 1500, 3
PEER = Path(__file__).parent / "peers" / "torch_attention_gpu.py"
PEAK = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250, "v5e": 197, "v5 lite": 197, "v5p": 459, "v6": 920}
BANDWIDTH = {
    "H100": 3.35,
    "H200": 4.8,
    "A100": 2.04,
    "B200": 8.0,
    "v5e": 0.82,
    "v5 lite": 0.82,
    "v5p": 2.46,
    "v6": 1.64,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The measured sizes.

    Attributes:
        lengths: of the texts, in tokens.
        widths: of a head.
        caches: (sequences, slots of each) for decoding.
        tokens: of a batch.
        model: heads x width.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384)
    widths: tuple[int, ...] = (64, 128, 256)
    caches: tuple[tuple[int, int], ...] = ((1, 32768), (8, 16384), (64, 4096))
    tokens: int = 16384
    model: int = 2048


FULL, QUICK = Sizes(), Sizes(lengths=(4096, 16384))
TINY = Sizes(lengths=(256,), widths=(64,), caches=((2, 512),), tokens=512, model=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask and further arguments.

    Attributes:
        name: of the case.
        mask: builds the mask from batch and length.
        share: share of all pairs that the mask allows, by length.
        alibi: whether to add ALiBi.
    """

    name: str
    mask: Callable[[int, int], Mask | None]
    share: Callable[[int], float]
    alibi: bool = False


def _index(batch: int, length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def _window(batch: int, length: int) -> Mask:
    index = _index(batch, length)
    return Mask({"position": index, "segment": 0 * index}, rule=Band("position", 0, WINDOW - 1) & SAME_SEGMENT)


def _causal_alibi(batch: int, length: int) -> Mask:
    index = _index(batch, length)
    return Mask({"position": index, "rank": index}, rule=Band("rank", 0, INF))


def _window_share(length: int) -> float:
    keys = np.minimum(np.arange(length) + 1, WINDOW)  # of each query
    return keys.sum() / length**2


def _packed_share(length: int) -> float:
    sizes = np.bincount(np.arange(length) // DOCUMENT)
    return sum(n * (n + 1) / 2 for n in sizes) / length**2


def _causal_share(length: int) -> float:
    return (length + 1) / 2 / length


CASES = (
    Case("full", lambda batch, length: None, lambda length: 1.0),
    Case("causal", masks.causal, _causal_share),
    Case("window", _window, _window_share),
    Case("packed", lambda batch, length: masks.packed(_index(batch, length) // DOCUMENT), _packed_share),
    Case("alibi", _causal_alibi, _causal_share, alibi=True),
)


def inputs(case: Case, batch: int, length: int, heads: int, kv_heads: int, width: int, seed: int) -> list:
    """query, key, value and a cotangent of the output, bfloat16, and the mask."""
    keys = jax.random.split(jax.random.key(seed), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    arrays = [
        jax.random.normal(key, (batch, length, n, width), jnp.bfloat16) for key, n in zip(keys, counts, strict=True)
    ]
    return [*arrays, case.mask(batch, length)]


def ours(name: str, case: Case, heads: int) -> Callable:
    """attention(query, key, value, mask) by one implementation."""

    def call(query, key, value, mask):
        slopes = jnp.asarray(2.0 ** -np.linspace(1, 8, heads), jnp.float32) if case.alibi else None
        return attention(query, key, value, mask=mask, alibi=slopes, implementation=name)

    return call


def unsupported_reason(call: Callable, operands: list) -> str | None:
    """Why an implementation does not support a request, or None."""
    try:
        jax.eval_shape(call, *operands[:3], operands[4])
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def passes(call: Callable) -> tuple[Callable, Callable]:
    """The forward pass, and forward and backward together, compiled."""

    def both(query, key, value, cotangent, mask):
        out, back = jax.vjp(lambda *x: call(*x, mask), query, key, value)
        return out, back(cotangent)

    return jax.jit(lambda q, k, v, _, mask: call(q, k, v, mask)), jax.jit(both)


def check(names: list[str], length: int, bound: float = 2e-2) -> list[dict]:
    """Compares every implementation and case with the dense formula; raises SystemExit for an error above `bound`."""
    rows = []
    for case in CASES:
        for width in (64, 128, 256):
            heads = 4
            seed = time.time_ns() % 2**31
            operands = inputs(case, 2, length - 24, heads, 2, width, seed)  # a length that is no multiple of a block
            with jax.default_matmul_precision("highest"):
                exact = passes(ours("dense", case, heads))[1](
                    *(x.astype(jnp.float32) for x in operands[:4]), operands[4]
                )
            for name in names:
                call = ours(name, case, heads)
                if unsupported_reason(call, operands):
                    continue
                got = passes(call)[1](*operands)
                errors = [_distance(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True)]
                rows.append({"case": case.name, "width": width, "implementation": name, "error": max(errors)})
                print(f"  {case.name:8s} D{width:<4d} {name:11s} error {max(errors):.1e}", flush=True)
                if not max(errors) < bound:
                    raise SystemExit(f"{name} is off by {errors} for {case.name}, width {width}")
    return rows


def _distance(got: jax.Array, expected: jax.Array) -> float:
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def in_turns(calls: dict[str, tuple[Callable, list]], rounds: int, at_least: float = 0.05) -> dict[str, float]:
    """Median seconds per call of each. A round times enough calls in a row to hide the cost of starting one."""
    counts, seconds = {}, {name: [] for name in calls}
    for name, (call, sets) in calls.items():
        jax.block_until_ready(call(*sets[0]))
        start = time.perf_counter()
        jax.block_until_ready(call(*sets[-1]))
        counts[name] = max(len(sets), int(at_least / (time.perf_counter() - start)) + 1)
    for _ in range(rounds):
        for name, (call, sets) in calls.items():
            start = time.perf_counter()
            out = [call(*sets[i % len(sets)]) for i in range(counts[name])][-1]
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(s) for name, s in seconds.items()}


def peers(case: Case, length: int) -> dict[str, Callable]:
    """jax's own kernels, for the masks that they support."""
    found: dict[str, Callable] = {}
    if case.name in ("full", "causal"):
        causal = case.name == "causal"
        if jax.default_backend() == "gpu":
            from jax.experimental.pallas.ops.gpu import attention_mgpu

            backward = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
            config = attention_mgpu.TuningConfig(64, 128, max_concurrent_steps=2, causal=causal, **backward)
            found["jax mgpu (f16)"] = lambda q, k, v, _: attention_mgpu.attention(
                *(x.astype(jnp.float16) for x in (q * q.shape[-1] ** -0.5, k, v)), config
            )
        if jax.default_backend() == "tpu":
            from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
            from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash

            def call(query, key, value, _):
                kind = splash.CausalMask if causal else splash.FullMask
                mask = splash.MultiHeadMask([kind((length, length))] * query.shape[2])
                run = kernel.make_splash_mha_single_device(mask)
                q, k, v = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
                return jax.vmap(run)(q, k, v).swapaxes(1, 2)

            found["jax splash"] = call
    return found


def training(names: list[str], sizes: Sizes, rounds: int, peak: float) -> list[dict]:
    """TFLOP/s of every implementation and peer."""
    rows = []
    for case in CASES:
        for width in sizes.widths:
            for length in sizes.lengths:
                batch, heads = sizes.tokens // length, sizes.model // width
                sets = [inputs(case, batch, length, heads, heads, width, seed) for seed in range(SETS)]
                calls = {name: ours(name, case, heads) for name in names} | peers(case, length)
                forward, both = {}, {}
                for name, call in calls.items():
                    if unsupported_reason(call, sets[0]):
                        continue
                    try:
                        one, two = passes(call)
                        jax.block_until_ready(one(*sets[0]))
                        forward[name] = (one, sets)
                        jax.block_until_ready(two(*sets[0]))
                        both[name] = (two, sets)
                    except Exception as error:  # a peer that fails must not end the benchmark
                        print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
                ahead, together = in_turns(forward, rounds), in_turns(both, rounds)
                flops = 4.0 * batch * heads * length**2 * width * case.share(length)
                for name in forward:
                    back = together.get(name, float("nan")) - ahead[name]
                    speeds = flops / ahead[name] / 1e12, 2.5 * flops / back / 1e12
                    rows.append(
                        {"case": case.name, "width": width, "length": length, "implementation": name}
                        | {"forward": speeds[0], "backward": speeds[1], "peak": peak}
                    )
                    print(
                        f"  {case.name:8s} D{width:<4d} T{length:<6d} {name:15s} forward {speeds[0]:6.1f} TFLOP/s"
                        f" ({speeds[0] / peak:4.0%}), backward {speeds[1]:6.1f} ({speeds[1] / peak:4.0%})",
                        flush=True,
                    )
    return rows


def decoding(names: list[str], shapes: tuple, rounds: int, bandwidth: float) -> list[dict]:
    """Bytes of the cache read per second, with one token or 8 drafts per sequence."""
    rows, heads, kv_heads, width = [], 32, 8, 128
    for batch, slots in shapes:
        for drafts in (1, 8):
            sets = []
            for seed in range(SETS):
                keys = jax.random.split(jax.random.key(seed), 3)
                query = jax.random.normal(keys[0], (batch, drafts, heads, width), jnp.bfloat16)
                cache = [jax.random.normal(key, (batch, kv_heads, slots, width), jnp.bfloat16) for key in keys[1:]]
                sets.append([query, *cache])
            mask = _drafts(batch, slots, drafts)
            calls = {}
            for name in names:
                call = jax.jit(functools.partial(decode, mask=mask, implementation=name))
                try:
                    jax.block_until_ready(call(*sets[0]))
                except (ValueError, NotImplementedError) as error:
                    print(f"  {name}: {str(error)[:100]}")
                    continue
                calls[name] = (call, sets)
            count = 2 * 2 * batch * kv_heads * slots * width
            for name, seconds in in_turns(calls, rounds).items():
                speed = count / seconds / 1e12
                rows.append({"batch": batch, "slots": slots, "drafts": drafts, "implementation": name, "TB/s": speed})
                where = f"B{batch:<4d} S{slots:<7d} drafts {drafts}"
                print(f"  {where} {name:11s} {speed:5.2f} TB/s ({speed / bandwidth:4.0%})", flush=True)
    return rows


def _drafts(batch: int, slots: int, drafts: int) -> Mask:
    """A chain of drafts as a tree over the cache: a bit for each draft, and one for all committed tokens."""
    own = [1 << i for i in range(drafts)]
    ancestors = [(1 << 30) | (2 << i) - 1 for i in range(drafts)]
    row = jnp.array([1 << 30] * (slots - drafts) + own, jnp.int32)
    query = jnp.broadcast_to(jnp.array(ancestors, jnp.int32), (batch, drafts))
    return Mask({"tree": query}, {"tree": jnp.broadcast_to(row, (batch, slots))}, Bits("tree"))


def copied() -> float:
    """TB/s of a copy on the device, bytes read plus bytes written."""
    x = jnp.ones((1 << 29,), jnp.bfloat16)
    seconds = in_turns({"copy": (jax.jit(lambda x: x + 1), [[x]])}, 5)["copy"]
    return 2 * x.nbytes / seconds / 1e12


def plot(rows: list[dict], path: str) -> None:
    """Draws TFLOP/s against length, one panel for each mask and width."""
    import matplotlib.pyplot as plt

    cases, widths = (list(dict.fromkeys(r[k] for r in rows)) for k in ("case", "width"))
    figure, axes = plt.subplots(len(widths), len(cases), figsize=(3.2 * len(cases), 2.6 * len(widths)), squeeze=False)
    for i, width in enumerate(widths):
        for j, case in enumerate(cases):
            for name in dict.fromkeys(r["implementation"] for r in rows):
                some = [r for r in rows if (r["width"], r["case"], r["implementation"]) == (width, case, name)]
                axes[i, j].plot([r["length"] for r in some], [r["forward"] for r in some], "o-", label=name)
            axes[i, j].set(title=f"{case}, width {width}", xscale="log", ylim=(0, None))
    for axis in axes[:, 0]:
        axis.set_ylabel("forward TFLOP/s")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def of_device(table: dict[str, float]) -> float:
    """The entry of a table for this device, or NaN."""
    kind = jax.devices()[0].device_kind
    return next((value for name, value in table.items() if name in kind), float("nan"))


def main() -> None:
    """Reads the arguments, measures, and prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="Python of an environment with a PyTorch for this device")
    parser.add_argument("--quick", action="store_true", help="fewer lengths and rounds")
    parser.add_argument("--tiny", action="store_true", help="sizes for a machine without an accelerator: no results")
    parser.add_argument("--implementations", default=",".join(n for n in IMPLEMENTATIONS if n != "dense"))
    parser.add_argument("--peak", type=float, help="dense bfloat16 TFLOP/s of the device")
    parser.add_argument("--bandwidth", type=float, help="TB/s of the device's memory")
    parser.add_argument("--out", help="file for all numbers, JSON")
    parser.add_argument("--plot", help="file for the picture")
    args = parser.parse_args()
    names = args.implementations.split(",")
    peak, bandwidth = args.peak or of_device(PEAK), args.bandwidth or of_device(BANDWIDTH)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d')}, peak {peak} TFLOP/s")
    rounds = 7 if not args.quick and not args.tiny else 3
    sizes = TINY if args.tiny else QUICK if args.quick else FULL
    print("correctness")
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    result["correctness"] = check(names, 256 if args.tiny else 1024)
    result["copy TB/s"] = copied()
    print(f"a copy moves {result['copy TB/s']:.2f} TB/s\ndecoding")
    result["decoding"] = decoding([n for n in names if n != "cudnn"], sizes.caches, rounds, bandwidth)
    print("training")
    result["training"] = training(names, sizes, rounds, peak)
    if args.torch_python:
        lengths, widths = map(str, sizes.lengths), map(str, sizes.widths)
        command = [args.torch_python, str(PEER), "--lengths", *lengths, "--widths", *widths]
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout or done.stderr, file=sys.stdout if done.returncode == 0 else sys.stderr)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    if args.plot:
        plot(result["training"], args.plot)


if __name__ == "__main__":
    main()
