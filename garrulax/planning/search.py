"""The search for a fast plan: meshes, strategies and remat policies, estimated by formula; the best are compiled."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import mesh_sizes
from garrulax.core.strategies import STRATEGIES, strategy_of
from garrulax.planning.formula import Estimate, estimate
from garrulax.planning.plan import Plan, chosen_settings, compile_plan, rows_unit
from garrulax.planning.topology import Topology, mesh_over, read_topology
from garrulax.train.settings import Settings

#: Estimates up to this many times the memory of a chip are compiled, since they are rough.
SLACK = 1.25
MOST_TENSOR = 16  # beyond that, products get thin and their sums long
_SINGLE = {"ddp": "data", "fsdp": "fsdp"}  # strategies of one axis


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a model on a topology.

    Attributes:
        settings: With mesh, strategy and remat.
        estimate: By formula.
        plan: Compiled; None for those that were not.
    """

    settings: Settings
    estimate: Estimate
    plan: Plan | None = None

    @property
    def name(self) -> str:
        """Strategy, mesh and remat, as arguments of the command."""
        s = self.settings
        return f"--strategy {s.strategy} --mesh {s.mesh} remat={s.remat}"


def search(
    model: str | ModelConfig,
    topology: str,
    *,
    batch: int,
    length: int | None = None,
    strategies: Sequence[str] = tuple(STRATEGIES),
    remats: Sequence[str] = ("none", "dots", "full"),
    compiled: int = 3,
    options: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> list[Candidate]:
    """Ranks the ways to train a model on chips that are not there, the fastest first.

    All candidates are estimated by formula, and the fastest of those that may fit are compiled.

    Args:
        model: Name of a preset, or a Config.
        topology: Such as v5p:8x8x8.
        batch: Rows in a step.
        length: Tokens in a row; None is the model's context.
        strategies: To try.
        remats: Policies to try; a setting `remat` is the only one.
        compiled: How many to compile.
        options: Of the compiler, as in `plan`.
        say: Is told what is being compiled.
        **settings: Other settings of the run.

    Returns:
        The compiled ones that fit, by their predicted time; then the others, by the formula's.

    Raises:
        ValueError: As `plan` does, and if no mesh divides the batch or no candidate fits by the formula.
    """
    config = models.preset(model) if isinstance(model, str) else model
    place = read_topology(topology)
    remats = (settings.pop("remat"),) if "remat" in settings else remats
    choices = list(_choices(config, place, batch, length, strategies, remats, settings))
    if not choices:
        raise ValueError(f"no mesh of {place.chips} chips divides a batch of {batch} rows: choose another batch")
    found = []
    for chosen in choices:
        guess = estimate(config, chosen, place, mesh_over(place, mesh_sizes(chosen.mesh)))
        if guess.memory <= SLACK * place.chip.memory:
            found.append(Candidate(chosen, guess))
    if not found:
        raise ValueError(
            f"nothing fits into {place.name} by the formula: use a smaller batch or length, more chips, or accumulation"
        )
    found.sort(key=lambda c: c.estimate.seconds)
    done: list[Candidate] = []
    for candidate in found[:compiled]:
        say(f"compiling {candidate.name} (by formula {candidate.estimate.seconds:.2f} s a step)")
        done.append(dataclasses.replace(candidate, plan=compile_plan(config, candidate.settings, place, options)))
    return sorted(done, key=_rank) + found[compiled:]


def _rank(c: Candidate) -> float:
    seconds = None if c.plan is None else c.plan.seconds
    return float("inf") if seconds is None else seconds


def _choices(
    config: ModelConfig,
    topology: Topology,
    batch: int,
    length: int | None,
    strategies: Sequence[str],
    remats: Sequence[str],
    settings: Mapping[str, Any],
) -> Iterator[Settings]:
    for name in strategies:
        for sizes in meshes(strategy_of(name).name, topology, config):
            mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
            for remat in remats:
                if batch // settings.get("accumulation", 1) % rows_unit(sizes) == 0:
                    yield chosen_settings(config, topology, batch, length, name, mesh, {**settings, "remat": remat})


def meshes(strategy: str, topology: Topology, config: ModelConfig) -> Iterator[dict[str, int]]:
    """Meshes that a strategy may use: axes whose sizes divide the number of chips, `tensor` also the model's heads."""
    chips = topology.chips
    if strategy in _SINGLE:
        yield {_SINGLE[strategy]: chips}
        return
    divisors = [n for n in range(2, chips) if chips % n == 0]
    tensors = [n for n in divisors if n <= MOST_TENSOR and config.heads % n == 0]
    if strategy == "hsdp":
        yield from ({"data": n, "fsdp": chips // n} for n in divisors)
    elif strategy == "tp":
        yield from ({"data": chips // n, "tensor": n} for n in tensors)
    else:
        yield from ({"fsdp": chips // n, "tensor": n} for n in tensors)
