"""Plans for chips that are not there: reading compiled programs, and what is refused before anything compiles."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from tpu_compiler import NEEDS_LIBTPU

import garrulax as gx
from garrulax import models
from garrulax.cli import main
from garrulax.planning import hlo, operations, plan, search, topology
from garrulax.planning.program import Computation, Program, memory_of
from garrulax.train.flops import train_flops_per_token
from garrulax.train.objectives import causal_lm
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import abstract_state
from garrulax.train.step import make_train_step


def compiled_step(unroll):
    """The training step of a small model, compiled for one CPU; and the FLOPs of a step by the family's formula."""
    config = dataclasses.replace(
        gx.preset("llama-tiny"), width=256, layers=2, heads=2, kv_heads=2, head_dim=128, mlp_width=1024, vocab=512
    )
    settings = Settings(batch=8, window=128, optimizer="adamw", unroll=unroll)
    optimizer = make_optimizer(settings, models.parameters(config))
    shape = jax.ShapeDtypeStruct((1, 8, 128), jnp.int32)
    batch = {"tokens": shape, "targets": shape, "weights": jax.ShapeDtypeStruct(shape.shape, jnp.float32)}
    step = make_train_step(config, settings, optimizer, causal_lm)
    compiled = step.lower(abstract_state(config, optimizer), batch).compile()
    return compiled, 8 * 128 * train_flops_per_token(config, 128)


@pytest.mark.usefixtures("quick_compilation")
def test_operations_are_those_of_the_compiler_and_of_the_formula():
    """A scanned layer counts as often as it runs; its FLOPs are those of the same step unrolled."""

    def program(compiled):
        module, found = hlo.read_module(compiled.as_text()), []
        for name, times in module.scheduled():
            flops = sum(operations.product_flops(module, name, i) for i in module.computations[name].values())
            found.append(Computation(times, flops, 0, 0, 0, 0))
        return Program(tuple(found), compiled.cost_analysis()["flops"], (), 0.0, 0.0)

    unrolled, formula = compiled_step(True)
    scanned, _ = compiled_step(False)
    exact = unrolled.cost_analysis()["flops"]
    assert scanned.cost_analysis()["flops"] < 0.8 * exact
    assert program(unrolled).flops == pytest.approx(exact, rel=1e-9)
    assert program(scanned).flops == pytest.approx(exact, rel=0.02)
    assert formula == pytest.approx(exact, rel=0.02)


# As TPUs write the product of activations [2, 128, 4, 32] and weights [4, 32, 128]; of [2, 128, 64] and [64, 4, 32]; of
# a batch of 6 products [8, 16] x [16, 24].
CONVOLUTIONS = """HloModule m

%body (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%p)
}

%condition (p: f32[2]) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}

ENTRY %main (a: bf16[2,128,4,32]) -> bf16[2,128,128] {
  %a = bf16[2,128,4,32]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,32,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %c = bf16[2,128,64,1]{2,1,3,0} parameter(2)
  %d = bf16[64,4,32]{2,0,1} parameter(3)
  %e = bf16[6,8,16]{2,1,0} parameter(4)
  %f = bf16[6,16,24]{2,1,0} parameter(5)
  %w = f32[2]{0} parameter(6)
  %loop = f32[2]{0} while(%w), condition=%condition, body=%body
  %over_heads = bf16[2,128,128,1]{2,1,3,0} convolution(%a, %b), window={size=1x4}, dim_labels=0b1f_1io0->0bf1
  %to_heads = bf16[2,128,4,32]{3,1,2,0} convolution(%c, %d), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, \
dim_labels=0bf1_i1o0->0b1f
  ROOT %batched = bf16[6,8,24]{2,1,0} convolution(%e, %f), window={size=6 stride=5 lhs_dilate=6}, \
dim_labels=0bf_0io->0bf
}
"""


