"""This library on a GPU: correctness of attention, then speeds of everything beside those of others.

    make gpu                               # all parts, at most 9 minutes
    make gpu PART=train                    # one part: attention, train or decode; at most 4 minutes
    python benchmarks/gpu.py --part attention --only check [--seed 7]
    python benchmarks/gpu.py --part train --runs llama-1b:B8:T4096:full:adamw
    python benchmarks/gpu.py --tiny        # the same program with tiny sizes, also on a CPU; writes no results

- attention: `check`: every mask, extra and width, output and gradients, on new random numbers, twice (the seed is
  printed); `speed`: TFLOP/s beside cuDNN, jax's own kernel and PyTorch's SDPA, and the decode kernel's bytes a second.
- train: `speed`: steps of a LLaMA of 1.1 billion parameters and of GPT-2; `trace`: their kernels by part of the step,
  with the floor of each; `torch`: transformers with torch.compile and fused AdamW.
- decode: `plain`: the shape of LLaMA-2 7B in bfloat16; `again`: a first call that finds its compiled programs;
  `quantised`: int8 and int4; `torch`: transformers.

Every row is printed when it is measured, and saved: a run that is cut keeps what it has, and a later one adds to it.
What each number means is said in `accelerator/`, where each program is.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from accelerator import results, workers  # noqa: E402
from accelerator.workers import Worker  # noqa: E402

STEPS = {
    "attention": ("check", "speed"),
    "train": ("speed", "trace", "torch"),
    "decode": ("plain", "again", "quantised", "torch"),
}
NEEDS = {"again": "plain"}  # which compiles the programs that are found again
#: Seconds, from the start on: of a part that runs alone, and of each of several, where what one leaves is the next
#: one's. Ending processes, the tables and the picture come on top: together less than 4 and 9 minutes.
LIMIT, LIMITS = 225, {"attention": 185, "train": 180, "decode": 145}
TINY_LIMIT = 3600
START = 60  # seconds after which JAX must have found the device
CHECKS = 0.5  # share of the first part's time after which its checks are ended
NO_TORCH = (
    f"torch and transformers are not installed for {sys.executable}. Name a Python that has them, with CUDA:"
    " make gpu TORCH_PYTHON=python3, or --torch-python python3"
)
#: So that several processes share the device's memory.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
#: Correctness does not depend on the fastest of several kernels for a product, and searching takes time.
NO_SEARCH = "--xla_gpu_autotune_level=0"
#: A trace names the instruction of each kernel only where kernels are not started as graphs.
NO_GRAPHS = "--xla_gpu_enable_command_buffer="


class Parts:
    """The steps of each part, as the workers of groups that run one after another.

    Args:
        args: The command line.
        cache: A new folder for compiled programs.

    Attributes:
        missing: What could not be compared, because there is no PyTorch.
    """

    def __init__(self, args: argparse.Namespace, cache: str):
        self.missing: list[str] = []
        self._args, self._tiny = args, ["--tiny"] * args.tiny
        self._cache = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def device(self) -> str:
        """The name of the device that the workers will measure: JAX's, which need not be what the driver lists.

        Raises:
            SystemExit: JAX finds no accelerator; with what to do.
        """
        if self._tiny:
            return "tiny sizes"
        rows: list[dict] = []
        if wrong := workers.run([self._ours("device")], rows.append, START, turns=False):
            raise SystemExit("\n".join(wrong))
        return rows[0]["name"]

    def groups(self, part: str) -> Iterator[tuple[list[Worker], bool]]:
        """Workers that are started together, and whether they measure in turns.

        The checks do not. Training is compiled alone, because XLA times kernels on the device to choose among them.
        One process compiles all runs, in threads: within a process XLA takes the device for itself while it times a
        kernel, and one run after another would not fit the time of the part. Then the traced program finds what was
        chosen for the measured one. PyTorch compiles in its turn, when ours has ended.
        """
        only = self._args.only
        steps = [step for step in STEPS[part] if only in (None, step) or NEEDS.get(only) == step]
        alone = {"attention": "check", "train": "speed"}.get(part)
        together = [step for step in steps if step != alone]
        for some in ([alone] if alone in steps else [], together):
            if found := [worker for step in some for worker in getattr(self, f"_{part}_{step}")()]:
                yield found, some != ["check"]

    def _ours(self, module: str, *words: str, flags: str = "", **environment: str) -> Worker:
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        command = [sys.executable, "-m", f"accelerator.{module}", *words, *self._tiny]
        return Worker(command, {**SHARED, "PYTHONPATH": path, "XLA_FLAGS": flags, **environment})

    def _peer(self, title: str, script: str, *words: str) -> list[Worker]:
        python = self._args.torch_python
        if python is None:
            self.missing.append(title)
            return []
        return [Worker([python, str(HERE / "peers" / script), *words])]

    def _attention_check(self) -> Iterator[Worker]:
        count = 1 if self._args.tiny else min(8, max(1, (os.cpu_count() or 2) // 2))
        flags, seed = "" if self._args.tiny else NO_SEARCH, ["--seed", str(self._args.seed)]
        for i in range(count):
            yield self._ours("attention_check", "--share", f"{i}/{count}", *seed, flags=flags)
        yield self._ours("decode_attention", "check", *seed, flags=flags)

    def _attention_speed(self) -> list[Worker]:
        count = 1 if self._args.tiny else 3
        ours = [self._ours("attention_speed", "--share", f"{i}/{count}") for i in range(count)]
        ours.append(self._ours("decode_attention", "speed"))
        return ours if self._args.tiny else [*ours, *self._peer("PyTorch's SDPA", "torch_attention_gpu.py")]

    def _train_speed(self) -> list[Worker]:
        return [self._ours("train", "speed", *self._args.runs, **self._cache)]

    def _train_trace(self) -> list[Worker]:
        flags = "" if self._args.tiny else NO_GRAPHS
        return [self._ours("train", "trace", *self._args.runs, flags=flags, **self._cache)]

    def _train_torch(self) -> list[Worker]:
        return self._peer("training with transformers", "torch_models_gpu.py", "train", *self._tiny)

    def _decode_plain(self) -> list[Worker]:
        return [self._ours("decode", "bfloat16", **self._cache)]

    def _decode_again(self) -> list[Worker]:
        return [self._ours("decode", "bfloat16", "--only-first", **self._cache)]

    def _decode_quantised(self) -> list[Worker]:
        return [self._ours("decode", form) for form in ("int8", "int4")]

    def _decode_torch(self) -> list[Worker]:
        return self._peer("decoding with transformers", "torch_models_gpu.py", "decode", *self._tiny)


def run(part: str, parts: Parts, found: results.Results, until: float) -> list[str]:
    """Runs a part, until a time of the monotonic clock at most; returns what went wrong."""
    seconds, wrong = until - time.monotonic(), []

    def take(row: dict) -> None:
        if row.get("verdict") != "refused by a peer":
            print(row["text"], flush=True)
        found.add(part, row)
        if "failed" in row:
            wrong.append(f"{row['name']} could not be measured: {row['error']}")

    for group, turns in parts.groups(part):
        start = time.monotonic()
        left = until - start if turns else CHECKS * seconds
        if left <= 0:
            wrong += [f"no time was left for {worker.title}" for worker in group]
            continue
        wrong += workers.run(group, take, left, turns=turns)
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    return wrong


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    """The parts to run: those that were asked for, or all that have the step that was asked for."""
    only, parts = args.only, list(dict.fromkeys(args.part or []))
    for part in parts:
        if only not in (None, *STEPS[part]):
            parser.error(f"--only {only}: the part {part} has the steps {', '.join(STEPS[part])}")
    if only == "torch" and args.torch_python is None:
        parser.error(f"--only torch: {NO_TORCH}")
    return parts or [part for part, steps in STEPS.items() if only in (None, *steps)]


def main() -> None:
    """Reads the arguments, measures, and prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=STEPS, action="append", help="again for another one; without it all parts")
    parser.add_argument("--only", choices=sorted({s for steps in STEPS.values() for s in steps}), help="one step of it")
    parser.add_argument("--runs", nargs="+", default=[], help="training runs, such as llama-1b:B8:T4096:full:adamw")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the checks; a new one each time")
    parser.add_argument("--torch-python", help="Python with torch and transformers; this one if it has them")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a machine without a GPU: no results")
    parser.add_argument("--out", type=Path, help="file of the results; benchmarks/RESULTS-gpu.json")
    parser.add_argument("--plot", type=Path, help="picture of attention's speeds; RESULTS-gpu.png beside the results")
    args, until = parser.parse_args(), time.monotonic()
    if args.torch_python is None and all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        args.torch_python = sys.executable
    if args.torch_python is not None and shutil.which(args.torch_python) is None:
        parser.error(f"--torch-python {args.torch_python}: there is no such program")
    asked = chosen(parser, args)
    limits = dict.fromkeys(STEPS, TINY_LIMIT if args.tiny else LIMIT) if args.tiny or len(asked) == 1 else LIMITS
    out = args.out or (None if args.tiny else HERE / "RESULTS-gpu.json")
    wrong = []
    with tempfile.TemporaryDirectory() as cache:
        parts = Parts(args, cache)
        found = results.Results(out, parts.device())
        print(f"{found.title}; {time.strftime('%Y-%m-%d')}, seed {args.seed}", flush=True)
        if args.torch_python is None:
            print(f"without PyTorch: {NO_TORCH}", flush=True)
        for part in asked:
            print(part, flush=True)
            until += limits[part]
            wrong += run(part, parts, found, until)
    print("\n".join(["", *results.summary(found)]), flush=True)
    if parts.missing:
        print(f"\nnot compared: {', '.join(parts.missing)}: {NO_TORCH}", flush=True)
    picture = args.plot or (None if out is None else out.with_suffix(".png"))
    if picture is not None:
        try:
            results.plot(found, picture)
        except ImportError:
            print("no picture: matplotlib is not installed (pip install 'garrulax[plots]')")
    if "attention" in asked:
        wrong += [f"attention is wrong: {name}" for name in found.bad()]
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
