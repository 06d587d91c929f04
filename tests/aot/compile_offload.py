"""Compiles writing with keys and values in the memory of the host, for a TPU that is not there.

`python compile_offload.py v5e:2x2 decode`, or `prefill`. The model has layers of the shape of LLaMA-3.1-8B in bfloat16.
Prints a line of JSON: the bytes of all keys and values and of those of a layer, what the program has in the memory of
the host and what of it is updated in place, the temporaries on the device, and the copies of the shape of a cache.
"""

import dataclasses
import json
import os
import sys

LAYERS, SLOTS, PROMPT = 2, 65536, 32768


def main(topology_name, what):
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import numpy as np
    from jax.experimental import topologies

    import garrulax as gx
    from garrulax import models
    from garrulax.layers import host_memory
    from garrulax.layers.cache import on_host
    from garrulax.sampling import loop, state
    from garrulax.sampling.decoder import Decoder

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices[0]
    jax.default_backend = lambda: "tpu"  # which decides the dtype of the cache
    config = dataclasses.replace(gx.preset("llama3.1-8b"), layers=LAYERS, vocab=1024, eos=None)
    decoder = Decoder(config, cache=gx.blocks(offload=True))
    stacked = jax.eval_shape(lambda: models.init(config, jax.random.key(0), dtype="bfloat16"))
    one = decoder.request([7] * PROMPT, max_new_tokens=SLOTS - PROMPT, temperature=0)
    static = {"config": config, "transform": decoder.transform}
    kind = {"size": SLOTS, "kind": decoder.cache}
    prefix = jax.eval_shape(lambda p: state.prefill(p, one, **static, **kind), stacked)
    params = jax.eval_shape(models.unstack, stacked)
    before = jax.eval_shape(lambda: decoder.empty(params, prefix, 1, SLOTS))

    def there(x, away):
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=host_memory.KIND if away else None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def placed(tree):
        return jax.tree.map(there, tree, on_host(tree))

    if what == "decode":
        traced = loop.decode_steps.trace(*placed((params, before, np.int32(1))), **static)
    elif what == "after":
        past = jax.eval_shape(lambda p: models.cache_for(p, config, 1, PROMPT, kind=decoder.cache), stacked)
        traced = jax.jit(state.prefill_after.__wrapped__, static_argnames=("config", "transform", "size")).trace(
            *placed((stacked, one, past)), **static, size=SLOTS
        )
    elif what == "empty":
        traced = jax.jit(lambda: decoder.empty(params, prefix, 1, SLOTS), device=device).trace()
    else:
        traced = state.prefill.trace(*placed((stacked, one)), **static, **kind)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(memory, file=sys.stderr)
    open(f"/tmp/offx/{what}.hlo", "w").write(text)
    cache = before.cache.layers
    print({n: (x.shape, x.dtype) for n, x in cache[0].items()}, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
