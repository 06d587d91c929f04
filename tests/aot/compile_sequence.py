"""Compiles attention over a sequence that TPUs share, which are not there: gathered keys, and a ring.

    python compile_sequence.py v5e:2x4 sequence=8 32,8,128,16384

The last words are query heads, key/value heads, their width and the tokens of the whole text, of one row. For each of
them it prints a line of JSON: what the forward and the backward pass of causal attention cost on one chip by a plan
(`planning.program`), and what `kernels.sequence` estimates. libtpu may abort its process, so that a test starts one.
"""

import json
import os
import sys


def main(topology_name, axes, *shapes):
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from garrulax.core.sharding import mesh_sizes
    from garrulax.planning.topology import mesh_over, quiet_compiler, read_topology

    quiet_compiler()
    topology = read_topology(topology_name)
    mesh = mesh_over(topology, mesh_sizes(axes))
    for shape in shapes:
        H, K, C, T = map(int, shape.split(","))
        for way in ("gather", "ring"):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                compiled = lowered(mesh, H, K, C, T, way).compile()
            print(json.dumps({"shape": [H, K, C, T], "way": way, **costs(compiled, topology, mesh, T)}), flush=True)


def lowered(mesh, H, K, C, T, way):
    import jax
    import jax.numpy as jnp

    from garrulax.kernels.attention import attention
    from garrulax.kernels.masks import causal

    place = jax.NamedSharding(mesh, jax.P(None, "sequence"))
    arrays = [jax.ShapeDtypeStruct((1, T, n, C), jnp.bfloat16, sharding=place) for n in (H, K, K, H)]

    def both(q, k, v, cotangent):
        run = jax.vjp(lambda *x: attention(*x, mask=causal(1, T), context_parallel=way), q, k, v)[1]
        return run(cotangent)

    return jax.jit(both).trace(*arrays).lower(lowering_platforms=("tpu",))


def costs(compiled, topology, mesh, T):
    from garrulax.planning.program import read_program

    program = read_program(compiled.as_text(), None, topology, mesh, lambda given: given / 2)
    return {
        "seconds": program.seconds,
        "compute": program.compute,
        "kernels": program.kernel_flops / (topology.chip.peak * topology.chip.kernel),
        "hidden": program.hidden,
        "exposed": program.exposed,
        "sent": sum(c.sent for c in program.collectives),
        "bytes": program.bytes,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
