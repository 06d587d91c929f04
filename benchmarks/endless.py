"""Texts without an end: memory and time of a step while a text grows, and a needle in a text far beyond the training.

    python benchmarks/endless.py steps [--cache sinks] [--tokens 1000000]
    python benchmarks/endless.py needle [--times 64] [--cache blocks]

`steps` writes a text with a tiny model of random weights, and prints at powers of ten the memory of the state, the
greatest memory of the process so far, and the time of a step.

`needle` trains a tiny LLaMA to repeat what stood behind a mark, on texts of its context. Then it reads texts that are
--times as long, with the needle at several depths, and counts what each kind of cache answers right.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

import garrulax as gx
from garrulax.layers.cache_kinds import Kind
from garrulax.sampling import compile
from garrulax.sampling.requests import prepare_model
from garrulax.sampling.start import size_of, start


def steps(kind: Kind, tokens: int) -> None:
    config = gx.preset("llama-tiny", vocab=256, width=64, layers=2, heads=4, kv_heads=2, mlp_width=128, context=512, eos=None)
    model = gx.init(config, jax.random.key(0)), config
    weights, decoder = prepare_model(model)[0], compile(model, cache=kind)
    request = decoder.request(list(range(100)), max_new_tokens=tokens)
    state = start(decoder, weights, request, size_of(request, decoder.buckets))
    done, size = 0, lambda: sum(x.nbytes for x in jax.tree.leaves(state)) / 2**10
    state = jax.block_until_ready(decoder.step(weights.step, state, 1))
    for until in (10**i for i in range(3, 10)):
        last = min(1000, until - done - 1)
        state = jax.block_until_ready(decoder.step(weights.step, state, until - done - 1 - last))
        begun = time.perf_counter()
        state = jax.block_until_ready(decoder.step(weights.step, state, last))
        microseconds = (time.perf_counter() - begun) / last * 1e6
        done = until - 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"{until:>9,} tokens: state {size():,.0f} KiB, process at most {peak:,.0f} MiB, {microseconds:,.0f} us a step")
        if until >= tokens:
            assert int(state.generated[0]) == done + 1, state.generated
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "needle"))
    parser.add_argument("--tokens", type=int, default=10**6)
    parser.add_argument("--cache", choices=("window", "sinks"), default="sinks")
    args = parser.parse_args()
    steps(gx.sinks(4, 508), args.tokens)


if __name__ == "__main__":
    main()
