"""Kills, damages and starves runs of `garrulax train`, and compares every one with the run that was never disturbed.

A round disturbs one run in one random way, resumes it until it ends, and compares the model, the whole last state and
the losses with those of the undisturbed run, bit for bit. The last line is `N rounds, N bit-exact, 0 lost`.

    python tests/chaos/chaos.py --rounds 50 --seed 7      (or: make chaos ROUNDS=50 SEED=7)
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from garrulax.train import digests
from garrulax.train.checkpoint import saved_steps
from garrulax.train.usage import Usage

STEPS, EVERY = 60, 10
COMMON = [f"steps={STEPS}", f"checkpoint_every={EVERY}", "eval_every=30", "log_every=5", "keep=3", "window=32",
          "batch=4", "vocab=300", "dropout=true", "model.width=32", "model.layers=1", "model.heads=2"]  # fmt: skip
VARIANTS = {
    "muon": ["gpt2-tiny", "model.residual_dropout=0.1"],
    "adamw": ["gpt2-tiny", "optimizer=adamw", "isolate=true"],
    "infill": ["glm-base", "model.context=32", "optimizer=adamw", "lr=0.003"],
}
COMMAND = [sys.executable, "-c", "import sys; from garrulax.cli import main; sys.exit(main())", "train"]
LIMIT = 300  # seconds after which a command counts as hanging


class LostError(Exception):
    """A run that cannot be brought to its right end."""


class Chaos:
    """One base folder with the undisturbed runs, and the rounds."""

    def __init__(self, base: Path, seed: int):
        self.base, self.random, self.seconds = base, random.Random(seed), 10.0
        self.cache = base / "cache"
        text = random.Random(1)
        words = ["".join(text.choices("abcdefghijklmnop", k=text.randint(2, 9))) for _ in range(200)]
        lines = (" ".join(text.choices(words, k=9)) + "." for _ in range(1500))
        (base / "text.txt").write_text("\n".join(lines))
        self.wholes: dict[str, Path] = {}
        self.parts: dict[str, Path] = {}

    def command(self, words: list, cache: Path | None = None, **options) -> subprocess.Popen:
        environment = {
            **os.environ,
            "GARRULAX_CACHE": str(cache or self.cache),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self.base / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": "",
        }
        return subprocess.Popen(
            [*COMMAND, *map(str, words)], env=environment, text=True, stderr=subprocess.PIPE, **options
        )

    def start(self, variant: str, run: Path, **options) -> subprocess.Popen:
        """Starts the run, or resumes it if it has begun."""
        words = ["--resume", run] if (run / "run.json").exists() else [
            *VARIANTS[variant], *COMMON, f"corpus={self.base / 'text.txt'}", "--run", run]  # fmt: skip
        return self.command(words, **options)

    def finish(self, variant: str, run: Path, cache: Path | None = None) -> str:
        """Runs or resumes until the end; returns what it printed."""
        process = self.start(variant, run, cache=cache)
        code, said = ended(process)
        if code != 0:
            raise LostError(f"exit code {code}: {' | '.join(said.strip().splitlines()[-3:])}")
        if "Traceback" in said:
            raise LostError(f"a traceback: {said.strip().splitlines()[-1]}")
        return said

    def whole(self, variant: str) -> Path:
        """The undisturbed run."""
        if variant not in self.wholes:
            run = self.base / f"whole-{variant}"
            start = time.perf_counter()
            self.finish(variant, run)
            self.seconds = time.perf_counter() - start
            self.wholes[variant] = run
        return self.wholes[variant]

    def part(self, variant: str) -> Path:
        """A run that was killed in its middle, when it had two or three checkpoints."""
        if variant not in self.parts:
            run = self.base / f"part-{variant}"
            process = self.start(variant, run)
            until(process, lambda: len(saved_steps(run / "checkpoints")) >= 2)
            kill(process)
            if len(saved_steps(run / "checkpoints")) < 2 or STEPS in saved_steps(run / "checkpoints"):
                raise LostError(f"{run} did not stop in its middle")
            self.parts[variant] = run
        return self.parts[variant]

    def compare(self, variant: str, run: Path, losses: bool = True, stops: int = 0) -> None:
        """Raises LostError if a finished run is not, bit for bit, the undisturbed one.

        Args:
            variant: Its kind.
            run: Its folder.
            losses: Whether its records are compared too.
            stops: How often it may have been told to stop.
        """
        whole = self.whole(variant)
        name = Path("model", "model.safetensors")
        if (run / name).read_bytes() != (whole / name).read_bytes():
            raise LostError("the model has other bits")
        ours, theirs = (jax.tree.leaves(stored(r)) for r in (run, whole))
        if len(ours) != len(theirs) or not all(map(same_bits, ours, theirs)):
            raise LostError("the last state has other bits")
        if losses:
            same_records(recorded(run), recorded(whole), stops)
        left = [p.name for p in (run / "checkpoints").iterdir() if "writing" in p.name or "deleting" in p.name]
        if left:
            raise LostError(f"left over: {left}")

    # -- The ways to disturb a run ------------------------------------------------------------------------------------

    def killed(self, variant: str, run: Path) -> str:
        """SIGKILL at one to three random moments."""
        told = []
        for _ in range(self.random.randint(1, 3)):
            process = self.start(variant, run)
            delay = self.random.uniform(0.2, 1.1 * self.seconds)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            kill(process)
            check_whole(run)
            told.append(f"{delay:.1f} s")
        self.finish(variant, run)
        return f"killed after {', '.join(told)}"

    def killed_while_saving(self, variant: str, run: Path) -> str:
        """SIGKILL when a checkpoint is being written, at a random moment of it."""
        at = self.random.randint(0, STEPS // EVERY - 2)

        def writing() -> bool:
            names = os.listdir(run / "checkpoints") if (run / "checkpoints").exists() else []
            return (
                any(".writing" in n or ".deleting" in n for n in names)
                and (saved_steps(run / "checkpoints") or [0])[-1] >= at * EVERY
            )

        process = self.start(variant, run)
        until(process, writing, 0.0005)
        time.sleep(self.random.choice([0, 0.001, 0.005, 0.02, 0.05]))
        kill(process)
        there = check_whole(run)
        self.finish(variant, run)
        return f"killed inside a save, whole were {there}"

    def killed_before_the_first(self, variant: str, run: Path) -> str:
        """SIGKILL before the first checkpoint is complete."""
        process = self.start(variant, run)
        until(process, lambda: (run / "run.json").exists(), 0.001)
        time.sleep(self.random.uniform(0, 0.5))
        kill(process)
        there = check_whole(run)
        said = self.finish(variant, run)
        if not there and "begins at step 0" not in said:
            raise LostError("it does not say that it begins at step 0")
        return f"killed before the first checkpoint, whole were {there}"

    def stopped(self, variant: str, run: Path) -> str:
        """SIGTERM or SIGHUP when the first checkpoint is there: it saves, and exits with 0."""
        number = self.random.choice([signal.SIGTERM, signal.SIGHUP])
        process = self.start(variant, run)
        until(process, lambda: saved_steps(run / "checkpoints"))
        time.sleep(self.random.uniform(0, 0.5))
        process.send_signal(number)
        begun = time.perf_counter()
        code, said = ended(process)
        if code != 0:
            raise LostError(f"{number.name}: exit code {code}: {said[-300:]}")
        self.finish(variant, run)
        return f"{number.name}, ended after {time.perf_counter() - begun:.1f} s with the rest"

    def file_damaged(self, variant: str, run: Path) -> str:
        """A bit of a file is flipped, or the file is cut, emptied or deleted."""
        shutil.copytree(self.part(variant), run, dirs_exist_ok=True)
        latest = saved_steps(run / "checkpoints")[-1]
        files = sorted(p for p in run.rglob("*") if p.is_file() and p.stat().st_size)
        # every other time a file of the latest checkpoint, a third of these the arrays, which Orbax would believe
        inside = [p for p in files if p.is_relative_to(run / "checkpoints" / str(latest))]
        file = self.random.choice(inside if self.random.random() < 0.5 else files)
        if file in inside and self.random.random() < 0.33:
            file = max(inside, key=lambda p: p.stat().st_size)
        how = damage(file, self.random)
        said = self.finish(variant, run)
        if file in inside and f"the checkpoint of step {latest} is damaged: " not in said:
            raise LostError(f"{file.relative_to(run)} {how}: not named")
        return f"{file.relative_to(run)} {how}"

    def cache_damaged(self, variant: str, run: Path) -> str:
        """The same with a file of the token ids."""
        shutil.copytree(self.part(variant), run, dirs_exist_ok=True)
        cache = run.with_name(f"{run.name}-cache")
        shutil.copytree(self.cache, cache)
        file = self.random.choice(sorted(p for p in cache.rglob("*") if p.is_file() and p.stat().st_size))
        how = damage(file, self.random)
        said = self.finish(variant, run, cache)
        key = file.parent.name
        used = any(key == p.name for p in (self.cache / "shards").iterdir()) and key in self.keys_of(variant)
        if used and file.name not in said:
            raise LostError(f"{file.relative_to(cache)} {how}: not named")
        return f"{file.relative_to(cache)} {how}"

    def keys_of(self, variant: str) -> list[str]:
        """The names of the data sets that a variant reads."""
        data = json.loads((self.whole(variant) / "run.json").read_text())["data"]
        metas = {p.parent.name: json.loads(p.read_text()) for p in (self.cache / "shards").glob("*/meta.json")}
        return [k for k, m in metas.items() if (m["corpus"], m["tokenizer"]) == (data["corpus"], data["tokenizer"])]

    def disk_full(self, variant: str, run: Path) -> str:
        """The disk is full at a random moment; then there is room again."""
        room = self.random.randint(100, 900) * 1024
        with small_disk(run, room) as limit:
            process = self.start(variant, run, preexec_fn=limit)
            code, said = ended(process)
        check_whole(run)
        if code not in (0, 1, 2) or "Traceback" in said:
            raise LostError(f"with {room // 1024} KiB: exit code {code}: {said[-300:]}")
        self.finish(variant, run)
        last = said.strip().splitlines()[-1][-90:] if code else "it was enough"
        return f"{room // 1024} KiB of room: {last}"

    def two_at_once(self, variant: str, run: Path) -> str:
        """Two trainings in one folder: one is refused, the other one ends as it should."""
        shutil.copytree(self.part(variant), run, dirs_exist_ok=True)
        both = [self.command(["--resume", run]) for _ in range(2)]
        found = sorted(ended(process) for process in both)
        if [code for code, _ in found] != [0, 1] or "is in use by the training" not in found[1][1]:
            raise LostError(f"exit codes {[code for code, _ in found]}: {found[1][1][-200:]}")
        return "two trainings at once, one refused"


WAYS = {Chaos.killed: 5, Chaos.killed_while_saving: 5, Chaos.killed_before_the_first: 3, Chaos.stopped: 2,
        Chaos.file_damaged: 8, Chaos.cache_damaged: 3, Chaos.disk_full: 3, Chaos.two_at_once: 1}  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise LostError(f"it hangs: {process.communicate()[1][-300:]}") from None
    return process.returncode, said


def until(process: subprocess.Popen, condition, pause: float = 0.005) -> None:
    begun = time.perf_counter()
    while not condition() and process.poll() is None and time.perf_counter() - begun < LIMIT:
        time.sleep(pause)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


def check_whole(run: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which must be whole after a kill."""
    for step in saved_steps(run / "checkpoints"):
        digests.check(run / "checkpoints" / str(step))
    return saved_steps(run / "checkpoints")


