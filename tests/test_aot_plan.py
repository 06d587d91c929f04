"""Plans that libtpu compiles for chips that are not there: `make test-slow`."""

import dataclasses
import json

import pytest
from tpu_compiler import NEEDS_LIBTPU

import garrulax as gx
from garrulax.cli import main
from garrulax.cli.plan import describe
from garrulax.planning import lowering, plan, topology
from garrulax.planning.program import bandwidth

pytestmark = [pytest.mark.slow, NEEDS_LIBTPU]
#: Without `plan.OVERLAP`: it doubles the time of compiling, and nothing here depends on it.
FAST = {"xla_tpu_enable_async_collective_fusion": "true"}


def test_memory_and_operations_are_those_of_the_compiler():
    config = dataclasses.replace(gx.preset("llama-tiny"), layers=3, width=256, heads=2, kv_heads=1, head_dim=128)
    place = topology.read_topology("v5e:2x2")
    settings = plan.chosen_settings(config, place, 8, 128, "fsdp", None, {"remat": "full"})
    found = plan.compile_plan(config, settings, place, FAST)
    mesh = topology.mesh_over(place, {"fsdp": 4})
    own = lowering.lower_step(config, settings, place, mesh).program.compile(compiler_options=FAST)
    m = own.memory_analysis()
    assert found.memory.temporary == m.temp_size_in_bytes
    assert found.memory.parameters + found.memory.optimizer + found.memory.batch == pytest.approx(
        m.argument_size_in_bytes, rel=0.05
    )  # the compiler pads small arrays
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    code = m.generated_code_size_in_bytes
    assert found.memory.total == m.argument_size_in_bytes + results + m.temp_size_in_bytes + code
    # Attention: 2 products forward, 2 once more because of remat, 5 backward; half of the pairs of 128 x 128.
    a_layer = 2 * (2 + 2 + 5) * 8 * 128 * 2 * 128 * 64
    assert found.program.kernel_flops * 4 == pytest.approx(3 * a_layer)
    assert found.program.counted == own.cost_analysis()["flops"]
    assert found.program.flops > found.program.counted  # two more runs of each loop
    assert {axis for c in found.program.collectives for axis in c.axes} == {"fsdp"}
    assert found.seconds >= max(found.roofline["compute"], found.program.exposed)


def test_the_cost_of_muon_stands_in_the_plan():
    """Its FLOPs are what the compiler counts more than with AdamW, and those of the formula."""
    config = dataclasses.replace(
        gx.preset("llama-tiny"), layers=4, width=512, heads=4, kv_heads=4, head_dim=128, mlp_width=1408
    )
    found = {
        name: gx.plan(config, "v5e:2x2", batch=8, length=128, mesh="fsdp=4", optimizer=name, options=FAST)
        for name in ("adamw", "muon")
    }
    more = found["muon"].program.flops - found["adamw"].program.flops
    muon = found["muon"].program.optimizer
    assert muon.flops * 4 == pytest.approx(found["muon"].optimizer_flops, rel=1e-9)
    assert more == pytest.approx(muon.flops, rel=0.03)
    assert found["adamw"].program.optimizer.flops == found["adamw"].optimizer_flops == 0
    assert 0 < found["adamw"].program.optimizer.seconds < muon.seconds < found["muon"].seconds
    assert muon.sent > found["adamw"].program.optimizer.sent
    text = describe("it", found["muon"])
    assert "of the compiler's" in text
    assert "the optimizer" in text


def test_search_ranks_what_it_compiled_first(capsys):
    words = "--topology v5e:2x2 --batch 8 --search --compile 1 --json --xla xla_tpu_enable_async_collective_fusion=true"
    assert main(["plan", "llama-tiny", *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["plan"]["memory"]["fits"]
    assert all(c["plan"] is None for c in found[1:])
    strategies = {c["arguments"].split()[1] for c in found}
    assert {"fsdp", "hsdp", "tp", "fsdp+tp"} <= strategies


def test_a_batch_that_does_not_fit_says_what_it_needs():
    found = gx.plan("llama3.2-1b", "v5e:2x2", batch=64, length=8192, remat="none", options=FAST)
    assert not found.memory.fits
    assert found.seconds is None
    assert found.memory.total > 16 * 2**30


def test_rings_have_two_links_and_lines_one():
    place = topology.read_topology("v5p:4x4x4")
    mesh = topology.mesh_over(place, {"data": 2, "fsdp": 32})
    assert bandwidth(place, mesh, ("data", "fsdp")) == 6 * place.chip.link  # three rings of 4
    assert bandwidth(place, mesh, ("data",)) == place.chip.link
