"""Compiles writing with keys and values in the memory of the host, for TPUs that are not there.

`python compile_offload.py v5e:2x2 step`, or `prompt`, which reads one in passes. The layers have the shape of those of
LLaMA-3.1-8B, in bfloat16. Prints a line of JSON with bytes: of all keys and values, of the arguments in the memory of
the host and of those that are updated in place, and of temporaries there and on the device. libtpu may abort its
process, so that every compilation is a process of its own.
"""

import dataclasses
import json
import os
import sys

LAYERS, SLOTS = 2, 65536


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
    jax.default_backend = lambda: "tpu"  # asked for the dtype of the cache
    config = dataclasses.replace(gx.preset("llama3.1-8b"), layers=LAYERS, vocab=1024, eos=None)
    decoder = Decoder(config, cache=gx.blocks(offload=True))
    stacked = jax.eval_shape(lambda: models.init(config, jax.random.key(0), dtype="bfloat16"))
    one = decoder.request([7] * SLOTS, max_new_tokens=1, temperature=0)
    static = {"config": config, "transform": decoder.transform}

    def there(x, away):
        place = jax.sharding.SingleDeviceSharding(device, memory_kind=host_memory.KIND if away else None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def trace(function, *args, **options):
        return function.trace(*jax.tree.map(there, args, on_host(args)), **static, **options)

    past = jax.eval_shape(lambda p: models.cache_for(p, config, 1, SLOTS, kind=decoder.cache), stacked)
    if what == "prompt":
        traced = trace(state.prefill_into, stacked, one, past, size=SLOTS)
    else:
        prefix = jax.eval_shape(lambda *x: state.prefill_into(*x, **static, size=SLOTS), stacked, one, past)
        params = jax.eval_shape(models.unstack, stacked)
        before = jax.eval_shape(lambda: decoder.empty(params, prefix, 1, SLOTS))
        traced = trace(loop.decode_steps, params, before, np.int32(1))
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    key = past.layers["key"]
    result = {
        "cache": 2 * key.size * key.dtype.itemsize,
        "argument": memory.host_argument_size_in_bytes,
        "alias": memory.host_alias_size_in_bytes,
        "on_host": memory.host_temp_size_in_bytes,
        "on_device": memory.temp_size_in_bytes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
