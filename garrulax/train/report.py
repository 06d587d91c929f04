"""One HTML page about one or several runs: curves, settings, environment and samples. It needs no network."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from garrulax.train import environment, metrics
from garrulax.train.objectives import objective_name
from garrulax.train.plots import smooth
from garrulax.train.progress import duration, si
from garrulax.train.settings import read_record, read_run_file
from garrulax.train.svg import Line, line_chart

#: Colours that people with any colour vision tell apart (Okabe & Ito 2008), without yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLE = """body{font-family:sans-serif;margin:1.5em auto;max-width:1180px;color:#222;padding:0 1em}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:1.8em;border-bottom:1px solid #ddd}
.charts{display:flex;flex-wrap:wrap;gap:8px}svg{max-width:100%;height:auto}
table{border-collapse:collapse;font-size:.85em}td,th{padding:3px 10px;text-align:left;border-bottom:1px solid #eee;
vertical-align:top}td.number{text-align:right;font-variant-numeric:tabular-nums}tr.other td{background:#fff4d6}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em;font-size:.85em;margin:.3em 0}.prompt{color:#888}"""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The settings, metrics and environment of a run, read from its folder.

    Attributes:
        name: Of the run.
        records: Of its metrics.jsonl.
        identity: Of its run.json.
        environment: Of its environment.json; empty for runs of older versions.
        objective: That it minimises: causal, prefix or infill.
        color: Of its lines.
    """

    name: str
    records: list[dict[str, Any]]
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    objective: str
    color: str

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric, [N] each."""
        found = [(r["step"], r[key]) for r in self.records if isinstance(r.get(key), int | float)]
        pairs = np.array(found, np.float64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def last(self, key: str) -> float | None:
        """The latest value of a metric, or None."""
        return next((r[key] for r in reversed(self.records) if key in r), None)


def write_report(folders: Sequence[str | os.PathLike], target: str | os.PathLike) -> Path:
    """Writes the page of `report_page`.

    Args:
        folders: Of the runs.
        target: The file to write.

    Raises:
        FileNotFoundError: If a folder is not that of a run.
        ValueError: If a run has no metrics yet.
    """
    runs = read_runs(folders)
    Path(target).write_text(report_page(runs), encoding="utf-8")
    return Path(target)


def read_runs(folders: Sequence[str | os.PathLike]) -> list[RunRecord]:
    """Reads the runs in these folders; errors as for `write_report`."""
    names = _names(folders)
    return [
        _read(folder, name, COLORS[i % len(COLORS)])
        for i, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]


def report_page(runs: Sequence[RunRecord]) -> str:
    """The page as HTML: a table of results, curves, skipped steps, samples, settings and environment."""
    title = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _table(_results(runs)),
        *(f"<p>{escape(line)}</p>" for line in _not_comparable(runs)),
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(runs))}</div>',
        _section("Skipped steps", _skipped(runs)),
        _section("Samples", "".join(_samples(run) for run in runs)),
        _section("Settings", _compared(runs, lambda run: _flat(run.identity))),
        _section("Environment", _compared(runs, lambda run: run.environment)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _read(folder: str | os.PathLike, name: str, color: str) -> RunRecord:
    identity = read_record(folder)
    records = metrics.read_metrics(folder)
    if not records:
        raise ValueError(f"{folder} has no metrics yet: {metrics.NAME} is missing or empty")
    settings, config = read_run_file(folder)
    objective = objective_name(settings.objective, config)
    return RunRecord(name, records, identity, environment.read_environment(folder), objective, color)


def _names(folders: Sequence[str | os.PathLike]) -> list[str]:
    """The last part of each path; whole paths if these are not all different."""
    short = [Path(folder).resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [os.fspath(folder) for folder in folders]


def _charts(runs: Sequence[RunRecord]) -> list[str]:
    charts = [line_chart("training loss (nats per token)", _smoothed(runs, "loss"), skip=0.02)]
    plain = {"valid_loss": "held-out loss (nats per token)", "perplexity": "held-out perplexity",
             "bits_per_byte": "held-out bits per byte"}  # fmt: skip
    charts += [line_chart(title, _lines(runs, key)) for key, title in plain.items()]
    texts = sorted({key for run in runs for r in run.records for key in r if key.startswith("valid_loss/")})
    charts += [line_chart(f"held-out loss of {key[11:]}", _lines(runs, key)) for key in texts]
    charts.append(line_chart("gradient norm", _lines(runs, "grad_norm"), log=True))
    more = {"lr": "learning rate", "tokens_per_second": "tokens per second",
            "mfu": "model FLOPs utilisation", "data_wait": "seconds a step that the device waited for data",
            "goodput": "goodput: share of time in training steps", "peak_memory": "peak memory (bytes)"}  # fmt: skip
    charts += [line_chart(title, _lines(runs, key)) for key, title in more.items()]
    return charts + [_block_norms(run, len(runs) > 1) for run in runs]


def _lines(runs: Sequence[RunRecord], key: str) -> list[Line]:
    lines = [Line(run.name if len(runs) > 1 else "", *run.series(key), run.color) for run in runs]
    return [line for line in lines if len(line.x)]


def _smoothed(runs: Sequence[RunRecord], key: str) -> list[Line]:
    lines = _lines(runs, key)
    pale = [dataclasses.replace(line, name="", faint=True) for line in lines]
    return pale + [dataclasses.replace(line, y=smooth(line.y)) for line in lines]


def _block_norms(run: RunRecord, several: bool) -> str:
    """The gradient norms of the blocks: the first is light, the last dark."""
    prefix = "grad_norm/blocks/"
    layers = sorted({int(k[len(prefix) :]) for r in run.records for k in r if k.startswith(prefix)})
    lines = []
    for layer in layers:
        shade = 205 - round(170 * layer / max(1, layers[-1]))
        name = f"block {layer}" if layer in (layers[0], layers[-1]) else ""
        lines.append(Line(name, *run.series(f"{prefix}{layer}"), f"rgb({shade // 2},{shade},{min(255, shade + 50)})"))
    return line_chart("gradient norm of each block" + (f", {run.name}" if several else ""), lines, log=True)


def _results(runs: Sequence[RunRecord]) -> list[list[str]]:
    rows = []
    for run in runs:
        steps, held_out = run.series("valid_loss")
        times = run.series("time")[1]
        memory = run.last("peak_memory")
        rows.append(
            {
                "run": run.name,
                "steps": f"{run.records[-1]['step']:,} of {run.identity['settings']['steps']:,}",
                "training loss": _number(run.last("loss"), ".4f"),
                "held-out loss": _number(run.last("valid_loss"), ".4f"),
                "best (step)": f"{held_out.min():.4f} ({steps[held_out.argmin()]:,.0f})" if len(held_out) else "–",
                "perplexity": _number(run.last("perplexity"), ".2f"),
                "bits per byte": _number(run.last("bits_per_byte"), ".3f"),
                "tokens/s": "–" if run.last("tokens_per_second") is None else si(run.last("tokens_per_second") or 0.0),
                "MFU": _number(run.last("mfu"), ".1%"),
                "goodput": _number(run.last("goodput"), ".1%"),
                "peak memory": "–" if memory is None else f"{si(memory)}B",
                "skipped": f"{len(run.series('skipped')[0]):,}",
                "first to last record": duration(times[-1] - times[0]) if len(times) else "–",
            }
        )
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def _not_comparable(runs: Sequence[RunRecord]) -> list[str]:
    """Warnings for a reader who compares the losses of these runs."""
    found = []
    if len({run.objective for run in runs}) > 1:
        found.append("The objectives differ: their losses are of other predictions and cannot be compared.")
    if len({run.identity["data"].get("tokenizer") for run in runs}) > 1:
        found.append("The tokenizers differ: losses and perplexities are of other tokens; compare bits per byte.")
    if len({run.identity["data"].get("corpus") for run in runs}) > 1:
        found.append("The texts differ, and so may the held-out ones.")
    return found


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _skipped(runs: Sequence[RunRecord]) -> str:
    rows = [[run.name, f"{r['step']:,}", str(r.get("skipped_because", ""))]
            for run in runs for r in run.records if r.get("skipped")]  # fmt: skip
    return _table([["run", "step", "because of"], *rows]) if rows else ""


def _samples(run: RunRecord, most: int = 12) -> str:
    """The latest samples of a run, the last first."""
    found = [r for r in run.records if "sample" in r][-most:]
    texts = [
        f"<p>{escape(run.name)}, step {r['step']:,}</p><pre>"
        f'<span class="prompt">{escape(str(r.get("prompt", "")))}</span>{escape(str(r["sample"]))}</pre>'
        for r in reversed(found)
    ]
    return "".join(texts)


def _compared(runs: Sequence[RunRecord], values: Callable[[RunRecord], Mapping[str, Any]]) -> str:
    """A table of values by name, one column a run. Rows in which the runs differ are coloured."""
    columns = [{name: str(value) for name, value in values(run).items()} for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        cells = [column.get(name, "–") for column in columns]
        other = ' class="other"' if len(set(cells)) > 1 else ""
        rows.append(f"<tr{other}><td>{escape(name)}</td>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    head = "<tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, then the fields of the model's config, and the hashes of the data."""
    settings = {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in identity["settings"].items()}
    model = {f"model.{name}": value for name, value in identity["config"].items()}
    data = {f"data.{name}": value for name, value in identity["data"].items()}
    return {**settings, "family": identity.get("family"), **model, **data}


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for first, *cells in body:
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
        lines.append(f"<tr><td>{escape(first)}</td>{numbers}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""
