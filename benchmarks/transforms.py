"""Time of the transforms of logits at GPT-2's vocabulary on this machine, in microseconds a step: clock, processor.

    python benchmarks/transforms.py [--rows 1] [--rounds 9]

Each transform alone, the default chain, and all transforms on, in turns, so that a drift of the machine's speed affects
all alike: medians over the rounds. The processor's time is that of all threads; on a busy machine it is the better
measure of the two. A step of GPT-2 124M's shape reads 498 MB of weights; the time of a copy of as many
bytes (read, not written) says how long it takes at least.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import garrulax as gx
from garrulax.sampling import knobs, transforms

V, PROMPT, SIZE = 50257, 32, 1024
WEIGHT_BYTES = 4 * 124_439_808
ON = {
    "guidance_scale": 1.5,
    "sequence_bias": {(5, 6): 1.0, (7,): -1.0},
    "logit_bias": {9: 1.0},
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "no_repeat_ngram_size": 3,
    "bad_words_ids": [[10], [11, 12]],
    "min_length": 2000,
    "min_new_tokens": 2000,
    "allowed_tokens": list(range(V - 10)),
    "exponential_decay_length_penalty": (0, 1.01),
    "suppress_tokens": [13, 14],
    "begin_suppress_tokens": [15],
    "forced_bos_token_id": 16,
    "forced_eos_token_id": 17,
    "temperature": 0.8,
    "top_h": 0.99,
    "top_k": 200,
    "top_p": 0.95,
    "min_p": 1e-4,
    "typical_p": 0.95,
    "epsilon_cutoff": 1e-6,
    "eta_cutoff": 1e-6,
    "watermark": gx.watermark("a secret", "gumbel"),
}


def step_of(transform: transforms.Transform, given: dict, rows: int):
    """A compiled step, its state, and logits: (logits, token, state) -> (logits, state)."""
    rng = np.random.default_rng(0)
    arrays = knobs.knob_arrays(transform, knobs.knobs_per_prompt(rows, vocab=V, **given), rows)
    prompt = np.tile(np.arange(PROMPT, dtype=np.int32) % 8, (rows, 1))
    reserved = {
        "prompt": prompt,
        "ends": np.full((rows, 1), 50256, np.int32),
        "limit": np.full(rows, 99, np.int32),
        "unconditional": np.arange(rows) % 2 == 1,
    }
    state = jax.jit(lambda knobs: transform.init({**knobs, "vocab": V, "size": SIZE}))({**arrays, **reserved})
    logits = jnp.asarray(rng.normal(size=(rows, V)) * 3, jnp.float32)

    def step(logits, token, state):
        changed, state = transform.update(logits, state)
        return changed, transform.observe(token, state)

    return jax.jit(step, donate_argnums=2), state, logits


def compare(rows: int, rounds: int, steps: int = 20) -> None:
    """Measures in turns and prints."""
    chains: dict[str, tuple] = {"default chain, off": (transforms.DEFAULT, {})}
    for name, value in ON.items():
        alone = transforms.chain(transforms.STANDARD[name]())
        chains[name] = alone, {name: value}
    chains["all on"] = transforms.standard_chain(ON), ON
    chains["all in the chain, off"] = transforms.standard_chain(ON), {}
    runs = {name: step_of(chain, given, rows) for name, (chain, given) in chains.items()}
    token = jnp.full(rows, 3, jnp.int32)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first compiles
        for name, (step, state, logits) in runs.items():
            start = time.perf_counter(), time.process_time()
            for _ in range(steps):
                changed, state = step(logits, token, state)
            jax.block_until_ready(changed)
            end = time.perf_counter(), time.process_time()
            seconds[name].append(tuple((b - a) / steps for a, b in zip(start, end, strict=True)))
            runs[name] = step, state, logits
    for name, values in seconds.items():
        clock, processor = (1e6 * statistics.median(column[1:]) for column in zip(*values, strict=True))
        print(f"{name:34} {clock:8.0f} {processor:8.0f}")
    source, target = np.ones(WEIGHT_BYTES // 8, np.float32), np.empty(WEIGHT_BYTES // 8, np.float32)
    copies = []
    for _ in range(5):
        start = time.perf_counter()
        np.copyto(target, source)
        copies.append(time.perf_counter() - start)
    print(f"{'a copy of as many bytes as a step':34} {1e6 * min(copies):8.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    compare(args.rows, args.rounds)
