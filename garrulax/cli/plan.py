"""`garrulax plan`: what a training run would need on chips that are not there, and how fast it would be."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from garrulax.core.collectives import Collective
from garrulax.core.config import ModelConfig
from garrulax.planning.plan import DEFAULTS, Plan, chosen_settings, compile_plan
from garrulax.planning.program import PRODUCTS
from garrulax.planning.search import Candidate, search
from garrulax.planning.topology import quiet_compiler, read_topology
from garrulax.train import settings as settings_

_OWN = ("batch", "window", "strategy", "mesh", "preset")


def plan(args: argparse.Namespace) -> None:
    """Prints the plan of a run, or with `--search` the ranking of several."""
    quiet_compiler()
    config, given = _read(args)
    options = _options(args.xla) if args.xla else None
    if args.search:
        found = search(config, args.topology, batch=args.batch, length=args.length, compiled=args.compile,
                               options=options, say=lambda line: print(line, file=sys.stderr), **given)  # fmt: skip
        print(json.dumps([_ranked(c) for c in found]) if args.json else describe_search(found))
        return
    topology = read_topology(args.topology)
    chosen = chosen_settings(config, topology, args.batch, args.length, args.strategy, args.mesh, given)
    found_plan = compile_plan(config, chosen, topology, options)
    print(json.dumps(numbers(found_plan)) if args.json else describe(args.model, found_plan))


def _options(words: Sequence[str]) -> dict[str, str]:
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"--xla {wrong[0]} is not like OPTION=VALUE")
    return {name.removeprefix("--"): value for name, _, value in (word.partition("=") for word in words)}


def _read(args: argparse.Namespace) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config, and the settings among the words that are not arguments of their own."""
    for word in args.settings:
        if word.partition("=")[0] in _OWN:
            raise ValueError(f"{word}: give batch, length, strategy and mesh as --batch, --length, --strategy, --mesh")
    changes = settings_.read_changes(None, args.settings)
    given = {key: value for key, value in changes.items() if key != "model" and not key.startswith("model.")}
    settings, config = settings_.apply_changes({**DEFAULTS, **changes, "preset": args.model})
    return config, {key: getattr(settings, key) for key in given}


def describe(name: str, p: Plan) -> str:
    """A plan as text, under the name of the model."""
    s, chip = p.settings, p.topology.chip
    head = (
        f"{name} on {p.topology.name} ({p.topology.chips} {chip.name} chips): --strategy {s.strategy} --mesh {s.mesh} "
        f"remat={s.remat} {s.optimizer} {s.precision}, {s.batch} rows x {s.window:,} tokens a step"
    )
    sections = [head, _section("memory of a chip", _memory(p))]
    if p.program is not None:
        sections += [
            _section("FLOPs of a step", _flops(p)),
            _section("sent by a chip in a step", _sent(p)),
            _section("roofline", [(k, f"{v:.3f} s") for k, v in p.roofline.items()]),
            _section("prediction", _prediction(p)),
        ]
    took = f"tracing and lowering took {p.lowering:.1f} s, compiling {p.compiling:.1f} s"
    if p.options and chip.platform == "tpu":
        flags = " ".join(f"--{key}={value}" for key, value in p.options.items())
        took += f'\ncompiled with, and to be run with: LIBTPU_INIT_ARGS="{flags}"'
    return "\n\n".join([*sections, took])


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(left) for left, _ in rows)
    return "\n".join([title, *(f"  {left:<{width}}  {right}" for left, right in rows)])


def _gib(count: float) -> str:
    return f"{count / 2**30:8.2f} GiB"


def _memory(p: Plan) -> list[tuple[str, str]]:
    m = p.memory
    fits = "fits" if m.fits else "DOES NOT FIT"
    return [
        ("parameters", _gib(m.parameters)),
        ("optimizer", f"{_gib(m.optimizer)}  {p.settings.optimizer}, and the rest of the run's state"),
        ("temporaries", f"{_gib(m.temporary)}  activations, gradients, gathered weights: the most at one moment"),
        ("batch and program", _gib(m.batch + m.code)),
        ("all", f"{_gib(m.total)}  of {m.capacity / 2**30:.2f} GiB: {fits}"),
        ("largest batch", f"{p.largest_batch:,} rows for certain (as if all temporaries grew with the rows)"),
    ]


