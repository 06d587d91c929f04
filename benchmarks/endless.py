"""Texts without an end: memory and time of a step while a text grows, and a needle in a text far beyond the training.

    python benchmarks/endless.py steps [--cache sinks] [--tokens 1000000]
    python benchmarks/endless.py needle [--times 64] [--cache blocks]

`steps` writes a text with a tiny model of random weights, and prints at powers of ten the memory of the state, the
greatest memory of the process so far, and the time of a step.

`needle` trains a tiny LLaMA to find what a token of its text holds under a key, on texts of its context. Then it reads
texts that are --times as long, with needles all over them, and counts what each kind of cache answers right.
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
    config = gx.preset(
        "llama-tiny", vocab=256, width=64, layers=2, heads=4, kv_heads=2, mlp_width=128, context=512, eos=None
    )
    model = gx.init(config, jax.random.key(0)), config
    weights, decoder = prepare_model(model)[0], compile(model, cache=kind)
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


EACH, CONTEXT = 8, 128  # keys, and values; tokens of a text of the training
ASK, ANSWER, FILLER, VOCAB = 64, 72, 80, 112  # first ids; token 8 k + v holds the value v under the key k


def retrieval_batch(draw: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts of filler with four needles, then questions for their values; and where the answers are to be predicted."""
    ids, asked = draw.integers(FILLER, VOCAB, (rows, CONTEXT)), np.zeros((rows, CONTEXT), np.float32)
    for row in range(rows):
        keys, values, begin = draw.permutation(EACH)[:4], draw.integers(0, EACH, 4), int(draw.integers(8, CONTEXT - 24))
        ids[row, draw.permutation(begin)[:4]] = EACH * keys + values
        places = begin + 2 * np.sort(draw.permutation((CONTEXT - begin) // 2)[:8])
        which = draw.integers(0, 4, 8)
        ids[row, places], ids[row, places + 1] = ASK + keys[which], ANSWER + values[which]
        asked[row, places] = 1
    return ids.astype(np.int32), asked


def trained(steps: int) -> tuple:
    """A tiny LLaMA that has learned to find needles within its context."""
    import optax

    config = gx.preset(
        "llama-tiny", vocab=VOCAB, width=64, layers=2, heads=4, kv_heads=2, mlp_width=128, context=CONTEXT, eos=None
    )
    params = gx.init(config, jax.random.key(0))
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, 100, steps), weight_decay=0.01)

    def loss(params, ids, asked):
        logits, _ = gx.forward(params, ids, config, unroll=True)
        found = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:])
        right = (logits[:, :-1].argmax(axis=-1) == ids[:, 1:]) * asked[:, :-1]
        weights = asked[:, :-1] + 0.0
        return (found * weights).sum() / weights.sum(), right.sum() / weights.sum()

    @jax.jit
    def step(params, state, ids, asked):
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(params, ids, asked)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, right

    state, draw = optimizer.init(params), np.random.default_rng(0)
    for i in range(steps):
        params, state, value, right = step(params, state, *retrieval_batch(draw, 16))
        if i % 100 == 99:
            print(f"step {i + 1}: loss {value:.4f}, {right:.1%} right", flush=True)
    return params, config


def needle(times: int, training: int) -> None:
    model = trained(training)
    kinds = {
        "sinks(4, 100)": gx.sinks(4, 100),
        **{f"blocks, {r} representatives": gx.blocks(8, 4, 4, 64, r) for r in (1, 2, 4, 8)},
    }
    for length in (CONTEXT - 8, 8 * CONTEXT, times * CONTEXT):
        draw, prompts, wanted = np.random.default_rng(1), [], []
        for i in range(16):
            keys, values = draw.permutation(EACH), draw.integers(0, EACH, EACH)
            text = draw.integers(FILLER, VOCAB, length)
            text[(np.arange(EACH) * (length - 8) // EACH) + 4] = EACH * keys + values
            prompts.append([*text.tolist(), ASK + int(keys[i % EACH])])
            wanted.append(ANSWER + int(values[i % EACH]))
        for name, kind in kinds.items():
            begun = time.perf_counter()
            done = gx.generate(model, prompts, max_new_tokens=1, temperature=0, cache=kind)
            right = sum(one.tokens[0] == value for one, value in zip(done, wanted, strict=True))
            print(
                f"{length:>6,} tokens, {name}: {right} of {len(done)} right, {time.perf_counter() - begun:.1f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "needle"))
    parser.add_argument("--tokens", type=int, default=10**6)
    parser.add_argument("--cache", choices=("window", "sinks"), default="sinks")
    parser.add_argument("--times", type=int, default=64)
    parser.add_argument("--training", type=int, default=1000, help="steps of training")
    args = parser.parse_args()
    if args.what == "steps":
        steps(gx.sinks(4, 508) if args.cache == "sinks" else gx.window(512), args.tokens)
    else:
        needle(args.times, args.training)


if __name__ == "__main__":
    main()
