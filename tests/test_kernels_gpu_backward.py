"""The backward pass for Hopper, interpreted, against the dense formula in float64."""

import dataclasses

import gpu_interpreter
import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest
import tiny

from garrulax import models
from garrulax.kernels import pallas_gpu, picking
from garrulax.kernels.call import Options
from garrulax.kernels.gpu import backward_keys, backward_queries
from garrulax.kernels.mask import All
from garrulax.kernels.pallas_gpu import GPUAttention
from garrulax.kernels.xla import Chunked
from garrulax.layers import stack

BOUND = {jnp.bfloat16: 1.2e-2, jnp.float16: 2e-3}  # probabilities and gradients of scores are rounded


@dataclasses.dataclass(frozen=True)
class Backward(GPUAttention):
    """The forward pass of another implementation, so that only this one's gradients are in question."""

    def forward(self, options, operands):
        return Chunked().forward(options, operands)


def assert_gradients_agree(mask, shape, *, extras=(), dtype=jnp.bfloat16, kernel=Backward):
    with gpu_interpreter.interpreted():
        cases.assert_agrees(kernel(interpret=True), mask, shape, extras=extras, dtype=dtype, bound=BOUND[dtype])


@pytest.mark.parametrize("case", cases.CASES)
def test_masks(case):
    assert_gradients_agree(cases.CASES[case](150), (150, 150, 2, 1, 16))


WIDE = (144, 128)  # of which one warpgroup's registers hold only one gradient
REQUESTS = {
    "softcap": (cases.causal(100), (100, 100, 2, 2, 16), ("softcap", "scale"), jnp.float16),
    "softcap, alibi": (cases.window(100), (100, 100, 4, 1, 32), ("alibi", "softcap"), jnp.bfloat16),
    "alibi": (cases.packed(150), (150, 150, 4, 2, 16), ("alibi",), jnp.float16),
    "sinks and dropout": (cases.nothing(100), (100, 100, 2, 1, 16), ("sinks", "dropout"), jnp.bfloat16),
    "cache, values of another width": (cases.cached(70, 150), (70, 150, 4, 2, 32, 48), (), jnp.float16),
    "tree, width that is filled up": (cases.tree(40, 170), (40, 170, 2, 1, 20, 12), (), jnp.bfloat16),
    "wide": (cases.sinks_and_window(150), (150, 150, 3, 1, *WIDE), (), jnp.bfloat16),
    "wide, all of it": (cases.infilling(130), (130, 130, 2, 1, *WIDE), ("alibi", "softcap", "dropout"), jnp.bfloat16),
    "wide, nothing": (cases.nothing(130), (130, 130, 2, 2, *WIDE), (), jnp.float16),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests(request_):
    mask, shape, extras, dtype = request_
    assert_gradients_agree(mask, shape, extras=extras, dtype=dtype)


def test_both_passes():
    assert_gradients_agree(cases.packed(130), (130, 130, 4, 1, 64), kernel=GPUAttention)


def test_gradients_of_huge_scores():
    """float32's lowest number is left out: in base 2 it is -inf."""
    with gpu_interpreter.interpreted():
        kernel = GPUAttention(interpret=True)
        cases.assert_huge_scores_agree(kernel, BOUND[jnp.bfloat16], biases=(-1e9, 1e9), dtype=jnp.bfloat16)


@pytest.mark.parametrize("width", range(16, 257, 16))
def test_every_width_has_a_ring(width):
    options = Options(All(), 1.0)
    for value_width in range(16, 257, 16):
        keys, queries = (module.plan(options, width, value_width) for module in (backward_keys, backward_queries))
        assert keys.stages >= 2
        assert queries.key_stages >= 2
        assert queries.value_stages >= 1


def test_layers_share_their_lists(quick_compilation, monkeypatch):
    """However many layers there are, and whatever is computed again, a step sorts the blocks once for each kernel."""

    def forward(options, o, lists, sizes, interpret):
        used = sum(x.sum() for x in lists).astype(o.query.dtype)
        return o.query * used, jnp.zeros((*o.query.shape[::2], o.query.shape[1]), jnp.float32)

    def gradients(options, o, lists, *more):
        used = sum(x.sum() for x in lists).astype(o.query.dtype)
        return (o.key * used, o.value * used) if "by keys" in more else o.query * used

    kernel = GPUAttention(interpret=True)
    monkeypatch.setattr(pallas_gpu, "forward", forward)
    monkeypatch.setattr(backward_keys, "gradients", lambda *arguments: gradients(*arguments, "by keys"))
    monkeypatch.setattr(backward_queries, "gradients", gradients)
    monkeypatch.setattr(picking.Registry, "pick", lambda registry, *request: registry.wrap(kernel))
    config = dataclasses.replace(tiny.CONFIGS["llama"], layers=2, context=600)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params(config))

    def sorts(remat):
        def loss(params, tokens, mask):
            logits, _ = models.forward(params, tokens, config, mask=mask, remat=remat, unroll=True)
            return logits.sum().astype(jnp.float32)

        step = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((2, 600), jnp.int32), cases.packed(600))
        return step.compile().as_text().count(" sort(")

    assert [sorts(remat) for remat in stack.REMAT] == [6, 6, 6]  # of columns and of rows
