"""A picture of the loss curves of a run."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from garrulax.train import metrics

NAME = "loss.png"
_TRAIN, _SMOOTH, _HELD_OUT, _GREY = "#9db8d9", "#2a5c9a", "#d1495b", "#666666"


def draw(folder: str | os.PathLike, title: str) -> Path | None:
    """Draws loss.png from a run's metrics.jsonl: the training loss, raw and smoothed, and the held-out loss.

    If bits per byte are known, a second axis shows them.

    Args:
        folder: Of the run.
        title: Of the picture.

    Returns:
        Path of the picture; None if the run has no losses yet.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # unlike pyplot, it has no global state and needs no display

    records = metrics.read_metrics(folder)
    train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r]).reshape(-1, 2)
    held_out = np.array([(r["step"], r["valid_loss"]) for r in records if "valid_loss" in r]).reshape(-1, 2)
    if len(train) + len(held_out) == 0:
        return None
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    if len(train):
        axes.plot(*train.T, color=_TRAIN, linewidth=0.8)
        axes.plot(train[:, 0], smooth(train[:, 1]), color=_SMOOTH, linewidth=1.6, label="training")
    if len(held_out):
        axes.plot(*held_out.T, color=_HELD_OUT, linewidth=1.6, marker="o", markersize=3.5, label="held out")
        axes.annotate(f"{held_out[-1, 1]:.3f}", held_out[-1], (0, 7), textcoords="offset points", ha="center",
                      color=_HELD_OUT, fontsize=9)  # fmt: skip
    _frame(axes, title, train, held_out)
    _bits_axis(axes, records)
    path = Path(folder, NAME)
    figure.savefig(path)
    return path


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Exponential moving average over about `share` of the values, run forwards and backwards so that it has no lag.

    Args:
        values: [N].
        share: Of the N values.

    Returns:
        [N].
    """
    decay = 1 - 1 / max(1.0, share * len(values))
    return (_average(values, decay) + _average(values[::-1], decay)[::-1]) / 2


def _average(values: np.ndarray, decay: float) -> np.ndarray:
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = decay * total + value, decay * weight + 1
        out[i] = total / weight
    return out


def _frame(axes: Any, title: str, train: np.ndarray, held_out: np.ndarray) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(left=0)
    losses = np.concatenate([train[len(train) // 50 :, 1], held_out[:, 1]])  # the steep start would flatten the rest
    margin = 0.05 * (losses.max() - losses.min()) + 1e-3
    axes.set_ylim(losses.min() - margin, losses.max() + margin)
    axes.legend(loc="upper right", frameon=False, fontsize=9)


def _bits_axis(axes: Any, records: list[dict]) -> None:
    known = [r["bits_per_byte"] / r["valid_loss"] for r in records if r.get("bits_per_byte") and r.get("valid_loss")]
    if not known:
        return
    ratio = known[-1]
    right = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda b: b / ratio))
    right.set_ylabel("bits per byte", color=_GREY)
    right.tick_params(colors=_GREY)
    right.spines["right"].set_visible(False)
