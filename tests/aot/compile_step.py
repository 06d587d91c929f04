"""Compiles a training step for TPUs that are not there: `python compile_step.py v5e:2x4 fsdp=4,tensor=2 fsdp+tp muon`.

Prints a line of JSON: the collectives of the program, the bytes of a device's arguments, of those that it returns in
the memory of its arguments (donation), and of its temporaries. libtpu may abort its process, so that every compilation
is a process of its own.
"""

import dataclasses
import json
import math
import os
import sys

BATCH, LENGTH = 8, 1024


def main(topology_name, axes, strategy, optimizer):
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    from jax.experimental import topologies

    from garrulax import models
    from garrulax.core import spec
    from garrulax.core.collectives import collectives, table
    from garrulax.core.sharding import make_mesh, token_sharding
    from garrulax.train.objectives import causal_lm
    from garrulax.train.optimizers import make_optimizer
    from garrulax.train.settings import Settings
    from garrulax.train.state import abstract_state
    from garrulax.train.step import make_train_step

    config = models.llama.Config(vocab=8192, context=LENGTH, width=1024, layers=2, heads=8, kv_heads=8, mlp_width=2816)
    mesh = make_mesh(axes, topologies.get_topology_desc(platform="tpu", topology_name=topology_name).devices)
    settings = Settings(optimizer=optimizer, precision="bfloat16", remat="full", unroll=False, strategy=strategy)
    update = make_optimizer(settings, models.parameters(config))
    with jax.set_mesh(mesh):
        state = abstract_state(config, update, mesh=mesh, strategy=strategy, strict=True)
        place = jax.NamedSharding(mesh, jax.P(None, *token_sharding(mesh, strategy)))
        dtypes = {"tokens": "int32", "targets": "int32", "weights": "float32"}
        batch = {k: jax.ShapeDtypeStruct((1, BATCH, LENGTH), dtype, sharding=place) for k, dtype in dtypes.items()}
        step = make_train_step(config, settings, update, causal_lm)
        compiled = step.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
    memory = compiled.memory_analysis()
    found = collectives(compiled.as_text(), mesh.shape)
    specs = spec.named_specs(models.parameters(config)).values()
    result = {
        "collectives": [{**dataclasses.asdict(c), "sent": c.sent} for c in found],
        "arguments": memory.argument_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "largest": max(2 * math.prod(s.layer_shape) for s in specs),
        "model": 2 * spec.count(models.parameters(config)),
    }
    print("\n".join(table(found)), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
