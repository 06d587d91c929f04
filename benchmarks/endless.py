"""A text without an end: memory and time of a step while it grows.

    python benchmarks/endless.py [--tokens 1000000]

A tiny model of random weights writes with `gx.sinks(4, 508)`. At powers of ten it prints the memory of the state, the
greatest memory of the process so far, and the time of a step, as the clock and the CPU count it.
"""

import argparse
import resource
import time

import jax

import garrulax as gx
from garrulax.sampling import compile
from garrulax.sampling.requests import prepare_model
from garrulax.sampling.start import size_of, start


def steps(tokens: int) -> None:
    config = gx.preset(
        "llama-tiny", vocab=256, width=64, layers=2, heads=4, kv_heads=2, mlp_width=128, context=512, eos=None
    )
    model = gx.init(config, jax.random.key(0)), config
    weights, decoder = prepare_model(model)[0], compile(model, cache=gx.sinks(4, 508))
    request = decoder.request(list(range(100)), max_new_tokens=tokens)
    state = start(decoder, weights, request, size_of(request, decoder.buckets))
    done, size = 0, lambda: sum(x.nbytes for x in jax.tree.leaves(state)) / 2**10
    state = jax.block_until_ready(decoder.step(weights.step, state, 1))
    for until in (10**i for i in range(3, 10)):
        last = min(1000, until - done - 1)
        state = jax.block_until_ready(decoder.step(weights.step, state, until - done - 1 - last))
        begun, cpu = time.perf_counter(), time.process_time()
        state = jax.block_until_ready(decoder.step(weights.step, state, last))
        wall, cpu = (1e6 * x / last for x in (time.perf_counter() - begun, time.process_time() - cpu))
        done = until - 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        memory = f"state {size():,.0f} KiB, process at most {peak:,.0f} MiB"
        print(f"{until:>9,} tokens: {memory}; {wall:,.0f} us a step, {cpu:,.0f} us of CPU", flush=True)
        if until >= tokens:
            assert int(state.generated[0]) == done + 1, state.generated
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10**6)
    steps(parser.parse_args().tokens)


if __name__ == "__main__":
    main()
