"""FLOPs of a training step on eight devices, against those of one and the formula of Muon: no work is done twice."""

import functools

import jax
import pytest

from garrulax import models
from garrulax.core.sharding import make_mesh, shardings
from garrulax.models.pipeline import microbatches
from garrulax.planning import hlo, operations
from garrulax.planning.lowering import abstract_batch
from garrulax.train.muon import flops_a_device
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import abstract_state
from garrulax.train.step import OPTIMIZER, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
#: The head has a fifth of the weights: as much as in a model of a billion parameters.
CONFIG = models.llama.Config(
    vocab=1024, context=32, width=64, layers=4, heads=4, kv_heads=4, mlp_width=160, tied=False, eos=None
)
BATCH = 32


@functools.cache
def step_flops(mesh, strategy, optimizer):
    """FLOPs of the products of a step, of all devices together, as often as loops run: all, and the optimizer's."""
    settings = Settings(
        batch=BATCH, window=32, optimizer=optimizer, mesh=mesh, strategy=strategy, unroll=False, remat="none"
    )
    update = make_optimizer(settings, models.parameters(CONFIG))
    step = make_train_step(CONFIG, settings, update, causal_lm)
    devices = make_mesh(mesh or "data=1", jax.devices()[: None if mesh else 1])
    with jax.set_mesh(devices):
        state = abstract_state(CONFIG, update, mesh=devices, strategy=strategy)
        text = step.lower(state, abstract_batch(CONFIG, settings, devices)).compile().as_text()
    module = hlo.read_module(text)
    return [
        devices.size * sum(
            times * operations.product_flops(module, name, i, scope)
            for name, times in module.scheduled()
            for i in module.computations[name].values()
        )
        for scope in ("", OPTIMIZER)
    ]  # fmt: skip


CASES = [
    ("fsdp+tp", "pipeline=4,data=2", "muon"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("ddp", "data=8", "adamw"), ("fsdp", "data=2,fsdp=4", "muon"), ("hsdp", "data=2,fsdp=2,tensor=2", "adamw"),
        ("tp", "data=2,tensor=4", "adamw"), ("fsdp+tp", "fsdp=4,tensor=2", "muon"),
        ("fsdp+tp+sp", "fsdp=4,tensor=2", "muon"), ("fsdp+tp", "fsdp=2,sequence=2,tensor=2", "adamw"),
        ("ddp", "pipeline=2,data=4", "adamw"), ("fsdp", "pipeline=2,fsdp=4", "muon"),
        ("fsdp+tp+sp", "pipeline=2,fsdp=2,tensor=2", "adamw"), ("ddp", "pipeline=4,data=2", "adamw"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "mesh", "optimizer"), CASES)
def test_a_step_of_eight_devices_costs_little_more_than_that_of_one(strategy, mesh, optimizer):
    """In a pipeline S stages also compute in S - 1 rounds in which they have nothing to do."""
    (one, update), (many, updates) = step_flops("", "ddp", optimizer), step_flops(mesh, strategy, optimizer)
    devices, specs = make_mesh(mesh), models.parameters(CONFIG)
    stages = devices.shape.get("pipeline", 1)
    rows = BATCH // (devices.shape.get("data", 1) * devices.shape.get("fsdp", 1))
    parts = microbatches(rows, stages) if stages > 1 else 1
    idle = (parts + stages - 1) / parts
    assert one - update <= many - updates <= 1.1 * idle * (one - update), (many - updates) / (one - update)
    if optimizer == "muon":
        assert update == flops_a_device(specs)
        assert updates == 8 * flops_a_device(specs, shardings(specs, devices, strategy))
        assert update <= updates <= 1.5 * update  # 4, 12 or 16 matrices of a shape are shared by 2 to 8 devices
