"""Compiles a request for attention for a GPU that is not there, and prints what its kernels need as JSON.

python compile_gpu.py TARGET REQUEST: a target's text in this folder ("h100") and a JSON object: width, mask (a name of
`kernel_cases.CASES`), and, as they are wanted, value_width, known_causal (`Mask.causal`), length, heads, kv_heads,
dtype, softcap, dropout, gradients, and alibi, relative, bias (true). Prints a list with an object a kernel.

A process a program: the compiler reads where to write from the environment once, and aborts when it fails.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import tempfile

HERE = pathlib.Path(__file__).parent


def compile_request(target, request):
    """Lowers and compiles attention in this process."""
    import jax
    import kernel_cases as cases
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from garrulax.kernels.attention import attention

    text = (HERE / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    T, H, C = request.get("length", 4096), request.get("heads", 16), request["width"]
    K, dtype = request.get("kv_heads", 4), request.get("dtype", "bfloat16")
    mask = cases.CASES[request["mask"]](T)
    mask = dataclasses.replace(mask, causal=True) if request.get("known_causal") else mask
    options = {name: request[name] for name in ("softcap", "dropout") if name in request}
    extras = [name for name in ("alibi", "relative", "bias") if request.get(name)]
    for name in extras:
        options |= cases.extra(name, H, T, T)
    mask = cases.with_positions(mask) if extras else mask
    if "dropout" in options:
        options["dropout_key"] = jax.random.key(0)

    def call(query, key, value, mask):
        return attention(
            query, key, value, mask=mask, implementation=request.get("implementation", "pallas_gpu"), **options
        )

    def both(query, key, value, mask):
        out, back = jax.vjp(lambda *x: call(*x, mask), query, key, value)
        return back(out)

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    shapes = (T, H, C), (T, K, C), (T, K, request.get("value_width", C))
    operands = [abstract((cases.B, *shape), dtype) for shape in shapes]
    mask = jax.tree.map(lambda x: abstract(x.shape, x.dtype), mask)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(both if request.get("gradients") else call).trace(*operands, mask)
        traced.lower(lowering_platforms=("cuda",)).compile()


def kernels(folder):
    """What the compiler wrote of every kernel."""
    for assembled in sorted(folder.glob("*.ptxas")):
        report, code = assembled.read_text(), assembled.with_suffix(".ptx").read_text()
        resources = assembled.with_suffix(".resources.txt").read_text()
        yield {
            "kernel": re.sub(r"_\d+$", "", assembled.stem),
            "registers": int(re.search(r"Used (\d+) registers", report)[1]),
            "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
            "serialized": "serialized" in report,
            "shared_bytes": int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1]),
            "tensor_columns": int(re.search(r"tmem_scratch_cols=(\d+)", resources)[1]),
            "matrix_instructions": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma", code)),
            "exponentials": code.count("ex2.approx"),
        }


def main():
    target, request = sys.argv[1], json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
        compile_request(target, request)
        print(json.dumps(list(kernels(pathlib.Path(folder)))))


if __name__ == "__main__":
    main()
