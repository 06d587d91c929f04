"""Decoding speed: GPT-2 124M's shape, random weights, batch 1, float32, greedy; against transformers on torch.

    python benchmarks/decode.py --torch-python path/to/python-with-torch-and-transformers

Runs the two in turns, each time in a process of its own, and compares the medians. A 32-token prompt, 128 new tokens;
what is timed is the whole call, prompt included, after a first call that compiles. Reading the weights once a token is
the least that any program must do: bytes a second are these, to be compared with what the machine copies.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

PROMPT, NEW = 32, 128
WEIGHTS = 124_439_808  # parameters, of which a token's step reads all but most of the position table


def ours(runs):
    import dataclasses

    import jax

    import garrulax as gx

    config = dataclasses.replace(gx.preset("gpt2"), eos=None)  # every run makes all its tokens
    model = (gx.unstack(gx.init(config, jax.random.key(0))), config)
    prompt = list(range(1000, 1000 + PROMPT))

    def run():
        made = gx.generate(model, prompt, max_new_tokens=NEW, temperature=0)
        return len(made.tokens)

    return timed(run, runs)


def theirs(runs):
    import torch
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    prompt = torch.arange(1000, 1000 + PROMPT)[None]
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}

    def run():
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).shape[1] - PROMPT

    return timed(run, runs)


def timed(run, runs):
    run()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        made = run()
        seconds.append(time.perf_counter() - start)
        if made != NEW:
            raise RuntimeError(f"made {made} tokens, not {NEW}")
    return seconds


def copy_bandwidth():
    """Bytes a second that numpy copies, read and written ones both counted: the best of several tries."""
    import numpy as np

    a = np.ones(1 << 26, np.float32)
    b = np.empty_like(a)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(b, a)
        best = max(best, 2 * a.nbytes / (time.perf_counter() - start))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", help="a Python with torch and transformers; without it, only ours is timed")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--runs", type=int, default=3, help="timed calls in a process")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"ours": ours, "theirs": theirs}[args.side](args.runs)))
        return
    pythons = {"ours": sys.executable, **({"theirs": args.torch_python} if args.torch_python else {})}
    seconds = {side: [] for side in pythons}
    for _ in range(args.rounds):
        for side, python in pythons.items():
            command = [python, __file__, "--side", side, "--runs", str(args.runs)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            seconds[side] += json.loads(out.splitlines()[-1])
    copied = copy_bandwidth()
    print(f"{'':12} {'ms/token':>9} {'(best)':>8} {'GB/s':>6}")
    for side, values in seconds.items():
        median, best = statistics.median(values) / NEW, min(values) / NEW
        name = {"ours": "Garrulax", "theirs": "transformers"}[side]
        print(f"{name:12} {median * 1e3:9.2f} {best * 1e3:8.2f} {4 * WEIGHTS / median / 1e9:6.1f}")
    print(f"copying: {copied / 1e9:.1f} GB/s read and written")
    if "theirs" in seconds:
        ratio = statistics.median(seconds["theirs"]) / statistics.median(seconds["ours"])
        print(f"Garrulax makes {ratio:.2f} times as many tokens a second")


if __name__ == "__main__":
    main()
