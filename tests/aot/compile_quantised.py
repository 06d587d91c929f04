"""Compiles a product with a quantised weight for a chip that is not there: `python compile_quantised.py v5e w8a8`.

The chip is one of v5e, v6e and tpu7x, or a file of this folder such as h100 (with the CUDA build of jax). Prints a line
of JSON: the bytes of the program's temporaries, those that it reads by the compiler's estimate, and what it multiplies:
the dtypes of the result and of the operands of each dot, convolution or custom call.
"""

import json
import os
import pathlib
import re
import sys

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
PRODUCT = re.compile(r"= \(?(\w+)\[[^=]*? (dot|convolution|custom-call)\((.*?)\)", re.MULTILINE)


def products(text):
    """[dtype of the result, operation, dtypes of the operands] of each product in optimised HLO."""
    dtypes = dict(re.findall(r"%?([\w.-]+) = \(?(\w+)\[", text))
    found = []
    for dtype, operation, operands in PRODUCT.findall(text):
        names = [re.sub(r"/\*.*?\*/", "", name).split()[-1].lstrip("%") for name in operands.split(",") if name.strip()]
        found.append([dtype, operation, sorted({dtypes[name] for name in names if name in dtypes})])
    return found


def main(chip, kind, rows=8, inputs=4096, outputs=11008):
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from garrulax.core.codes import Form
    from garrulax.core.einsum import einsum
    from garrulax.core.quantised import Quantised

    options = {}
    if chip in TOPOLOGIES:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    else:
        target = (pathlib.Path(__file__).parent / f"{chip}.txtpb").read_text()
        topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
        options = {"xla_gpu_autotune_level": "0"}
    place = SingleDeviceSharding(topology.devices[0])
    of = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    bits, group = (4, 128) if kind == "int4" else (8, inputs)
    form = Form("int", bits, group, (inputs,), (outputs,), True, "bfloat16", (), 8 if kind == "w8a8" else 0)
    codes = of((outputs, inputs * bits // 8), jnp.uint8 if bits == 4 else jnp.int8)
    scale = of((outputs, inputs // group), jnp.float16 if bits == 4 else jnp.float32)
    leaf = Quantised(codes, scale, None, None, None, form)
    x = of((1, rows, inputs), jnp.bfloat16)
    lowered = jax.jit(lambda x, w: einsum("BTD,DF->BTF", x, w)).trace(x, leaf).lower(
        lowering_platforms=("tpu" if chip in TOPOLOGIES else "cuda",)
    )  # fmt: skip
    program = lowered.compile(compiler_options=options)
    memory, cost = program.memory_analysis(), program.cost_analysis() or {}
    text = program.as_text()
    found = {"temporary": memory.temp_size_in_bytes, "bytes": cost.get("bytes accessed"), "products": products(text)}
    print(json.dumps(found))
    if os.environ.get("HLO"):
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