def _flops(p: Plan) -> list[tuple[str, str]]:
    assert p.program is not None
    chips = p.topology.chips
    rows = [
        ("formula", f"{p.model_flops:.4g}  6 N a token and all pairs of attention (Chowdhery et al. 2022)"),
        ("formula, causal", f"{p.causal_flops:.4g}  only the pairs that attend"),
        ("compiler", f"{p.program.flops * chips:.4g}  cost_analysis, with every run of a loop, on all chips"),
        ("attention kernels", f"{p.program.kernel_flops * chips:.4g}  by formula: the compiler does not count them"),
    ]
    if p.optimizer_flops:
        counted = p.program.optimizer.flops * chips
        rows.append((p.settings.optimizer, f"{counted:.4g}  of the compiler's; {p.optimizer_flops:.4g} by formula"))
    return rows


def _sent(p: Plan) -> list[tuple[str, str]]:
    assert p.program is not None
    groups: dict[tuple[str, str], list[Collective]] = {}
    for c in p.program.collectives:
        groups.setdefault(("+".join(c.axes), c.kind), []).append(c)
    rows = []
    for (axes, kind), members in sorted(groups.items()):
        sent, hidden = sum(c.sent for c in members), sum(c.sent for c in members if c.hidden)
        rows.append((f"{axes} {kind}", f"{sent / 1e9:10.3f} GB, {hidden / sent:4.0%} beside computation"))
    return rows or [("nothing", "no collectives")]


def _prediction(p: Plan) -> list[tuple[str, str]]:
    assert p.program is not None
    q = p.program
    return [
        ("computation", f"{q.compute:.3f} s  products at {PRODUCTS} of the peak, the rest by the compiler's cycles"),
        ("collectives", f"{q.exposed:.3f} s for which it waits, {q.hidden:.3f} s beside it"),
        ("the optimizer", f"{q.optimizer.seconds:.3f} s of both: {q.optimizer.compute:.3f} s of computation, "
                          f"{q.optimizer.exposed:.3f} s of waiting; it sends {q.optimizer.sent / 1e9:.3f} GB"),
        ("a step", f"{p.seconds:.3f} s = max(computation, beside it) + waiting; "
                   f"{q.slow_seconds:.3f} s by the compiler's cycles for products too"),
        ("tokens", f"{p.tokens_per_second:,.0f} a second and chip"),
        ("MFU", f"{p.mfu:.1%} = formula / (step x chips x {p.topology.chip.peak / 1e12:.0f} TFLOP/s); "
                f"{p.causal_mfu:.1%} with the causal formula; {p.slow_mfu:.1%} by the compiler's cycles"),
    ]  # fmt: skip


def describe_search(found: list[Candidate]) -> str:
    """A ranking as text."""
    lines = ["predicted        MFU    memory   by formula"]
    for c in found[:20]:
        p = c.plan
        if p is None:
            predicted = f"{'not compiled':>26}  "
        elif p.seconds is None:
            predicted = f"{'does not fit':>12}{_gib(p.memory.total):>14}  "
        else:
            predicted = f"{p.seconds:8.3f} s {p.mfu:8.1%}{p.memory.total / 2**30:7.1f}G  "
        lines.append(f"{predicted}{c.estimate.seconds:8.3f} s {c.estimate.memory / 2**30:7.1f}G  {c.name}")
    if len(found) > 20:
        lines.append(f"... and {len(found) - 20} more")
    return "\n".join(lines)


def numbers(p: Plan) -> dict[str, Any]:
    """The numbers of a plan as a JSON object."""
    q = p.program
    return {
        "topology": p.topology.name, "strategy": p.settings.strategy, "mesh": p.settings.mesh,
        "remat": p.settings.remat, "batch": p.settings.batch, "length": p.settings.window,
        "memory": dataclasses.asdict(p.memory), "largest_batch": p.largest_batch,
        "model_flops": p.model_flops, "causal_flops": p.causal_flops, "chip_flops": p.flops,
        "optimizer_flops": p.optimizer_flops, "optimizer": q and {**dataclasses.asdict(q.optimizer),
                                                                  "seconds": q.optimizer.seconds},
        "roofline": p.roofline, "seconds": p.seconds, "mfu": p.mfu, "causal_mfu": p.causal_mfu,
        "compute": q and q.compute, "slow_seconds": q and q.slow_seconds, "hidden": q and q.hidden,
        "exposed": q and q.exposed,
        "tokens_per_second": p.tokens_per_second, "lowering": p.lowering, "compiling": p.compiling,
    }  # fmt: skip


def _ranked(c: Candidate) -> dict[str, Any]:
    guess = {**dataclasses.asdict(c.estimate), "seconds": c.estimate.seconds}
    return {"arguments": c.name, "estimate": guess, "plan": c.plan and numbers(c.plan)}
