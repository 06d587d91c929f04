"""Training steps on this device: milliseconds, tokens a second, MFU; and where the time goes, by part.

A run is written as MODEL:B4:T4096:dots:adamw, with `:packed` for rows of several documents. MFU is FLOPs a token (6 N +
12 Σ H C K: docs/reports.md; for packed rows K is the length of a document) times tokens a second, divided by the
device's peak in bfloat16. Parameters and optimizer are in float32, the model is computed in bfloat16.

`speed` times steps. `trace` records some by XLA's profiler. That has to be a process of its own, with
XLA_FLAGS=--xla_gpu_enable_command_buffer= , because command buffers hide which kernel belongs to which instruction.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

import garrulax as gx
from accelerator import device, timing, trace
from accelerator.floors import floors
from accelerator.workers import emit, wait_for_turn
from garrulax import models
from garrulax.train import objectives, optimizers, settings, state, step
from garrulax.train.flops import train_flops_per_token

RUNS = (
    "llama-1b:B4:T4096:dots:adamw",
    "llama-1b:B8:T4096:dots:adamw",
    "llama-1b:B4:T4096:dots:adamw:packed",
    "llama-1b:B4:T4096:dots:muon",
    "gpt2:B32:T1024:none:adamw",
)
TRACED = (RUNS[0], RUNS[3], RUNS[4])
TINY = ("tiny:B2:T32:dots:muon:packed",)
#: Presets with other sizes. The first has those of LLaMA 3.2 1B, but a vocabulary of 32,000.
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "llama-1b": ("llama2-7b", {"layers": 16, "width": 2048, "kv_heads": 8, "head_dim": 0, "mlp_width": 8192}),
    "tiny": ("llama-tiny", {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "mlp_width": 64, "vocab": 128}),
}
DOCUMENT = {"llama-1b": 700}  # tokens of a document of a packed row; of other models a third of the row
STEPS, KERNELS = 3, 12  # of a trace; of the table


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        text: As it is written.
        model: A name in `MODELS`, or a preset.
        batch: Rows.
        window: Tokens of a row.
        remat: Policy.
        optimizer: Name.
        packed: Whether the rows have several documents.
    """

    text: str
    model: str
    batch: int
    window: int
    remat: str
    optimizer: str
    packed: bool

    @classmethod
    def read(cls, text: str) -> "Run":
        """From MODEL:B4:T4096:dots:adamw[:packed]."""
        model, batch, window, remat, optimizer, *rest = text.split(":")
        return cls(text, model, int(batch[1:]), int(window[1:]), remat, optimizer, rest == ["packed"])

    @property
    def config(self) -> Any:
        """Of the model."""
        preset, sizes = MODELS.get(self.model, (self.model, {}))
        return gx.preset(preset, **sizes)

    @property
    def tokens(self) -> int:
        """Of a batch."""
        return self.batch * self.window

    @property
    def document(self) -> int:
        """Tokens of a document."""
        return DOCUMENT.get(self.model, self.window // 3) if self.packed else self.window

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attend, in all rows."""
        sizes = np.bincount(np.arange(self.window) // self.document)
        return self.batch * int((sizes * (sizes + 1) // 2).sum())

    @property
    def flops(self) -> float:
        """Of a step, as MFU counts them."""
        return train_flops_per_token(self.config, self.document) * self.tokens

    def batch_of(self, seed: int) -> dict[str, np.ndarray]:
        """Random tokens."""
        rows = np.random.default_rng(seed).integers(0, self.config.vocab, (1, self.batch, self.window + 1))
        rows = rows.astype(np.int32)
        made = {"tokens": rows[..., :-1], "targets": rows[..., 1:]}
        made["weights"] = np.ones(made["tokens"].shape, np.float32)
        if self.packed:
            segment = (np.arange(self.window) // self.document).astype(np.int32)
            made["segment"] = np.broadcast_to(segment, made["tokens"].shape)
        return made


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's compiled step.

    Attributes:
        run: The run.
        step: The compiled step.
        optimizer: That the state is made with.
        seconds: That compiling took.
    """

    run: Run
    step: Any
    optimizer: Any
    seconds: float


def build(text: str) -> Program | str:
    """Compiles the step of a run, or says why it cannot be; allocates nothing."""
    start = time.perf_counter()
    try:
        run = Run.read(text)
        config = run.config
        chosen = settings.Settings(
            optimizer=run.optimizer,
            batch=run.batch,
            window=run.window,
            steps=100,
            precision="bfloat16",
            remat=run.remat,
        )
        optimizer = optimizers.make_optimizer(chosen, models.family(config).parameters(config))
        update = step.make_train_step(config, chosen, optimizer, objectives.causal_lm)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), run.batch_of(0))
        compiled = update.lower(state.abstract_state(config, optimizer), batch).compile()
    except Exception as error:  # the other runs are measured
        return timing.said(error)
    return Program(run, compiled, optimizer, time.perf_counter() - start)


