"""Results in a file of JSON, which a run that is cut leaves as far as it came; and the tables and the picture of them.

The file has an object for each device with its driver and versions, in it one for each part: the same once more, the
date, and the rows of each table by name. A run replaces the rows that it measures again, and leaves those of other
devices and versions as they are.
"""

import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerator.comparing import BAD

FAILED = ", failed"  # what the name of an error's row ends in
_PACKAGES = ("jax", "jaxlib", "torch", "transformers")


def environment(device: str) -> dict[str, str]:
    """The device, its driver, and the versions of what is compared; found without starting JAX."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = ""
    found = {"device": device, "driver": driver}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Results:
    """The results of all parts on a device, in memory and in a file, which keeps those of other devices too.

    Args:
        path: Of the file; None keeps nothing.
        device: As JAX calls it.
    """

    def __init__(self, path: Path | None, device: str):
        self._path, self._environment = path, environment(device)
        self._all = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.parts: dict[str, Any] = self._all.setdefault(self.title, {})

    @property
    def title(self) -> str:
        """What was measured on."""
        found = {name: text for name, text in self._environment.items() if text}
        return ", ".join(text if name == "device" else f"{name} {text}" for name, text in found.items())

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Puts a row into its table, and writes the file.

        An error has a row of its own beside that of the last measurement, until the next one succeeds. Of checks the
        last verdict counts, whatever it is.
        """
        now = self.parts.setdefault(part, dict(self._environment))
        now["date"] = time.strftime("%Y-%m-%d")
        values = {name: x for name, x in row.items() if name not in ("table", "name", "text")}
        values["at"] = time.strftime("%Y-%m-%d %H:%M")
        rows, failed = now.setdefault("tables", {}).setdefault(row["table"], {}), row["name"] + FAILED
        if isinstance(row.get("error"), str):  # that of a check is a number
            rows[failed] = values
        else:
            rows.pop(failed, None)
            rows[row["name"]] = values
        if self._path is not None:
            beside = self._path.with_suffix(".writing")
            beside.write_text(json.dumps(self._all, indent=1) + "\n")
            os.replace(beside, self._path)

    def table(self, part: str, name: str) -> dict[str, dict[str, Any]]:
        """The rows of a table, by name."""
        return self.parts.get(part, {}).get("tables", {}).get(name, {})

    def bad(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, row in self.table("attention", "check").items() if row["verdict"] in BAD]


def _numbers(values: Iterable[float | None]) -> str:
    return " / ".join("–" if x is None else f"{x:.0f}" for x in values)


def attention_table(results: Results) -> list[str]:
    """Forward / backward TFLOP/s: a row a mask and size, a column an implementation; * is what is picked."""
    rows = [row for row in results.table("attention", "speed").values() if "forward" in row]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    keys = sorted({(row["width"], row["length"], row["case"]) for row in rows})
    lines = ["| mask, width, length | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for width, length, case in keys:
        cells = []
        for name in names:
            some = [r for r in rows if (r["width"], r["length"], r["case"]) == (width, length, case)]
            found = next((r for r in some if r["implementation"] == name), None)
            text = _numbers((found["forward"], found["backward"])) if found else ""
            cells.append(text + "*" * bool(found and found["picked"]))
        lines.append(f"| {case}, {width}, {length} | " + " | ".join(cells) + " |")
    return lines if rows else []


def summary(results: Results) -> list[str]:
    """Everything in a few tables."""
    lines = []
    checks = list(results.table("attention", "check").values())
    if checks:
        verdicts = dict.fromkeys(row["verdict"] for row in checks)
        counted = ", ".join(f"{sum(row['verdict'] == v for row in checks)} {v}" for v in verdicts)
        lines += [f"checks of attention: {counted}", *(f"  FAILED: {name}" for name in results.bad())]
    if table := attention_table(results):
        lines += ["", "attention, TFLOP/s forward / backward (* is picked)", *table]
    lines += _errors(results, "attention", "speed")
    if rows := results.table("attention", "decode kernel"):
        lines += ["", "decoding attention, TB/s of keys and values"]
        lines += [f"  {name:36s} {row['TBs']:.2f}" for name, row in rows.items() if "TBs" in row]
        lines += _errors(results, "attention", "decode kernel")
    if rows := results.table("train", "train"):
        lines += ["", "training: ms a step, tokens/s, MFU"]
        lines += [_trained(name, row) for name, row in rows.items()]
    for name, row in results.table("train", "step").items():
        if "parts" in row:
            parts = (f"{part} {ms:.1f} ({row['floors'].get(part) or 0:.1f})" for part, ms in row["parts"].items())
            lines += [f"  {name}, ms by part (floor): " + ", ".join(parts)]
    lines += _errors(results, "train", "step")
    if rows := results.table("decode", "decode"):
        lines += ["", "decoding: ms a token, tokens/s, share of the bandwidth, first call"]
        lines += [_decoded(name, row) for name, row in rows.items()]
    for name, row in results.table("decode", "first call").items():
        said = f"first call {row['seconds']:.1f} s with compiled programs kept" if "seconds" in row else row["error"]
        lines += [f"  {name}: {said}"]
    return lines


def _errors(results: Results, part: str, table: str) -> list[str]:
    return [f"  {name}: {row['error']}" for name, row in results.table(part, table).items() if "error" in row]


def _trained(name: str, row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"  {name:40s} {row['error']}"
    share = f"{row['mfu']:7.1%}" if row.get("mfu") else ""
    return f"  {name:40s} {row['ms']:8.1f} {row['tokens_per_s']:10,.0f} {share}"


def _decoded(name: str, row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"  {name:28s} {row['error']}"
    share = f"{row['share']:5.0%}" if row.get("share") else "     "
    return f"  {name:28s} {row['ms']:7.2f} {row['tokens_per_s']:8,.0f} {share} {row['first_call_s']:6.1f} s"


def plot(results: Results, path: Path) -> None:
    """Draws TFLOP/s of attention as bars: a panel for each width and pass, a group for each mask and length."""
    import matplotlib.pyplot as plt

    rows = [row for row in results.table("attention", "speed").values() if "forward" in row]
    if not rows:
        return
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    widths = sorted({row["width"] for row in rows})
    figure, axes = plt.subplots(2, len(widths), figsize=(5.2 * len(widths), 6.4), squeeze=False, sharey="row")
    for j, width in enumerate(widths):
        groups = list(dict.fromkeys((r["case"], r["length"]) for r in rows if r["width"] == width))
        for i, kind in enumerate(("forward", "backward")):
            axis = axes[i, j]
            for k, name in enumerate(names):
                found = {
                    (r["case"], r["length"]): r[kind]
                    for r in rows
                    if r["width"] == width and r["implementation"] == name and r[kind]
                }
                places = [g + 0.8 * (k / len(names) - 0.5) for g, group in enumerate(groups) if group in found]
                heights = [found[group] for group in groups if group in found]
                axis.bar(places, heights, 0.8 / len(names), align="edge", label=name, color=f"C{k}")
            labels = [f"{case} {length // 1024}k" for case, length in groups]
            axis.set_xticks(range(len(groups)), labels, rotation=60, ha="right", fontsize=7)
            axis.set_title(f"{kind}, heads {width} wide", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s of attended pairs")
    axes[0, 0].legend(fontsize=7)
    of = results.parts["attention"]
    figure.suptitle(f"Attention, {of['device']}, jax {of.get('jax')}, {of['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
