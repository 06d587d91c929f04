"""A plan of a training run on chips that are not there: memory, operations, bytes, and the time of a step."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.core.sharding import mesh_sizes
from garrulax.core.strategies import check_strategy, strategy_of
from garrulax.planning.formula import optimizer_flops
from garrulax.planning.lowering import bytes_a_device, lower_step
from garrulax.planning.program import Program, memory_of, read_program
from garrulax.planning.topology import Topology, check_sizes, default_mesh, mesh_over, read_topology
from garrulax.train.batches import check_batch
from garrulax.train.flops import train_flops_per_token
from garrulax.train.settings import Settings

#: Settings of a plan where none are given: those that pods are trained with.
DEFAULTS = {"optimizer": "adamw", "precision": "bfloat16", "remat": "full", "unroll": False}
#: Options of the TPU's compiler under which collectives run beside products. Without them nearly all of them wait on
#: large slices. A run takes them from the environment variable LIBTPU_INIT_ARGS. Pods of others train with the same
#: ones (AI-Hypercomputer/maxtext, configs/tpu/v5p/llama2_70b.sh, and benchmarks/xla_flags_library.py).
OVERLAP = {
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    "xla_tpu_enable_ag_backward_pipelining": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_megacore_fusion_allow_ags": "false",
    "xla_tpu_overlap_compute_collective_tc": "true",
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on one chip.

    Attributes:
        parameters: Of the model.
        optimizer: Of the optimizer, and whatever else the state of a run has.
        batch: Of a batch.
        temporary: Activations, gradients and gathered weights at the moment with the most of them.
        code: The program.
        total: As the compiler plans it: arguments, results that are not written over them, temporaries and code. Parts
            may share memory, so that this is what it needs at most; if it does not fit, what the compiler says.
        capacity: What the chip has.
        fits: Whether the compiler accepts the program.
    """

    parameters: int
    optimizer: int
    batch: int
    temporary: int
    code: int
    total: int
    capacity: float
    fits: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """The predicted memory and time of a training run. Numbers are of one step; bytes and FLOPs are of one chip.

    Attributes:
        config: Of the model.
        settings: Of the run; mesh and strategy are those planned for.
        topology: Planned for.
        memory: Of one chip.
        program: The compiled step; None if it does not fit.
        model_flops: FLOPs of a step on all chips, by the family's formula (`train.flops`): all pairs of tokens count.
        causal_flops: The same, but of a causal mask only the pairs that attend.
        optimizer_flops: FLOPs of the optimizer's products on all chips, by formula: of Muon; others have none.
        lowering: Seconds of tracing and lowering.
        compiling: Seconds of compiling.
        options: Of the compiler.
    """

    config: ModelConfig
    settings: Settings
    topology: Topology
    memory: Memory
    program: Program | None
    model_flops: float
    causal_flops: float
    optimizer_flops: float
    lowering: float
    compiling: float
    options: Mapping[str, str]

    @property
    def flops(self) -> float:
        """FLOPs that a chip executes: products, also those computed again, and attention's kernels."""
        return 0.0 if self.program is None else self.program.flops + self.program.kernel_flops

    @property
    def roofline(self) -> dict[str, float]:
        """Seconds that a step takes at least for its operations, its memory and its collectives."""
        if self.program is None:
            return {}
        chip = self.topology.chip
        return {
            "compute": self.flops / chip.peak,
            "memory": self.program.bytes / chip.bandwidth,
            "interconnect": self.program.hidden + self.program.exposed,
        }

    @property
    def seconds(self) -> float | None:
        """Predicted time of a step; None if it does not fit."""
        return None if self.program is None else self.program.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: `model_flops` / (seconds x chips x peak)."""
        return self._share(self.model_flops, self.seconds)

    @property
    def causal_mfu(self) -> float | None:
        """The same with `causal_flops`."""
        return self._share(self.causal_flops, self.seconds)

    @property
    def slow_mfu(self) -> float | None:
        """`mfu`, if products take as many cycles as the compiler estimates."""
        return self._share(self.model_flops, None if self.program is None else self.program.slow_seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens a second and chip."""
        tokens = self.settings.batch * self.settings.window
        return None if self.seconds is None else tokens / self.seconds / self.topology.chips

    def _share(self, flops: float, seconds: float | None) -> float | None:
        return None if seconds is None else flops / (seconds * self.topology.chips * self.topology.chip.peak)

    @property
    def largest_batch(self) -> int:
        """Rows of the largest batch that fits for certain: as if all temporaries grew with the rows.

        Gathered weights and gradients do not, so that somewhat more may fit: a plan with that batch tells.
        """
        free = self.memory.capacity - (self.memory.total - self.memory.temporary - self.memory.batch)
        unit = rows_unit(mesh_sizes(self.settings.mesh))
        grows = self.memory.temporary + self.memory.batch
        rows = self.settings.batch / self.settings.accumulation * free / grows
        return max(0, int(rows // unit)) * unit * self.settings.accumulation


def plan(
    model: str | ModelConfig,
    topology: str,
    *,
    batch: int,
    length: int | None = None,
    strategy: str = "fsdp",
    mesh: str | None = None,
    options: Mapping[str, str] | None = None,
    **settings: Any,
) -> Plan:
    """Compiles the training step of a model for chips that are not there, and says what it would need.

    Args:
        model: Name of a preset, or a Config.
        topology: Such as v5p:4x4x4, v5e:16x16 or h100:2x8.
        batch: Rows in a step, on all chips together.
        length: Tokens in a row; None is the model's context.
        strategy: A name in `core.strategies.STRATEGIES`.
        mesh: Chips by axis, such as fsdp=64,tensor=8; None is `topology.default_mesh`.
        options: Of the compiler; None is `OVERLAP` on TPUs.
        **settings: Other settings of the run (`train.settings.Settings`), such as remat="dots"; defaults: `DEFAULTS`.

    Raises:
        ValueError: Model, topology, strategy, mesh, batch or length do not exist or do not fit together.
        ImportError: The compiler for these chips is not installed.

    Example:
        >>> import garrulax as gx
        >>> gx.plan("llama2-70b", "v5p:8x8x8", batch=1000)
        Traceback (most recent call last):
        ...
        ValueError: micro-batches of 1000 rows cannot be shared by 512 devices: choose another batch
        >>> p = gx.plan("llama2-70b", "v5p:8x8x8", batch=2048, remat="full")  # doctest: +SKIP
        >>> p.memory.fits, round(p.mfu, 2)  # doctest: +SKIP
    """
    config = models.preset(model) if isinstance(model, str) else model
    place = read_topology(topology)
    chosen = chosen_settings(config, place, batch, length, strategy, mesh, settings)
    return compile_plan(config, chosen, place, options)


def chosen_settings(
    config: ModelConfig,
    topology: Topology,
    batch: int,
    length: int | None,
    strategy: str,
    mesh: str | None,
    settings: Mapping[str, Any],
) -> Settings:
    """The settings to plan for; raises as `plan` does, before anything is compiled."""
    sizes = default_mesh(strategy_of(strategy), topology) if mesh is None else mesh
    text = sizes if isinstance(sizes, str) else ",".join(f"{name}={size}" for name, size in sizes.items())
    window = config.context if length is None else length
    if window > config.max_length:
        raise ValueError(f"length {window:,} is over the model's context of {config.max_length:,} tokens")
    chosen = Settings(**{**DEFAULTS, **settings, "batch": batch, "window": window, "strategy": strategy, "mesh": text})
    found = mesh_sizes(chosen.mesh)
    check_sizes(topology, found)
    check_strategy(strategy, found)
    shape: Any = AbstractMesh(tuple(found.values()), tuple(found))  # before a compiler is looked for
    check_batch(chosen, shape)
    return chosen


def compile_plan(
    config: ModelConfig, settings: Settings, topology: Topology, options: Mapping[str, str] | None = None
) -> Plan:
    """The plan of a run with these settings; arguments and errors as in `plan`."""
    mesh = mesh_over(topology, mesh_sizes(settings.mesh))
    lowered = lower_step(config, settings, topology, mesh)
    held = [bytes_a_device(x) for x in (lowered.state.params, lowered.state, lowered.batch)]
    options = (OVERLAP if topology.chip.platform == "tpu" else {}) if options is None else options
    tokens = settings.batch * settings.window
    formula = float(tokens * train_flops_per_token(config, settings.window))
    visited = keys_visited(config, settings, settings.window)
    attention = 12 * config.heads * config.head_dim * config.layers * visited
    causal = tokens * (train_flops_per_token(config, 0) + attention)
    of_optimizer = float(optimizer_flops(config, settings, mesh) * topology.chips)
    began = time.perf_counter()
    try:
        compiled = lowered.program.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        params, state, arrays = held
        needed = memory_of(str(error), state + arrays)
        if needed is None:
            raise
        temporary = needed - state - arrays
        memory = Memory(params, state - params, arrays, temporary, 0, needed, topology.chip.memory, fits=False)
        elapsed = time.perf_counter() - began
        return Plan(
            config, settings, topology, memory, None, formula, causal, of_optimizer, lowered.seconds, elapsed, options
        )
    elapsed = time.perf_counter() - began
    memory = _memory(compiled.memory_analysis(), held, topology)
    cost = compiled.cost_analysis()
    counted = None if not cost else cost.get("flops")
    program = read_program(compiled.as_text(), counted, topology, mesh, lambda n: keys_visited(config, settings, n))
    return Plan(
        config, settings, topology, memory, program, formula, causal, of_optimizer, lowered.seconds, elapsed, options
    )


def _memory(found: Any, held: list[int], topology: Topology) -> Memory:
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    code = found.generated_code_size_in_bytes
    total = found.argument_size_in_bytes + results + found.temp_size_in_bytes + code
    params, state, batch = held
    return Memory(params, state - params, batch, found.temp_size_in_bytes, code, total, topology.chip.memory, fits=True)


def rows_unit(sizes: Mapping[str, int]) -> int:
    """The number of devices that share the rows of a batch, which must be a multiple of it."""
    return sizes.get("data", 1) * sizes.get("fsdp", 1)


def is_causal(config: ModelConfig) -> bool:
    """Whether a token attends only to earlier ones when the family's default objective is trained."""
    return models.family(config).OBJECTIVE == "causal"


def keys_visited(config: ModelConfig, settings: Settings, given: int) -> float:
    """Keys that a kernel computes a query, a mean over queries and layers.

    Args:
        config: Of the model.
        settings: Of the run.
        given: Keys that the kernel is given: all of a text, or the part of them that one device holds.
    """
    window, attended = settings.window, models.family(config).keys_attended
    reaches = [float(attended(config, layer, window)) for layer in range(config.layers)]
    if is_causal(config):  # a window of w leaves w T - w^2 / 2 pairs of T^2
        reaches = [w - w * w / (2 * window) for w in reaches]
    return sum(reaches) / len(reaches) * given / window
