"""A training script with a custom loss, next-token prediction plus a z-loss, in plain JAX and Optax.

Trains on the source of Python's standard library, one byte a token. Run: python examples/research_loop.py
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import garrulax as gx
from garrulax.core import spec
from garrulax.models import gpt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
steps = parser.parse_args().steps

config = gx.preset("gpt2-tiny", vocab=256, context=128)
text = np.frombuffer(
    b"".join(f.read_bytes() for f in sorted(pathlib.Path(pathlib.__file__).parent.glob("*.py"))), np.uint8
)
rng = np.random.default_rng(0)


def loss(params, tokens):
    """Cross entropy in nats per byte, plus 1e-4 times the squared log of the partition function (PaLM's z-loss)."""
    logits, _ = gx.forward(params, tokens[:, :-1], config, unroll=True)
    top = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(top - chosen) + 1e-4 * jnp.mean(top**2)


decayed = spec.decay_mask(gpt.parameters(config))
optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 3e-3, 20, steps), b2=0.99, weight_decay=0.1, mask=decayed)


@jax.jit
def step(params, state, tokens):
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


params = gx.init(config, jax.random.key(0))
state = optimizer.init(params)
for i in range(steps):
    starts = rng.integers(0, len(text) - 129, 16)
    tokens = np.stack([text[s : s + 129] for s in starts]).astype(np.int32)
    params, state, value = step(params, state, tokens)
    if i % 20 == 0 or i == steps - 1:
        print(f"step {i:4d}  loss {value:.3f} nats per byte")

prompt = np.frombuffer(b"def __init__(self, ", np.uint8).tolist()
done = gx.generate((params, config), prompt, max_new_tokens=60, temperature=0.0)
print(repr(bytes(prompt + [int(t) for t in done.tokens]).decode("utf8", "replace")))
