"""Decoding speed against transformers' on this machine: GPT-2 124M's shape, random weights, float32, greedy.

    python benchmarks/decode.py --torch-python PATH [--rounds 5] [--runs 3] [--batch 8] [--beams 4]
    python benchmarks/decode.py --capacity

With --batch, both continue so many prompts at once; with --beams, both do beam search with so many beams in place of
greedy decoding. --capacity compares the time of a step between texts that may get 128 new tokens and 896.

The two run in turns, each time in a separate process, so that a drift of the machine's speed affects both alike. A
whole call is timed, with a prompt of 32 tokens and 128 new ones, after a first call that compiles. The results are
medians over all calls. PATH is the Python of an environment with torch==2.13.0 and transformers==5.23.0. Each token
reads every weight once: the rate counts the bytes of the weights, and can be compared with the rate of a copy on the
same machine (bytes read plus bytes written).
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from measuring import measure

PROMPT, NEW = 32, 128
WEIGHT_BYTES = 4 * 124_439_808
PEER = Path(__file__).parent / "peers" / "torch_decode.py"


def gpt2():
    """A model of GPT-2's shape with random weights, whose texts never end early."""
    import dataclasses

    import jax

    import garrulax as gx

    config = dataclasses.replace(gx.preset("gpt2"), eos=None)
    return gx.init(config, jax.random.key(0)), config


def capacity(runs: int) -> None:
    """Prints the median time of a step of the first 128 tokens, in turns between two limits."""
    import jax

    from garrulax.sampling import compile
    from garrulax.sampling.requests import prepare_model
    from garrulax.sampling.start import size_of, start

    model = gpt2()
    weights, decoder = prepare_model(model)[0], compile(model)
    seconds: dict[int, list[float]] = {NEW: [], 7 * NEW: []}
    for run in range(runs + 1):
        for limit, found in seconds.items():
            request = decoder.request(list(range(1000, 1000 + PROMPT)), max_new_tokens=limit, temperature=0)
            state = start(decoder, weights, request, size_of(request, decoder.buckets))
            state = jax.block_until_ready(decoder.step(weights.step, state, 1))
            begun = time.perf_counter()
            jax.block_until_ready(decoder.step(weights.step, state, NEW - 1))
            if run:
                found.append((time.perf_counter() - begun) / (NEW - 1))
    for limit, found in seconds.items():
        print(f"at most {limit} new tokens: {1e3 * statistics.median(found):.2f} ms a step ({1e3 * min(found):.2f} to "
              f"{1e3 * max(found):.2f})")  # fmt: skip


def ours(runs: int, batch: int, beams: int) -> dict:
    """Seconds of each call of `generate`."""
    import jax

    import garrulax as gx

    model = gpt2()
    prompt, seconds = [list(range(1000 + i, 1000 + i + PROMPT)) for i in range(batch)], []
    how: dict = {"temperature": 0} if beams == 1 else {"search": gx.beam(beams)}
    for _ in range(runs + 1):
        start = time.perf_counter()
        gx.generate(model, prompt, max_new_tokens=NEW, **how)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "version": f"jax {jax.__version__}"}


def copied() -> float:
    """Bytes per second of a copy by numpy, bytes read plus bytes written."""
    import numpy as np

    source = np.ones(1 << 26, np.float32)
    target, best = np.empty_like(source), 0.0
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def compare(rounds: int, runs: int, torch_python: str, batch: int, beams: int) -> None:
    """Runs the two in turns and prints their medians and the ratio."""
    commands = {
        "garrulax": [
            sys.executable,
            __file__,
            "--ours",
            "--runs",
            str(runs),
            "--batch",
            str(batch),
            "--beams",
            str(beams),
        ],
        "transformers": [torch_python, str(PEER), str(PROMPT), str(NEW), str(runs), str(beams), str(batch)],
    }
    seconds: dict[str, list[list[float]]] = {name: [] for name in commands}
    versions, bandwidth = {}, []
    for _ in range(rounds):
        for name, command in commands.items():
            result = measure(command)
            seconds[name].append(result["seconds"])
            versions[name] = result["version"]
        bandwidth.append(copied())
    medians = {name: statistics.median(itertools.chain.from_iterable(values)) for name, values in seconds.items()}
    pairs = [
        statistics.median(other) / statistics.median(own)
        for own, other in zip(seconds["garrulax"], seconds["transformers"], strict=True)
    ]
    for name, median in medians.items():
        best = min(min(values) for values in seconds[name])
        print(f"{name:13} {1e3 * median / NEW:6.2f} ms a token (best call {1e3 * best / NEW:.2f}) "
              f"{WEIGHT_BYTES * NEW / median / 1e9:5.1f} GB/s  [{versions[name]}]")  # fmt: skip
    print(f"copying: {statistics.median(bandwidth) / 1e9:.1f} GB/s")
    ratio = medians["transformers"] / medians["garrulax"]
    print(f"garrulax is {ratio:.2f}x (rounds {min(pairs):.2f} to {max(pairs):.2f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="Python with torch==2.13.0 and transformers==5.23.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--capacity", action="store_true", help="compare two limits of new tokens instead")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.runs, args.batch, args.beams)))
    elif args.capacity:
        capacity(args.runs)
    elif not args.torch_python:
        parser.error("--torch-python is needed")
    else:
        compare(args.rounds, args.runs, args.torch_python, args.batch, args.beams)
