"""Collectives read from compiled programs: kinds, mesh axes, bytes and runs that are known beforehand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from garrulax.core.collectives import collectives, table, total
from garrulax.core.sharding import make_mesh

#: Instructions as libtpu writes them, in a module of ours: a gather beside a product in three parts, a scatter as a
#: fusion, and a loop of eight rounds.
TPU = """HloModule jit_step, is_scheduled=true

%start (p: bf16[256,1408]) -> bf16[1024,1408] {
  %p = bf16[256,1408]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[1024,1408]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%async_collective_fusion.2 (p: bf16[256,1408]) -> bf16[1024,1408] {
  %p = bf16[256,1408]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[1024,1408]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.1 (input.1: bf16[2,2048,1024]) -> bf16[2,1024,1024] {
  %input.1 = bf16[2,2048,1024]{2,1,0} parameter(0)
  ROOT %all-reduce.1 = bf16[2,2048,1024]{2,1,0} all-reduce(%input.1), channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%condition (p: (s32[])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(8)
  ROOT %lt = pred[]{:T(512)} compare(%p, %constant.7), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %fusion.1 = bf16[1024,1408]{1,0} fusion(%x), kind=kOutput, calls=%start
  %fusion.2 = bf16[1024,1408]{1,0} fusion(%x), kind=kOutput, calls=%async_collective_fusion.2
  %fusion.3 = bf16[2,1024,1024]{2,1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: s32[]) -> s32[] {
  %while.1 = (s32[]) while(%t), condition=%condition, body=%body
  %all-gather.9 = f32[32]{0} all-gather(%x), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_1'}, dimensions={0}
  %permute = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  %done = f32[8]{0} collective-permute-done(%permute)
}
"""  # noqa: E501


def facts(found):
    return [(c.kind, c.axes, c.bytes, c.times, c.hidden) for c in found]


def test_what_libtpu_writes():
    found = collectives(TPU, {"fsdp": 4, "tensor": 2})
    assert facts(found) == [
        ("all-gather", ("fsdp",), 1024 * 1408 * 2, 8, True),
        ("reduce-scatter", ("tensor",), 2 * 2048 * 1024 * 2, 8, False),
        ("all-gather", ("fsdp", "tensor"), 128, 1, False),
        ("collective-permute", ("fsdp",), 32, 1, True),
    ]
    assert total(found, "all-gather", "fsdp") == 8 * 1024 * 1408 * 2 * 3 / 4 + 128 * 7 / 8
    assert len(table(found)) == 5
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("HloModule empty", {"fsdp": 8})


def test_a_compiled_program_on_eight_devices():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")

    def device(x):  # float32 [4]
        def step(c, _):
            return jax.lax.ppermute(c, "data", [(0, 1), (1, 0)]), None

        x, _ = jax.lax.scan(step, x, None, length=5)
        x = jax.lax.psum(x, ("data", "tensor"))
        x = jax.lax.all_to_all(x.reshape(2, 2), "fsdp", 0, 1, tiled=True).ravel()
        return jax.lax.all_gather(x, "tensor", tiled=True)

    with jax.set_mesh(mesh):
        split = P(("data", "fsdp", "tensor"))
        f = jax.jit(jax.shard_map(device, in_specs=split, out_specs=P("fsdp"), check_vma=False))
        hlo = f.lower(jax.device_put(jnp.zeros(32, jnp.float32), split)).compile().as_text()
    assert {(c.kind, c.axes, c.bytes, c.times) for c in collectives(hlo, mesh.shape)} == {
        ("collective-permute", ("data",), 16, 5),
        ("all-reduce", ("data", "tensor"), 16, 1),
        ("all-to-all", ("fsdp",), 16, 1),
        ("all-gather", ("tensor",), 32, 1),
    }
