"""Compiles the loop that samples for TPUs that are not there: `python compile_writing.py v5e:2x4 fsdp=4,tensor=2`.

Prints a line of JSON: the largest collectives within a step, the bytes of a device's part of a matrix of a layer and of
its keys, and those of the temporaries. libtpu may abort its process, so that every compilation is a process of its own.
"""

import json
import os
import sys

ROWS, SLOTS = 32, 2048


def main(topology_name, axes):
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    from garrulax import models
    from garrulax.core import spec
    from garrulax.core.collectives import collectives
    from garrulax.core.sharding import make_mesh, shardings
    from garrulax.sampling import loop, state
    from garrulax.sampling.decoder import Decoder

    explicit = make_mesh(axes, topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices)
    mesh = jax.sharding.Mesh(explicit.devices, explicit.axis_names)  # in Auto mode
    config = models.llama.Config(vocab=8192, context=SLOTS, width=1024, layers=2, heads=8, kv_heads=8, mlp_width=2816)
    specs, decoder = models.parameters(config), Decoder(config)

    def on_mesh(x, entries, dtype=None):
        place = jax.NamedSharding(mesh, jax.P(*entries))
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place)

    params = spec.map_specs(lambda s, w: on_mesh(s, w.spec, jnp.bfloat16), specs, shardings(specs, explicit))
    layer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape[1:], x.dtype, sharding=jax.NamedSharding(mesh, jax.P(*x.sharding.spec[1:]))
        ),
        params["blocks"],
    )
    step = {**params, "blocks": (layer,) * config.layers}
    one = decoder.request([1, 2, 3], max_new_tokens=8)
    with jax.set_mesh(mesh):
        prefix = jax.eval_shape(lambda p: state.prefill(p, one, config, decoder.transform, 16), params)
        before = jax.eval_shape(lambda: decoder.empty(step, prefix, ROWS, SLOTS))
        before = jax.tree.map(lambda x: on_mesh(x, ("fsdp", "tensor") if x.ndim == 4 else ()), before)
        static = {"config": config, "transform": decoder.transform}
        traced = loop.decode_steps.trace(step, before, on_mesh(np.int32(0), ()), **static)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    found = [c for c in collectives(compiled.as_text(), mesh.shape) if "/while/body/" in c.source]
    key = before.cache.layers[0]["key"]
    result = {
        "largest": max((c.bytes, c.kind, c.shape, c.source) for c in found),
        "logits": 2 * ROWS * config.vocab // 2,
        "matrix": 2 * config.width * config.mlp_width // mesh.size,
        "keys": 2 * key.size // mesh.size,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
