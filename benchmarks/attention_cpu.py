"""Attention on this machine's CPU against PyTorch's `scaled_dot_product_attention`: causal, 8 heads over 2, width 128.

    python benchmarks/attention_cpu.py --torch-python PATH [--rounds 5] [--runs 3] [--lengths 2048 4096 8192]

The two run in turns, each in a separate process with one thread per core, so that a drift of the machine's speed
affects both alike. It prints medians over all runs, and the ratio with its range over the rounds. PATH is the Python of
an environment with torch==2.13.0. FLOPs count the pairs that attend: 4 H C per pair forward, 14 H C with the backward
pass. The memory is what XLA plans besides arguments and results, for forward and backward.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

from measuring import measure

HEADS, KV_HEADS, WIDTH = 8, 2, 128
PEER = Path(__file__).parent / "peers" / "torch_attention.py"
FLOPS = {"forward": 4, "forward + backward": 14}
LONG = 16384  # length at which memory is measured


def passes():
    """Compiled functions of the arrays: forward, and forward with the gradients of query, key and value."""
    import jax

    from garrulax.kernels import attention

    def forward(query, key, value, cotangent, mask):
        return attention(query, key, value, mask=mask, implementation="xla")

    def both(query, key, value, cotangent, mask):
        return jax.vjp(lambda *x: forward(*x, cotangent, mask), query, key, value)[1](cotangent)

    return {"forward": jax.jit(forward), "forward + backward": jax.jit(both)}


def arguments(length: int, dtype: str) -> list:
    import jax
    import numpy as np

    from garrulax.kernels import causal

    rng = np.random.default_rng(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    arrays = [jax.numpy.asarray(rng.normal(size=(1, length, h, WIDTH)), dtype) for h in heads]
    return [*arrays, causal(1, length)]


def ours(lengths: list[int], dtype: str, runs: int) -> dict:
    """Milliseconds of every run by pass and length, after one run that compiles; MiB of temporaries at `LONG`."""
    import jax

    times: dict[str, list[float]] = {}
    for length in lengths:
        x = arguments(length, dtype)
        for name, function in passes().items():
            seconds = []
            for _ in range(runs + 1):
                start = time.perf_counter()
                jax.block_until_ready(function(*x))
                seconds.append(time.perf_counter() - start)
            times[f"{length} {name}"] = [1e3 * s for s in seconds[1:]]
    shapes = jax.eval_shape(lambda: arguments(LONG, dtype))
    plan = passes()["forward + backward"].lower(*shapes).compile().memory_analysis()
    return {"milliseconds": times, "memory": plan.temp_size_in_bytes / 2**20, "version": f"jax {jax.__version__}"}


def compare(dtype: str, lengths: list[int], rounds: int, runs: int, torch_python: str) -> None:
    """Runs the two in turns and prints one line for each pass and length."""
    sizes = [*map(str, (HEADS, KV_HEADS, WIDTH, os.cpu_count(), runs)), dtype, *map(str, lengths)]
    words = ["--ours", dtype, "--runs", str(runs), "--lengths", *map(str, lengths)]
    commands = {"ours": [sys.executable, __file__, *words], "torch": [torch_python, str(PEER), *sizes]}
    results: dict[str, list[dict]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            results[name].append(measure(command))
    print(f"{dtype}: {results['ours'][0]['version']}, {results['torch'][0]['version']}; temporaries of forward and "
          f"backward at {LONG}: {results['ours'][0]['memory']:.0f} MiB")  # fmt: skip
    for length, name in itertools.product(lengths, FLOPS):
        times = {side: [r["milliseconds"][f"{length} {name}"] for r in results[side]] for side in commands}
        medians = {side: statistics.median(itertools.chain.from_iterable(rows)) for side, rows in times.items()}
        pairs = [
            statistics.median(t) / statistics.median(o) for o, t in zip(times["ours"], times["torch"], strict=True)
        ]
        flops = FLOPS[name] * HEADS * WIDTH * length * (length + 1) / 2
        print(f"{length:6} {name:18} ours {medians['ours']:8.1f} ms {flops / medians['ours'] / 1e6:4.0f} GFLOP/s  "
              f"torch {medians['torch']:8.1f} ms {flops / medians['torch'] / 1e6:4.0f} GFLOP/s  "
              f"ours is {medians['torch'] / medians['ours']:.2f}x ({min(pairs):.2f} to {max(pairs):.2f})")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="Python with torch==2.13.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.lengths, args.ours, args.runs)))
    elif not args.torch_python:
        parser.error("--torch-python is needed")
    else:
        for each in args.dtypes:
            compare(each, args.lengths, args.rounds, args.runs, args.torch_python)
