"""LLaMA 3 from a preset: its size, a forward pass, a gradient, decoding with a cache, and the same on a mesh.

Run: python examples/llama_forward.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # eight devices on any CPU

import jax
import jax.numpy as jnp

import garrulax as gx

big = gx.preset("llama3-8b")
print(f"llama3-8b has {gx.count(big):,} parameters; counting them allocates nothing")

# The same family at the size of a laptop. Every field of the config can be changed.
config = gx.preset("llama3-8b", vocab=512, width=128, layers=4, heads=8, kv_heads=2, head_dim=16, mlp_width=352)
params = gx.init(config, jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (8, 32), 0, config.vocab)

forward = jax.jit(gx.forward, static_argnames="config")
logits, _ = forward(params, tokens, config)
print("logits", logits.shape, logits.dtype)


def loss(params, tokens):
    logits, _ = gx.forward(params, tokens, config)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1].mean(axis=-1))


print("gradient of the query projections", jax.grad(loss)(params, tokens)["blocks"]["attention"]["query"].shape)

# Decoding without gx.generate: fill a cache with the tokens, then add one token to it.
cache = gx.cache_for(params, config, batch=8, size=40)
logits, cache = forward(params, tokens, config, cache=cache)
logits, cache = forward(params, logits[:, -1:].argmax(-1), config, cache=cache)
print("the cache has", int(cache.used[0]), "tokens a row")

# The same program on a mesh: parameters are split over four devices by width and two by heads, the batch over four.
mesh = gx.make_mesh("fsdp=4,tensor=2")
with jax.set_mesh(mesh):
    sharded = gx.init(config, jax.random.key(0), mesh=mesh)
    placed = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P("fsdp", None)))
    again, _ = forward(sharded, placed, config)
print(
    "on the mesh:",
    again.sharding.spec,
    "largest difference",
    float(jnp.abs(again - forward(params, tokens, config)[0]).max()),
)
