"""Compiles a request of attention for a TPU that is not there: `python compile_tpu.py v5p:2x2x1 causal128 backward`.

Prints a line of JSON: the length of the text, the bytes of the program's temporaries, and the bundles of its kernels
(see bundles.py). libtpu reads its flags once a process and may abort it, so that every compilation is a process of its
own. An error of the compiler's, such as more VMEM than there is, ends it with a traceback.
"""

import json
import os
import sys
import tempfile

import bundles

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
KERNELS = ["attention_forward", "attention_backward", "attention_bias_gradient", "attention_steps_gradient"]
GQA, MHA, MQA = (8, 2), (8, 8), (71, 1)

#: (query heads, key/value heads), width, length, dtype, and what `request` knows by name.
CASES = {
    "full128": (GQA, 128, 8192, "bfloat16", "full"),
    "causal128": (GQA, 128, 8192, "bfloat16", "causal"),
    "window128": (GQA, 128, 8192, "bfloat16", "window"),
    "alibi128": (GQA, 128, 8192, "bfloat16", "alibi"),
    "relative128": (GQA, 128, 8192, "bfloat16", "relative"),
    "bias128": (GQA, 128, 2048, "bfloat16", "bias"),
    "key_bias128": (GQA, 128, 8192, "bfloat16", "key_bias"),
    "dropout128": (GQA, 128, 8192, "bfloat16", "dropout"),
    "softcap128": (GQA, 128, 8192, "bfloat16", "softcap"),
    "heads128": (MHA, 128, 8192, "bfloat16", "causal"),
    "causal64": (MHA, 64, 8192, "bfloat16", "causal"),
    "causal256": (GQA, 256, 8192, "bfloat16", "causal"),
    "causal80": (MHA, 80, 1000, "bfloat16", "causal"),
    "multiquery64": (MQA, 64, 2048, "bfloat16", "causal"),
    "float32": (GQA, 128, 8192, "float32", "causal"),
    "float32_256": (GQA, 256, 16384, "float32", "causal"),
    "float16": (GQA, 128, 8192, "float16", "causal"),
    "long128": (MHA, 128, 65536, "bfloat16", "causal"),
    "shared128": ((32, 1), 128, 20480, "bfloat16", "causal"),
    "shared256": ((64, 1), 256, 20480, "bfloat16", "causal"),
    "full64": (MHA, 64, 8192, "bfloat16", "full"),
    "full256": (GQA, 256, 8192, "bfloat16", "full"),
}


def program(case):
    """A function of attention, and the shapes and dtypes of its arguments as (shape, dtype) trees: (differentiated,
    others)."""
    import jax
    import jax.numpy as jnp

    from garrulax.kernels.attention import attention
    from garrulax.kernels.mask import CAUSAL, SAME_SEGMENT, All, Band, Mask
    from garrulax.kernels.relative import t5

    (H, K), C, T, dtype, what = CASES[case]
    near = Band("position", 0, 1023) & SAME_SEGMENT
    rule = {"full": All(), "window": near}.get(what, CAUSAL & SAME_SEGMENT)
    learned = {"q": ((1, T, H, C), dtype), "k": ((1, T, K, C), dtype), "v": ((1, T, K, C), dtype)}
    learned |= {
        "relative": {"table": ((32, H), "float32")},
        "bias": {"bias": ((1, H, T, T), "float32")},
        "key_bias": {"bias": ((1, H, 1, T), "float32")},
    }.get(what, {})
    others = dict.fromkeys(("rank", "segment", "position"), ((1, T), "int32"))
    others |= {"alibi": {"alibi": ((H,), "float32")}, "dropout": {"key": ((2,), "uint32")}}.get(what, {})

    def loss(learned, others):
        options = {name: learned[name] for name in ("bias",) if name in learned}
        options |= {name: others[name] for name in ("alibi",) if name in others}
        if what == "relative":
            options["relative"] = t5(learned["table"], bidirectional=False)
        if what == "dropout":
            options |= {"dropout": 0.1, "dropout_key": jax.random.wrap_key_data(others["key"])}
        if what == "softcap":
            options["softcap"] = 30.0
        mask = Mask({name: others[name] for name in ("rank", "segment", "position")}, None, rule)
        out = attention(learned["q"], learned["k"], learned["v"], mask=mask, implementation="pallas_tpu", **options)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    return loss, learned, others


def main(chip, case, direction):
    folder = tempfile.TemporaryDirectory()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", LIBTPU_INIT_ARGS=bundles.flags(folder.name))
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip is held: several compilations may run side by side
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    loss, *trees = program(case)
    arguments = [{n: jax.ShapeDtypeStruct(*x, sharding=everywhere) for n, x in tree.items()} for tree in trees]
    function = jax.jit({"forward": loss, "backward": jax.grad(loss)}[direction])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = function.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    kernels = {name: schedule._asdict() for name, schedule in bundles.read(folder.name, KERNELS).items()}
    folder.cleanup()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(json.dumps({"length": CASES[case][2], "temporary": temporary, "kernels": kernels}))


if __name__ == "__main__":
    main(*sys.argv[1:])
