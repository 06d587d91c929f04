"""Seconds of compiled programs on this device, and what the device can do at most."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from accelerator.workers import emit
from garrulax.planning.chips import CHIPS
from garrulax.train.flops import peak_flops

#: Bytes/s of memory of GPUs that `garrulax plan` does not know, from NVIDIA's data sheets.
_BANDWIDTHS = {"NVIDIA A100": 2039e9, "NVIDIA B200": 8000e9}


def peak() -> float:
    """FLOP/s of dense bfloat16 products of this device; NaN where it is not known, as for CPUs."""
    return peak_flops(jax.devices()[0]) or float("nan")


def bandwidth() -> float:
    """Bytes/s of the memory of this device; NaN where it is not known."""
    kind = jax.devices()[0].device_kind
    known = {chip.kind: chip.bandwidth for chip in CHIPS.values()} | _BANDWIDTHS
    return next((rate for name, rate in known.items() if kind.startswith(name)), float("nan"))


def compiled(function: Callable, *operands: Any) -> Callable | str:
    """The program of a function of these operands, or why there is none."""
    try:
        return jax.jit(function).lower(*operands).compile()
    except Exception as error:  # a peer that fails must not end the benchmark
        return said(error)


def program(function: Callable, arrays: dict[str, Any]) -> Callable:
    """The program of a function of keyword arguments; it takes them as one dictionary."""
    return jax.jit(lambda given: function(**given)).lower(arrays).compile()


@contextmanager
def reported(table: str, name: str) -> Iterator[None]:
    """Reports an exception as a row that says `failed`, so that what follows is measured."""
    try:
        yield
    except Exception as error:
        emit(table, name, f"  {name}: {said(error)}", error=said(error), failed=True)


def in_threads(function: Callable, jobs: Iterable, threads: int = 5) -> list:
    """The function of each job, in order: XLA's compiler lets other threads run."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, jobs))


def said(error: Exception) -> str:
    """An exception as one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def in_turns(calls: dict[str, tuple[Callable, list]], rounds: int, at_least: float = 0.03) -> dict[str, float]:
    """Median seconds of a call of each program, measured in turns, round after round.

    Args:
        calls: Program and sets of operands by name; every call takes the next set.
        rounds: How often all of them are measured.
        at_least: Seconds that the calls of one round take together, which hides what starting one costs.
    """
    counts, seconds = {}, {name: [] for name in calls}
    for name, (call, sets) in calls.items():
        jax.block_until_ready(call(*sets[0]))
        start = time.perf_counter()
        jax.block_until_ready(call(*sets[-1]))
        counts[name] = max(len(sets), int(at_least / (time.perf_counter() - start)) + 1)
    for _ in range(rounds):
        for name, (call, sets) in calls.items():
            start = time.perf_counter()
            out = [call(*sets[i % len(sets)]) for i in range(counts[name])][-1]
            jax.block_until_ready(out)
            seconds[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(s) for name, s in seconds.items()}