def test_products_that_are_written_as_convolutions():
    text = CONVOLUTIONS.replace("bf16[4,32,128]{2,1,0:T(8,128)(2,1)S(1)}", "bf16[4,32,128,1]{2,1,0,3:S(1)}")
    text = text.replace("%d = bf16[64,4,32]{2,0,1}", "%d = bf16[64,4,32,1]{2,0,1,3}")
    module = hlo.read_module(text)
    main = module.computations["main"]
    flops = {name: operations.product_flops(module, "main", i) for name, i in main.items()}
    assert flops["to_heads"] == 2 * (2 * 128) * 64 * (4 * 32)
    assert flops["batched"] == 2 * 6 * 8 * 16 * 24
    assert list(module.scheduled()) == [("main", 1), ("body", 7)]
    assert main["b"].arrays[0].near
    assert operations.memory_bytes(module, "main", main["over_heads"]) == 2 * (2 * 128 * 4 * 32 + 2 * 128 * 128)


def test_what_does_not_fit_is_read_from_the_compilers_message():
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.5G of 15.75G hbm. Exceeded hbm capacity"
    rest = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (321.25G) exceeds"
    )
    assert memory_of(whole, 2**30) == 23.5 * 2**30
    assert memory_of(rest, 2**30) == 322.25 * 2**30
    assert memory_of("INTERNAL: something else", 0) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": "v9:2x2"}, "unknown chip 'v9': choose from v4, v5e, v5p, v6e, h100, h200"),
        ({"topology": "v5e:2x2x2"}, "v5e has 2 dimensions, such as v5e:16x16"),
        ({"topology": "v5e:32x32"}, "larger than a pod, v5e:16x16"),
        ({"topology": "v5p:3x3x3"}, "2 x 2 chips"),
        ({"topology": "v5e"}, "not like v5e:16x16"),
        ({"topology": "h100:1x16"}, "at most 8 GPUs"),
        ({"strategy": "zero"}, "unknown strategy 'zero': choose from ddp"),
        ({"mesh": "fsdp=8"}, "mesh fsdp=8 has 8 devices, but v5e:2x2 has 4 chips"),
        ({"mesh": "fsdp"}, "not like fsdp=4,tensor=2"),
        ({"mesh": "tensor=4"}, "does not use the mesh axis tensor=4"),
        ({"length": 4096}, "length 4,096 is over the model's context of 128 tokens"),
        ({"remat": "some"}, "remat='some': choose from none, dots, full"),
        ({"batch": 6}, "micro-batches of 6 rows cannot be shared by 4 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("'", ".")):
        gx.plan("llama-tiny", **{"topology": "v5e:2x2", "batch": 8, **arguments})


def test_gpus_without_their_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("h100:8", "cuda13"), ("v5e:2x2", "tpu")):
        with pytest.raises(ImportError, match=package):
            topology.mesh_over(topology.read_topology(name), {"fsdp": topology.read_topology(name).chips})


def test_keys_visited_are_those_of_the_dense_mask():
    config = dataclasses.replace(gx.preset("mistral-7b"), window=48, layers=1)
    settings = plan.chosen_settings(config, topology.read_topology("v5e:2x2"), 4, 128, "fsdp", None, {})
    place = jnp.arange(128)
    seen = (place[:, None] >= place[None]) & (place[:, None] - place[None] < 48)
    assert plan.keys_visited(config, settings, 128) == pytest.approx(float(seen.sum(1).mean()), rel=0.02)


@NEEDS_LIBTPU
def test_search_compiles_nothing_that_cannot_fit():
    """By formula: LLaMA-2-70B at a row a chip fits with the outputs of products kept, and not with everything kept."""
    found = search.search("llama2-70b", "v5p:8x8x8", batch=512, strategies=("fsdp", "hsdp"), compiled=0)
    assert found[0].settings.remat == "dots"
    assert found[0].estimate.memory < 95 * 2**30
    with pytest.raises(ValueError, match="no mesh of 4 chips divides a batch of 7 rows"):
        search.search("llama-tiny", "v5e:2x2", batch=7, strategies=("ddp", "fsdp"), compiled=0)
    with pytest.raises(ValueError, match="nothing fits into v5e:2x2 by the formula"):
        search.search("llama2-70b", "v5e:2x2", batch=4, strategies=("fsdp",), compiled=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch=4"], "batch=4: give batch, length, strategy and mesh as --batch"),
        (["--xla", "fast"], "--xla fast is not like OPTION=VALUE"),
        (["model.layers=0"], "layers=0 must be a whole number"),
    ],
)
def test_command_refuses_in_one_line(words, message, capsys):
    assert main(["plan", "llama-tiny", "--topology", "v5e:2x2", "--batch", "8", *words]) == 2
    assert message in capsys.readouterr().err