def damage(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    how = chance.choice(["flip", "flip", "flip", "cut", "empty", "delete"])
    if how == "flip":
        bit = chance.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        return f"bit {bit} flipped"
    if how == "delete":
        file.unlink()
        return "deleted"
    os.truncate(file, 0 if how == "empty" else chance.randrange(len(content)))
    return f"cut to {file.stat().st_size} of {len(content)} bytes"


@contextlib.contextmanager
def small_disk(run: Path, size: int) -> Iterator:
    """The run's folder on a disk of its own, or else a limit on the size of its files; yields what the child calls."""
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", run], capture_output=True)
    if mounted.returncode:

        def limit() -> None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 8, size // 8))

        yield limit
        return
    kept = run.with_name(f"{run.name}-kept")
    try:
        yield None
        shutil.copytree(run, kept)
    finally:
        subprocess.run(["umount", run], check=True)
    run.rmdir()
    kept.rename(run)


def stored(run: Path):
    """The last state of a run, as it was saved."""
    with warnings.catch_warnings(action="ignore"):  # Orbax: that the file says on which devices
        return ocp.load(run / "checkpoints" / str(STEPS))


def recorded(run: Path) -> list[dict]:
    """The records of a run, without what was measured of time and memory."""
    measured = Usage(tokens=1, flops=1, peak=None).record(None, 1)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in measured} for line in lines]


