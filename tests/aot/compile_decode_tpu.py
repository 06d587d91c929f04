"""Compiles decoding attention for a TPU that is not there: `python compile_decode_tpu.py v5e gqa`.

Prints a line of JSON: bytes of the program's temporaries; bundles of a step through a whole block and through a masked
one (a bundle is a cycle, but for waiting on memory); cycles in which the chip's memory gives a step's keys and values;
and the share of its bandwidth that follows, were nothing else waited for. libtpu reads its flags once a process and may
abort it, so that every compilation is a process of its own.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

#: topology; clock in GHz, from the peak of the matrix units; memory in GB/s a core.
CHIPS = {
    "v5e": ("v5e:2x2", 1.5, 820),
    "v5p": ("v5p:2x2x1", 1.75, 1230),
    "v6e": ("v6e:2x2", 1.75, 1640),
    "tpu7x": ("tpu7x:2x2x1", 2.2, 3700),
}

#: What differs from 8 sequences of up to 8192 slots, one query of 32 heads over 8, width 128, bfloat16, causal.
CASES = {
    "gqa": {},
    "split": {"splits": 2},
    "heads": {"K": 32},
    "multiquery": {"K": 1},
    "narrow": {"C": 64},
    "wide": {"C": 256},
    "float32": {"dtype": "float32"},
    "int8": {"dtype": "int8"},
    "fp8": {"dtype": "float8_e4m3fn"},
    "odd": {"S": 8000},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 30.0},
    "pages16": {"page": 16},
    "pages64": {"page": 64},
    "pages128": {"page": 128},
    "drafts": {"T": 64},
    "tree": {"T": 64, "tree": True},
}
USUAL = {"B": 8, "T": 1, "H": 32, "K": 8, "C": 128, "S": 8192, "dtype": "bfloat16", "page": 0, "splits": 1}


def program(case, place):
    """A function, its abstract arguments, and the kernel: place(shape, dtype) makes one."""
    import jax.numpy as jnp

    from garrulax.kernels.decode import decode
    from garrulax.kernels.experimental.tpu_decode import TpuDecode
    from garrulax.kernels.mask import CAUSAL, SAME_SEGMENT, Bits, Mask

    of = {**USUAL, **CASES[case]}
    B, T, H, K, C, S, page = (of[name] for name in ("B", "T", "H", "K", "C", "S", "page"))
    dtype = jnp.dtype(of["dtype"])
    tree = Bits("bits0") | Bits("bits1") | Bits("bits2")
    rule = tree if of.get("tree") else CAUSAL & SAME_SEGMENT
    rows, slots = (B * S // page, page) if page else (B, S)
    more = ("position",) if of.get("alibi") else ()
    query, key = (
        {name: place(shape, "int32") for name in (*names, *more)}
        for names, shape in ((rule.streams().query, (B, T)), (rule.streams().key, (rows, slots)))
    )
    cache = place((rows, K, slots, C), dtype)
    arguments = {
        "query": place((B, T, H, C), "bfloat16" if dtype.itemsize == 1 else dtype),
        "key": cache,
        "value": cache,
        "mask": Mask(query, key, rule),
        "lengths": place((B,), "int32"),
    }
    if page:
        arguments["table"] = place((B, S // page), "int32")
    if dtype.itemsize == 1:
        arguments["key_scales"] = arguments["value_scales"] = place((rows, K, slots), "float32")
    if of.get("alibi"):
        arguments["alibi"] = place((H,), "float32")
    kernel = TpuDecode(splits=of["splits"])

    def run(arguments):
        return decode(**arguments, softcap=of.get("softcap"), implementation=kernel)

    return run, arguments, kernel


def step(folder):
    """Bundles of the loop's steps through a whole and through a masked block, read from the final schedule.

    Predicated regions lie one after another, and the two with matrix products are the bodies, of which a step runs
    one; what begins and ends a sequence is counted in both.
    """
    (path,) = (p for p in Path(folder).glob("*decode*-final_bundles.txt") if "analysis" not in p.name)
    place, inside, regions = 0, False, []
    for line in path.read_text().splitlines():
        if at := re.match(r"\s*0x([0-9a-f]+)\s+(LB|PF|PB)?\s*:(\s*>)?", line):
            begun, place = inside, int(at[1], 16)
            inside = bool(at[3])
            if inside and (not begun or at[2] == "PF"):
                regions.append([place, place, False])
        if inside:
            regions[-1][1:] = place + 1, regions[-1][2] or "vmat" in line
    sizes = [end - start for start, end, _ in regions]
    whole, masked = (end - start for start, end, products in regions if products)
    return sum(sizes) - masked, sum(sizes) - whole


def main(chip, case):
    name, clock, bandwidth = CHIPS[chip]
    folder = tempfile.TemporaryDirectory()
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true"
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from garrulax.kernels.decode import request

    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    run, arguments, kernel = program(case, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(run).trace(arguments).lower(lowering_platforms=("tpu",)).compile()
    names = "query", "key", "value", "mask", "table", "lengths", "key_scales", "value_scales"
    abstract = [arguments.get(name) for name in names]
    plan = kernel.plan(jax.eval_shape(lambda *x: request(*x, *(None,) * 5)[1], *abstract))
    key = arguments["key"]
    cycles = 2 * key.shape[1] * plan.size * key.shape[3] * key.dtype.itemsize / bandwidth * clock
    whole, masked = step(folder.name)
    folder.cleanup()
    result = {"temporary": compiled.memory_analysis().temp_size_in_bytes, "slots": plan.size}
    result |= {"whole": whole, "masked": masked, "memory": round(cycles), "share": round(min(1, cycles / whole), 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
