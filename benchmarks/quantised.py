"""Decoding with quantised weights on a CPU: tokens a second in turns with float32, and the memory of each process.

    python benchmarks/quantised.py [MODEL] [--forms float32,bfloat16,int8,int4] [--rounds 5] [--tokens 32]

MODEL is a folder or a GGUF file; without one, a LLaMA of about 100 million random numbers. Every form is written to a
folder first. A process of its own loads the folder and writes tokens after a prompt of 8, one row, greedily. The time
is that of the clock, and that of the processors (all threads), which says more on a busy machine. The memory is the
growth of the resident set by loading, and by loading and writing, which includes what compiling took; float32 is the
control of this meter.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

import garrulax as gx

GROUP = 32  # of int4


def resident() -> int:
    """Bytes of this process in memory now, without files that are only mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def serve(folder: str, form: str, tokens: int) -> None:
    """Loads a folder, and for each line that arrives writes tokens; prints seconds a token and bytes."""
    jax.jit(lambda x: x + 1)(0)  # what JAX and the modules take themselves
    importlib.import_module("garrulax.hub")
    before = resident()
    model = gx.load(folder, dtype=form if form in ("float32", "bfloat16") else None)
    jax.block_until_ready(model.params)
    loaded = resident() - before
    for _ in sys.stdin:
        begun = time.perf_counter(), time.process_time()
        gx.generate(model, list(range(1, 9)), max_new_tokens=tokens, temperature=0.0, end_tokens=())
        wall, processors = time.perf_counter() - begun[0], time.process_time() - begun[1]
        print(json.dumps([wall / tokens, processors / tokens, loaded, resident() - before]), flush=True)


def written(source: str | None, forms: list[str], place: Path) -> dict[str, str]:
    """A folder for each form."""
    if source is None:
        config = gx.preset(
            "llama-tiny", width=1024, layers=8, heads=16, kv_heads=16, mlp_width=2752, vocab=4096, context=256
        )
        model = gx.Model(config, gx.init(config, jax.random.key(0)))
    else:
        model = gx.load(source, dtype="float32").replace(tokenizer=None)
    for form in forms:
        plain = form in ("float32", "bfloat16")
        saved = model if plain else gx.quantise(model, form, group=GROUP if form == "int4" else None)
        gx.save(saved, place / form, quantised="garrulax")
    return {form: str(place / form) for form in forms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--forms", default="float32,bfloat16,int8,int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve, args.tokens)
        return
    with tempfile.TemporaryDirectory() as place:
        folders = written(args.model, args.forms.split(","), Path(place))
        command = [sys.executable, __file__, "--tokens", str(args.tokens), "--serve"]
        servers = {
            form: subprocess.Popen(
                [*command, folder, form], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, bufsize=1,
            )
            for form, folder in folders.items()
        }  # fmt: skip
        found: dict[str, list[tuple[float, float, int, int]]] = {form: [] for form in servers}
        for _ in range(args.rounds + 1):  # the first one compiles
            for form, server in servers.items():
                assert server.stdin is not None
                assert server.stdout is not None
                server.stdin.write("\n")
                found[form].append(tuple(json.loads(server.stdout.readline())))
        for server in servers.values():
            assert server.stdin is not None
            server.stdin.close()
            server.wait()
    first = next(iter(found.values()))
    titles = ("ms a token", "ratio", "processors", "ratio", "MiB loaded", "ratio", "MiB at end")
    print(f"{'form':<10}" + "".join(f"{title:>12}" for title in titles))
    for form, rows in found.items():
        line = f"{form:<10}"
        for clock in (0, 1):
            seconds = statistics.median(row[clock] for row in rows[1:])
            speed = statistics.median(a[clock] / b[clock] for a, b in zip(first[1:], rows[1:], strict=True))
            line += f"{seconds * 1e3:>12.2f}{speed:>11.2f}x"
        loaded, end = rows[0][2], rows[-1][3]
        print(f"{line}{loaded / 2**20:>12.0f}{loaded / first[0][2]:>11.2f}x{end / 2**20:>12.0f}")


if __name__ == "__main__":
    main()
