"""The forward passes for Hopper and Blackwell, interpreted, against the dense formula in float64."""

import functools

import gpu_interpreter
import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from garrulax.kernels import masks, pallas_gpu
from garrulax.kernels.attention import attention, request
from garrulax.kernels.gpu.block_lists import block_lists
from garrulax.kernels.gpu.forward_sizes import HopperForwardSizes, choose_sizes
from garrulax.kernels.pallas_gpu import GPUAttention

SMALL = GPUAttention(sizes=HopperForwardSizes(block_k=64, stages=2, programs=3), interpret=True)
BLACKWELL = GPUAttention(interpret=True, architecture="sm_100")
BOUND = {jnp.bfloat16: 8e-3, jnp.float16: 1.5e-3}  # of an output that was rounded, of probabilities that were


def assert_output_agrees(mask, shape, *, extras=(), dtype=jnp.bfloat16, kernel=SMALL):
    T, S, H = shape[:3]
    if {"alibi", "relative"} & set(extras):
        mask = cases.with_positions(mask)
    interpreter = gpu_interpreter.interpreted()  # skips before anything is computed
    with jax.enable_x64(True):
        options = {name: x for e in extras for name, x in cases.extra(e, H, T, S).items()}
        rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in cases.inputs(*shape)[:3]]
        dense = functools.partial(attention, mask=mask, implementation="dense", **options)
        expected = np.asarray(dense(*map(jnp.asarray, rounded)))
    options = jax.tree.map(lambda x: np.float32(x) if getattr(x, "dtype", None) == np.float64 else x, options)
    with interpreter:
        ours = jax.jit(functools.partial(attention, implementation=kernel, **options))
        got = np.asarray(ours(*(jnp.asarray(x, dtype) for x in rounded), mask=mask), np.float64)
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= BOUND[dtype] * max(np.abs(expected).max(), 1e-3)


@pytest.mark.parametrize("case", cases.CASES)
def test_masks(case):
    assert_output_agrees(cases.CASES[case](150), (150, 150, 2, 1, 16))


