"""Compiles a request for decoding attention for a GPU that is not there, and prints what its kernels need as JSON.

python compile_decode_gpu.py TARGET REQUEST: a target's text in this folder ("h100") and a JSON object: width, and, as
they are wanted, value_width, batch, length, drafts, heads, kv_heads, page, dtype, cache, mask (a name in `MASKS`),
softcap, alibi. Prints a list with an object a kernel, as `compile_gpu` does.
"""

import json
import os
import pathlib
import sys
import tempfile

from compile_gpu import HERE, kernels

MASKS = {"causal": ("rank",), "window": ("position",), "tree": ("bits0", "bits1"), "other": ("rank", "segment")}


def compile_request(target, request):
    """Lowers and compiles decoding attention in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from garrulax.kernels.call import Options
    from garrulax.kernels.decode.call import DecodeOperands
    from garrulax.kernels.decode.gpu import HopperDecoding
    from garrulax.kernels.mask import CAUSAL, SAME_SEGMENT, All, Band, Bits

    text = (HERE / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))

    def abstract(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=NamedSharding(mesh, PartitionSpec()))

    B, T, S = request.get("batch", 16), request.get("drafts", 1), request.get("length", 8192)
    H, K, C = request.get("heads", 32), request.get("kv_heads", 8), request["width"]
    dtype, page, mask = request.get("dtype", "bfloat16"), request.get("page"), request.get("mask", "causal")
    cache = request.get("cache", dtype)
    slots = (B * S // page, page) if page else (B, S)
    key, value = (abstract((slots[0], K, slots[1], w), cache) for w in (C, request.get("value_width", C)))
    scales = abstract(key.shape[:3], jnp.float32) if key.dtype.itemsize == 1 else None
    names = {*MASKS[mask], *(("position",) if request.get("alibi") else ())}
    cached = DecodeOperands(
        abstract((B, T, H, C), dtype),
        key,
        value,
        {name: abstract((B, T)) for name in names},
        {name: abstract(slots) for name in names},
        table=abstract((B, S // page)) if page else None,
        lengths=abstract((B,)),
        key_scales=scales,
        value_scales=scales,
        slopes=abstract((H,), jnp.float32) if request.get("alibi") else None,
    )
    rules = {
        "causal": CAUSAL,
        "window": Band("position", 0, 4095),
        "tree": Bits("bits0") | Bits("bits1"),
        "other": CAUSAL & ~SAME_SEGMENT & All(),
    }
    options = Options(rules[mask], C**-0.5, request.get("softcap"))
    assert HopperDecoding().unsupported_reason(options, cached) is None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(lambda cached: HopperDecoding()(options, cached)).trace(cached)
        traced.lower(lowering_platforms=("cuda",)).compile()


def main():
    target, request = sys.argv[1], json.loads(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        sys.path[:0] = [str(HERE.parent.parent)]
        compile_request(target, request)
        print(json.dumps(list(kernels(pathlib.Path(folder)))))


if __name__ == "__main__":
    main()
