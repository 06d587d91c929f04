"""Compiles a decoding step for a GPU that is not there, and counts what it launches: `compile_decode_step.py h100 2`.

The layers have the shape of LLaMA-2-7B in bfloat16; the second argument is the number of rows. Prints a line of JSON:
the kernels (products with weights among them), copies and conditionals that each layer adds, those of a step outside
the layers, and the bytes of the temporaries. What lies inside conditionals does not count.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
SLOTS, PROMPT = 256, 100


def compile_step(target, rows, layers):
    """The compiled program of `decode_steps`."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from garrulax import models
    from garrulax.kernels import picking
    from garrulax.sampling import ahead, loop, state
    from garrulax.sampling.decoder import Decoder

    text = (HERE / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    device = topology.devices[0]
    config = dataclasses.replace(models.llama.PRESETS["llama2-7b"], layers=layers, eos=None)
    decoder = Decoder(config)
    stacked = jax.eval_shape(lambda: models.init(config, jax.random.key(0), dtype="bfloat16"))
    one = decoder.request([7] * PROMPT, max_new_tokens=SLOTS - PROMPT, temperature=0)
    prefix = jax.eval_shape(lambda p: state.prefill(p, one, config, decoder.transform, SLOTS), stacked)
    params = jax.eval_shape(models.unstack, stacked)
    before = jax.eval_shape(lambda p: decoder.empty(p, prefix, rows, SLOTS), params)
    # Without a mesh in the types of arrays, code under `jit` asks for the default device, which is a CPU here.
    picking.target_device, jax.default_backend = lambda request: device, lambda: "gpu"
    jax.clear_caches()

    def there(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    arguments = jax.tree.map(there, (params, before, np.int32(1)))
    traced = loop.decode_steps.trace(*arguments, config=config, transform=decoder.transform)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=ahead.GPU_STEPS)
    jax.default_backend = BACKEND
    return compiled


def launched(text):
    """What a step launches: instructions of the outermost loop and of its condition, by kind."""
    computations, name = {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%")
            computations[name] = []
        elif name is not None and " = " in line:
            computations[name].append(line)
    entry = computations[re.search(r"^ENTRY %?(\S+)", text, re.MULTILINE)[1]]
    loop = next(line for line in entry if " while(" in line)
    counts = dict.fromkeys(("kernels", "products", "copies", "conditionals"), 0)

    def count(lines):
        for line in lines:
            if called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):  # such as a CUDA graph
                count(computations[called[1]])
            counts["kernels"] += " fusion(" in line or " custom-call(" in line
            counts["products"] += "gemm_fusion" in line.split(" = ")[0]
            counts["copies"] += " copy(" in line
            counts["conditionals"] += " conditional(" in line

    for part in ("body", "condition"):
        count(computations[re.search(rf"{part}=%?([\w.\-]+)", loop)[1]])
    return counts


def main():
    target, rows = sys.argv[1], int(sys.argv[2])
    one, three = (compile_step(target, rows, layers) for layers in (1, 3))
    few, more = launched(one.as_text()), launched(three.as_text())
    layer = {kind: (more[kind] - few[kind]) / 2 for kind in few}
    temporary = three.memory_analysis().temp_size_in_bytes
    rest = {kind: few[kind] - layer[kind] for kind in few}
    print(json.dumps({"layer": layer, "rest": rest, "temporary": temporary}))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path[:0] = [str(HERE.parent.parent)]
    import jax

    BACKEND = jax.default_backend
    main()