def same_records(ours: list[dict], theirs: list[dict], stops: int) -> None:
    """Raises LostError if the records of a run are not those of the undisturbed one.

    A run that is told to stop records at once the mean loss of the steps since its last record. The next record is then
    a mean of fewer steps.
    """
    logged = {record["step"] for record in theirs}
    stopped = {record["step"] for record in ours} - logged
    if len(stopped) > stops:
        raise LostError(f"metrics.jsonl has records of steps {sorted(stopped)}")
    shorter = {min(step for step in logged if step > at) for at in stopped}

    def comparable(records: list[dict]) -> list[dict]:
        return [{k: v for k, v in record.items() if k != "loss" or record["step"] not in shorter}
                for record in records if record["step"] in logged]  # fmt: skip

    for one, other in itertools.zip_longest(comparable(ours), comparable(theirs)):
        if one != other:
            raise LostError(f"metrics.jsonl has {one} in place of {other}")


def is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def same_bits(one, other) -> bool:
    one, other = (np.asarray(jax.random.key_data(x) if is_key(x) else x) for x in (one, other))
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--way", choices=[way.__name__ for way in WAYS], help="only this way of disturbing a run")
    parser.add_argument("--first", type=int, default=1, help="number of the first round, to repeat a single one")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    exact = lost = 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chaos = Chaos(Path(folder), seed)
        for number in range(args.first, args.first + args.rounds):
            chance = random.Random(seed * 10**6 + number)  # a round does not depend on what was drawn before it
            variant = chance.choice(list(VARIANTS))
            ways = {way: weight for way, weight in WAYS.items() if args.way in (None, way.__name__)}
            (way,) = chance.choices(list(ways), list(ways.values()))
            run = Path(folder, f"run{number}")
            try:
                chaos.whole(variant)
                chaos.random = chance
                told = way(chaos, variant, run)
                stops = 1 if way is Chaos.stopped else 0
                chaos.compare(variant, run, losses="metrics.jsonl" not in told, stops=stops)
                exact += 1
                print(f"{number:3}  {variant:6} exact  {told}", flush=True)
            except Exception as error:  # whatever goes wrong, the round is lost, and the next one starts
                lost += 1
                print(f"{number:3}  {variant:6} LOST   {way.__name__}: {type(error).__name__}: {error}", flush=True)
            for path in Path(folder).glob(f"run{number}*"):
                shutil.rmtree(path, ignore_errors=True)
    print(f"{args.rounds} rounds, {exact} bit-exact, {lost} lost")
    return 0 if exact == args.rounds else 1


if __name__ == "__main__":
    sys.exit(main())