def started(program: Program) -> tuple[Any, Any, Any]:
    """State, batch and metrics after two steps."""
    now = state.init_state(program.run.config, program.optimizer, 0)
    batch = jax.device_put(program.run.batch_of(0))
    for _ in range(2):
        now, metrics = program.step(now, batch)
    return now, batch, jax.block_until_ready(metrics)


def speed(program: Program, rounds: int = 3, steps: int = 4) -> None:
    """Reports the median time of a step."""
    run = program.run
    now, batch, metrics = started(program)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            now, metrics = program.step(now, batch)
        jax.block_until_ready(metrics)
        seconds.append((time.perf_counter() - start) / steps)
    best = statistics.median(seconds)
    share = run.flops / best / timing.peak()
    temporary = program.step.memory_analysis().temp_size_in_bytes / 2**30
    emit(
        "train", run.text,
        f"  {run.text:40s} {1e3 * best:7.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}),"
        f" {run.tokens / best:9,.0f} tokens/s, MFU {share:6.1%}, loss {float(metrics['loss']):.3f},"
        f" temporaries {temporary:.1f} GiB, compiled in {program.seconds:.0f} s",
        ms=1e3 * best, tokens_per_s=run.tokens / best, mfu=share, loss=float(metrics["loss"]),
        temporary_GiB=temporary, compile_s=program.seconds, parameters=gx.count(run.config),
    )  # fmt: skip


def traced(program: Program) -> None:
    """Reports the time of a step by part, with the floor of each, and the kernels that take longest."""
    run = program.run
    now, batch, _ = started(program)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                now, metrics = program.step(now, batch)
            jax.block_until_ready(metrics)
        found, span = trace.kernels(folder, STEPS)
    text = program.step.as_text()
    parts = trace.by_part(found, text)
    least = floors(run.config, run.tokens, run.pairs, run.optimizer, timing.peak(), timing.bandwidth())
    busy = sum(parts.values())
    lines = [f"  {run.text}: {span:.1f} ms a step traced, kernels run {busy:.1f} ms; ms by part, and the least"]
    lines += [f"    {part:12s} {ms:7.1f}  {least.get(part, 0):6.1f}" for part, ms in parts.items()]
    places = trace.origins(text)
    top = [(k, trace.part_of(k, places.get(k.op))) for k in found[:KERNELS]]
    lines += [f"    {k.ms:7.2f} ms {k.calls:5.0f}x  {part:12s} {k.op[:36]:36s} {k.name[:48]}" for k, part in top]
    kernels = [{**k._asdict(), "part": part} for k, part in top]
    emit("step", run.text, "\n".join(lines), span_ms=span, parts=parts, floors=least, kernels=kernels)


def main() -> None:
    """Compiles all runs in threads, waits, and measures them one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "trace"))
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny:
        device.accelerator()
    runs = args.runs or (TINY if args.tiny else RUNS if args.what == "speed" else TRACED)
    programs = timing.in_threads(build, runs)
    wait_for_turn()
    for text, program in zip(runs, programs, strict=True):
        with timing.reported("train" if args.what == "speed" else "step", text):  # such as too little memory
            if isinstance(program, str):
                raise RuntimeError(program)
            (speed if args.what == "speed" else traced)(program)


if __name__ == "__main__":
    main()
