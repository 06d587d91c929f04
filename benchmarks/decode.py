"""Decoding speed against transformers' on this machine: GPT-2 124M's shape, random weights, batch 1, float32, greedy.

    python benchmarks/decode.py --torch-python PATH [--rounds 5] [--runs 3] [--beams 4]

With --beams, both do beam search with so many beams in place of greedy decoding.

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


def ours(runs: int, beams: int) -> dict:
    """Seconds of each call of `generate`."""
    import dataclasses

    import jax

    import garrulax as gx

    config = dataclasses.replace(gx.preset("gpt2"), eos=None)  # no call ends early
    model = (gx.unstack(gx.init(config, jax.random.key(0))), config)
    prompt, seconds = list(range(1000, 1000 + PROMPT)), []
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


def compare(rounds: int, runs: int, torch_python: str, beams: int) -> None:
    """Runs the two in turns and prints their medians and the ratio."""
    commands = {
        "garrulax": [sys.executable, __file__, "--ours", "--runs", str(runs), "--beams", str(beams)],
        "transformers": [torch_python, str(PEER), str(PROMPT), str(NEW), str(runs), str(beams)],
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
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.runs, args.beams)))
    elif not args.torch_python:
        parser.error("--torch-python is needed")
    else:
        compare(args.rounds, args.runs, args.torch_python, args.beams)
