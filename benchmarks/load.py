"""Loading a model against reading its files.

    python benchmarks/load.py                          # 3 GB of bfloat16; --dtype float32 for the other
    python benchmarks/load.py --layers 4 --runs 3      # smaller

Writes a random LLaMA checkpoint in several files to a temporary folder. Then measures four ways to read it, in turns,
each time in a fresh process and with the files in the page cache:

    load        garrulax.load, without the import and start of JAX
    read        readinto of the files into new arrays
    file.read   Python's read of entire files
    reused      readinto of one buffer of a megabyte again and again, so that the bytes never reach main memory

Prints the medians in seconds, in GB/s and in seconds of CPU time (which other load on the machine disturbs less), the
ratios of speed, and the memory of `load`: the peak of the process (VmHWM) minus its memory before the load and minus
the model, in bytes and relative to the largest tensor.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import measure

CONFIG = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
READERS = ("read", "file.read", "reused")


def write(folder: Path, layers: int, dtype: str) -> None:
    """Random bits in the names and shapes of a LLaMA, five layers a file."""
    import ml_dtypes
    from safetensors.numpy import save_file

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    width, middle, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 512
    shapes = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
              "self_attn.o_proj": (width, width), "mlp.gate_proj": (middle, width), "mlp.up_proj": (middle, width),
              "mlp.down_proj": (width, middle), "input_layernorm": (width,),
              "post_attention_layernorm": (width,)}  # fmt: skip
    blocks = [{f"model.layers.{i}.{k}.weight": shape for k, shape in shapes.items()} for i in range(layers)]
    ends = {
        "model.embed_tokens.weight": (32000, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (32000, width),
    }
    shards = [ends, *({k: v for block in blocks[i : i + 5] for k, v in block.items()} for i in range(0, layers, 5))]
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({
            k: np.frombuffer(rng.bytes(int(np.prod(s)) * kind.itemsize), kind).reshape(s) for k, s in shard.items()
        }, folder / file)  # fmt: skip
        where |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))


def touch(folder: Path) -> None:
    """Allocates as much memory as the files have bytes, and frees it.

    In a virtual machine the first touch of a page is ten times slower if the host must provide it first. Without this
    step, chance decides which of the four ways pays for that.
    """
    np.empty(sum(file.stat().st_size for file in folder.glob("*.safetensors")), np.uint8)[::4096] = 1


def read(folder: Path, how: str) -> dict:
    """Seconds to read all files."""
    files = sorted(folder.glob("*.safetensors"))
    buffer, kept = memoryview(bytearray(1 << 20)), []
    touch(folder)
    start, used = time.perf_counter(), time.process_time()
    for path in files:
        with path.open("rb", buffering=0) as file:
            if how == "file.read":
                kept.append(file.read())
            elif how == "reused":
                while file.readinto(buffer):
                    pass
            else:
                kept.append(np.empty(path.stat().st_size, np.uint8))
                rest = memoryview(kept[-1])
                while rest:
                    rest = rest[file.readinto(rest[: 1 << 24]) :]
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - used}


def load(folder: Path) -> dict:
    """Seconds and bytes of garrulax.load."""
    import jax

    import garrulax as gx

    jax.block_until_ready(jax.device_put(np.zeros(1)))  # starts the backend
    gx.load  # noqa: B018 (imports the hub)
    before = _status("VmRSS")
    touch(folder)
    start, used = time.perf_counter(), time.process_time()
    model = gx.load(folder)
    jax.block_until_ready(model.params)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    size = sum(x.nbytes for x in jax.tree.leaves(model.params))
    return {"seconds": seconds, "cpu": used, "above": _status("VmHWM") - before - size, "model": size}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layers", type=int, help="22 of bfloat16 or 11 of float32 are 3 GB")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(load(Path(args.folder)) if args.side == "load" else read(Path(args.folder), args.side)))
        return
    layers = args.layers or (22 if args.dtype == "bfloat16" else 11)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), layers, args.dtype)
        found: dict[str, list[dict]] = {side: [] for side in ("load", *READERS)}
        for _ in range(args.runs + 1):  # the first round fills the page cache
            for side, results in found.items():
                results.append(measure([sys.executable, __file__, "--side", side, "--folder", folder]))
    seconds, cpu = (
        {side: statistics.median(r[what] for r in results[1:]) for side, results in found.items()}
        for what in ("seconds", "cpu")
    )
    size, above = found["load"][0]["model"], max(r["above"] for r in found["load"])
    largest = 32000 * 2048 * (2 if args.dtype == "bfloat16" else 4)
    print(json.dumps({
        "dtype": args.dtype, "model_GB": size / 1e9,
        "seconds": {side: round(s, 4) for side, s in seconds.items()},
        "cpu_seconds": {side: round(s, 4) for side, s in cpu.items()},
        "GB_per_second": {side: round(size / s / 1e9, 2) for side, s in seconds.items()},
        "load_speed_over": {side: round(seconds[side] / seconds["load"], 3) for side in READERS},
        "memory_above_model_MB": above / 1e6, "over_largest_tensor": round(above / largest, 3),
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
