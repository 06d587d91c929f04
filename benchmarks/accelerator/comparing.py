"""Comparing results with a reference.

Two errors are reported, each the greatest of all arrays: |error| / |reference| in the 2-norm over a whole array, and
that of the worst row (the last axis), divided by its norm or the mean one, whichever is greater: a single wrong block
shows there. The verdict is `ok`; `OFF` for a large error; `UNEQUAL` where a second call gave other bits (`unequal`
where the implementation is not ours); `refused`, with the reason (`refused by a peer`: no news); or `RAISED`.
"""

from typing import Any

import jax
import numpy as np

from accelerator.timing import said
from accelerator.workers import emit

BOUNDS = {"bfloat16": 2e-2, "float16": 4e-3}  # of whole arrays; ten times as much of a row
OWN = ("pallas_gpu", "pallas_tpu", "xla")  # must give the same bits again
BAD = ("OFF", "UNEQUAL", "RAISED")


def report(title: str, dtype: str, got: Any, again: Any, exact: Any, row: dict[str, Any]) -> None:
    """Compares the results of two calls with the reference, and reports the row."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True))
    whole, worst = (max(f(a, b) for a, b in pairs) for f in (of_array, of_worst_row))
    same = all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True))
    bound = BOUNDS[dtype]
    verdict = "ok" if whole < bound and worst < 10 * bound else "OFF"  # also for NaN
    if verdict == "ok" and not same:
        verdict = "UNEQUAL" if row["implementation"] in OWN else "unequal"
    text = f"{verdict:8s} {title}: error {whole:.1e}, worst row {worst:.1e}"
    emit("check", title, text, verdict=verdict, error=whole, worst_row=worst, repeats=same, **row)


def report_error(title: str, error: Exception, row: dict[str, Any]) -> None:
    """Reports that an implementation refuses a request, or fails."""
    own = row["implementation"] in OWN
    if "cannot compute this" in str(error):
        verdict, reason = "refused" if own else "refused by a peer", str(error).split(": ", 1)[-1]
    else:
        verdict, reason = "RAISED" if own else "raised", said(error)
    emit("check", title, f"{verdict:8s} {title}: {reason[:120]}", verdict=verdict, **row)


def of_array(got: np.ndarray, exact: np.ndarray) -> float:
    """|error| / |reference| over an array; of arrays of zeros, |error|."""
    a, b = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def of_worst_row(got: np.ndarray, exact: np.ndarray) -> float:
    """The greatest error of a row, relative to the norm of the row or the root mean square of all rows' norms."""
    a, b = np.asarray(got, np.float64), np.asarray(exact, np.float64)
    norms = np.linalg.norm(b, axis=-1)
    scale = np.maximum(norms, np.sqrt(np.mean(norms**2)))
    return float(np.max(np.linalg.norm(a - b, axis=-1) / np.where(scale == 0, 1.0, scale)))
