"""The time of a pass over a tree of drafts beside that of a step, one prompt: what verification alone costs.

    python benchmarks/tree.py MODEL [--dtype float32] [--tokens 4 8 16] [--rounds 5] [--new 64]

MODEL is a folder or a GGUF file, which without --dtype keeps its own weights. The drafts are always the same tokens in
a binary tree, so nothing is spent on guessing them. On a CPU a step of a lone prompt multiplies two rows
(docs/decoding.md). Steps and passes run in turns. Each time is the difference of a long text and a short one, so that
it has no part of the prompt's. Printed are medians of milliseconds, and ratios to a step within the rounds.
"""

import argparse
import statistics
import time

import jax.numpy as jnp

import garrulax as gx
from garrulax.sampling import speculate
from garrulax.sampling.speculate.accept import exact


class Constant(speculate.Speculation):
    """Guesses the tokens 0, 1, 2, ... in a binary tree, in every pass."""

    def __init__(self, drafts: int):
        def propose(params, memory, state):
            tokens = jnp.broadcast_to(jnp.arange(drafts, dtype=jnp.int32), (len(state.token), drafts))
            everywhere = jnp.ones_like(tokens, bool)
            return speculate.Proposal(tokens, everywhere, everywhere[:, 0]), memory

        parents = tuple(i // 2 - 1 for i in range(drafts))
        self.proposer = speculate.Proposer(parents, propose, lambda params, memory, outcome: memory, exact, always=True)

    def bind(self, weights, config, transform, requests, size):
        return speculate.Bound(self.proposer, params=(), begin=lambda state: jnp.zeros_like(state.token))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 16], help="of a pass: the last one and drafts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64)
    arguments = parser.parse_args()
    model = gx.load(arguments.model, dtype=arguments.dtype)
    model = model.replace(params=gx.unstack(model.params))
    ways = {"a step": None, **{f"{count} tokens": Constant(count - 1) for count in arguments.tokens}}
    taken = {name: [] for name in ways}
    texts = set()

    def write(way, new):
        """The seconds of a text, its passes and its tokens."""
        begun = time.perf_counter()
        found = gx.generate(model, list(range(5, 40)), max_new_tokens=new, temperature=0, end_tokens=(), speculate=way)
        return time.perf_counter() - begun, new if way is None else found.passes, tuple(found.tokens)

    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            (long, passes, text), (short, fewer, _) = (write(way, new) for new in (arguments.new, arguments.new // 4))
            texts.add(text)
            if turn:  # the first one compiles
                taken[name].append((long - short) / (passes - fewer))
    for name, times in taken.items():
        ratios = [a / b for a, b in zip(times, taken["a step"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} steps ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:10} {1e3 * statistics.median(times):7.2f} ms  {spread}")
    assert len(texts) == 1, "the texts differ"


if __name__ == "__main__":
    main()