REQUESTS = {
    "softcap": (cases.causal(100), (100, 100, 2, 2, 16), ("softcap", "scale"), jnp.float16),
    "alibi": (cases.window(100), (100, 100, 4, 1, 32), ("alibi", "softcap"), jnp.bfloat16),
    "sinks and dropout": (cases.nothing(100), (100, 100, 2, 1, 16), ("sinks", "dropout"), jnp.bfloat16),
    "bias": (cases.window(100), (100, 100, 2, 1, 16), ("bias",), jnp.float16),
    "a bias for all": (cases.causal(100), (100, 100, 2, 1, 16), ("shared_bias", "softcap"), jnp.bfloat16),
    "a bias of keys": (cases.causal(100), (100, 100, 2, 1, 16), ("key_bias",), jnp.bfloat16),
    "relative positions": (cases.bidirectional(100), (100, 100, 2, 1, 16), ("relative",), jnp.bfloat16),
    "many blocks": (cases.causal(400), (400, 400, 1, 1, 16), (), jnp.bfloat16),
    "cache, values of another width": (cases.cached(70, 200), (70, 200, 4, 2, 32, 48), (), jnp.float16),
    "tree, width that is filled up": (cases.tree(40, 170), (40, 170, 2, 1, 20, 12), (), jnp.bfloat16),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_requests(request_):
    mask, shape, extras, dtype = request_
    assert_output_agrees(mask, shape, extras=extras, dtype=dtype)


def test_sizes_that_are_chosen():
    assert_output_agrees(cases.packed(192), (192, 192, 1, 1, 80), kernel=GPUAttention(interpret=True))


def test_three_warpgroups_where_heads_are_narrow_and_the_mask_has_few_edges():
    x = jax.ShapeDtypeStruct((2, 192, 1, 64), jnp.bfloat16)
    chosen = {}

    def ask(name, mask, *x):
        chosen[name] = choose_sizes(*request(*x, mask, None, None, None, None, None, None, 0.0, None)).warpgroups

    for name, mask in (("all", None), ("causal", masks.causal(2, 192)), ("packed", cases.packed(192))):
        jax.eval_shape(functools.partial(ask, name, mask), x, x, x)
    assert chosen == {"all": 3, "causal": 3, "packed": 2}


# (block_k, stages, warpgroups, own_output, programs), mask, extras
DIVISIONS = {
    "three warpgroups, several rows": ((64, 2, 3, True, 2), cases.causal(400), ()),
    "one slot, streams read after the products": ((64, 1, 3, False, 2), cases.nothing(150), ("alibi", "softcap")),
    "the output in the place of the query": ((64, 1, 2, False, 2), cases.packed(150), ()),
    "a program a row": ((64, 2, 2, False, None), cases.window(150), ("alibi",)),
}


@pytest.mark.parametrize(("sizes", "mask", "extras"), DIVISIONS.values(), ids=DIVISIONS)
def test_divisions_of_the_work(sizes, mask, extras):
    length = next(iter(mask.query.values())).shape[1]
    kernel = GPUAttention(sizes=HopperForwardSizes(*sizes), interpret=True)
    assert_output_agrees(mask, (length, length, 1, 1, 32), extras=extras, kernel=kernel)


ON_BLACKWELL = {
    "rows of many blocks": (cases.causal(500), (500, 500, 1, 1, 64), (), jnp.bfloat16),
    "three streams": (cases.banded_and_strided(150), (150, 150, 1, 1, 128), (), jnp.bfloat16),
    "all pairs": (None, (256, 384, 1, 1, 64), ("scale",), jnp.float16),
    "ALiBi, values of another width": (
        cases.window(200),
        (200, 200, 2, 1, 128, 64),
        ("alibi", "softcap"),
        jnp.bfloat16,
    ),
    "queries without keys": (cases.nothing(200), (200, 200, 1, 1, 64), ("sinks", "dropout"), jnp.bfloat16),
}


@pytest.mark.parametrize("request_", ON_BLACKWELL.values(), ids=ON_BLACKWELL)
def test_requests_on_blackwell(request_):
    mask, shape, extras, dtype = request_
    assert_output_agrees(mask, shape, extras=extras, dtype=dtype, kernel=BLACKWELL)


def test_gradients_on_blackwell_are_those_of_xla():
    """From the lse that the kernel gives."""
    with gpu_interpreter.interpreted():
        cases.assert_agrees(BLACKWELL, cases.packed(150), (150, 150, 2, 1, 64), dtype=jnp.bfloat16, bound=2e-2)


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("by_key", [False, True])
def test_rows(case, by_key):
    """Blocks, counts and order against the mask itself, cut into blocks."""
    mask = cases.CASES[case](96)
    shape = cases.B, 3, 6
    dense = np.broadcast_to(mask.dense(), (cases.B, 96, 96)).reshape(cases.B, 3, 32, 6, 16)
    some, every = dense.any(axis=(2, 4)), dense.all(axis=(2, 4))
    if by_key:
        some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
    query, key = mask.read()
    columns, counts, order = map(np.asarray, block_lists(mask.rule, query, key, 32, 16, shape, by_key=by_key))
    for b, r in np.ndindex(some.shape[:2]):
        whole, count = counts[b, r]
        assert set(np.flatnonzero(some[b, r])) <= set(columns[b, r, :count])
        assert every[b, r, columns[b, r, :whole]].all()
        assert len(set(columns[b, r, :count])) == count
    assert (np.sort(order) == np.arange(order.shape[1])).all()
    assert (np.diff(np.take_along_axis(counts[..., 1], order, 1)) <= 0).all()


def test_rows_of_causal_attention():
    """Nothing is visited that need not be, nothing masked but the diagonal."""
    mask = cases.causal(128)
    query, key = mask.read()
    _, counts, order = block_lists(mask.rule, query, key, 32, 32, (cases.B, 4, 4))
    assert (counts == np.stack([np.arange(4), np.arange(1, 5)], axis=1)).all()
    assert (order == np.arange(4)[::-1]).all()


def test_gradients_with_a_bias_are_those_of_xla():
    with gpu_interpreter.interpreted():
        shape, extras = (100, 100, 2, 1, 16), ("bias", "relative")
        cases.assert_agrees(SMALL, cases.window(100), shape, extras=extras, dtype=jnp.bfloat16, bound=2e-2)


def call_of(dtype, width, interpret, architecture=None, **options):
    x = jnp.zeros((cases.B, 64, 2, width), dtype)
    return attention(x, x, x, implementation=GPUAttention(interpret=interpret, architecture=architecture), **options)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="older jax is refused as a whole")
@pytest.mark.parametrize(
    ("dtype", "width", "interpret", "reason"),
    [
        (jnp.float32, 64, True, "float32"),
        (jnp.bfloat16, 320, True, "320 wide"),
        (jnp.bfloat16, 64, False, "capability 9.0 and 10.0, not 12.0"),
    ],
)
def test_refusals(dtype, width, interpret, reason, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "_capability", lambda: "12.0")
    with pytest.raises(ValueError, match=reason):
        call_of(dtype, width, interpret)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="older jax is refused as a whole")
def test_refusals_on_blackwell(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "_capability", lambda: "10.0")
    with pytest.raises(ValueError, match=r"capability 9\.0, not 10\.0"):
        call_of(jnp.bfloat16, 64, False, "sm_90")
    with pytest.raises(ValueError, match=r"heads \[80\] wide"):
        call_of(jnp.bfloat16, 80, False, "sm_100")
    for options in ({"bias": jnp.zeros((1, 1, 64, 64))}, cases.extra("relative", 2, 64, 64)):
        with pytest.raises(ValueError, match="a bias and relative positions"):
            call_of(jnp.bfloat16, 64, False, "sm_100", mask=cases.with_positions(cases.causal(64)), **options)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="only older jax is refused")
def test_older_jax_is_refused():
    with pytest.raises(ValueError, match=r"jax 0\.11"):
        call_of(jnp.bfloat16, 64, False)
