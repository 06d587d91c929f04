"""The ParamSpec tree: layouts there and back, initial values, roles; the product with weight leaves."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.core.einsum import einsum, lookup
from garrulax.core.spec import ParamSpec, Stored, normal, ones, stacked, zeros

NAMES = ("gpt2-tiny", "glm-tiny", "llama-tiny", "glm130b", "chatglm", "falcon")


def tree_of(name):
    c = tiny.CONFIGS[name] if name in tiny.CONFIGS else gx.preset(name)
    return models.family(c).parameters(c)


@st.composite
def layouts(draw):
    split = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    order = tuple(draw(st.permutations(range(len(split)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(split) - 1)))) if len(split) > 1 else []
    ends = [0, *cuts, len(split)]
    stored_shape = tuple(math.prod(split[a:b]) for a, b in itertools.pairwise(ends))
    return split, order, stored_shape


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_stored_write_inverts_read(layout):
    split, order, stored_shape = layout
    stored = Stored("x", split, order)
    x = np.arange(math.prod(split)).reshape(stored_shape)
    shape = tuple(split[i] for i in order)
    parameter = stored.read(x, shape)
    np.testing.assert_array_equal(parameter, x.reshape(split).transpose(order))
    again = np.empty_like(x)
    stored.write(parameter, again)
    np.testing.assert_array_equal(again, x)


def test_parameters_fused_in_one_tensor_come_apart_and_together():
    """Falcon's [groups, query heads + key + value, width, D]: a part and single entries of one dimension."""
    x = np.arange(2 * 5 * 3 * 4).reshape(30, 4)
    split = (2, 5, 3, 4)
    query = Stored("x", split, (3, 0, 1, 2), (None, (0, 3)))
    key, value = (Stored("x", split, (2, 0, 1), (None, i)) for i in (3, 4))
    shapes = {query: (4, 2, 3, 3), key: (4, 2, 3), value: (4, 2, 3)}
    again = np.full_like(x, -1)
    for stored, shape in shapes.items():
        stored.write(stored.read(x, shape), again)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(key.read(x, (4, 2, 3)), x.reshape(split)[:, 3].transpose(2, 0, 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_a_layout_that_inverts(name):
    named = spec.named_specs(tree_of(name))
    fused = {}
    for s in named.values():
        fused.setdefault(s.stored.name, []).append(s)
    for specs in fused.values():
        stored_shape = specs[0].stored_shape or specs[0].layer_shape
        x = np.arange(math.prod(stored_shape)).reshape(stored_shape)
        again = np.full_like(x, -1)
        for s in specs:
            assert (s.stored_shape or s.layer_shape) == stored_shape
            parameter = s.stored.read(x, s.layer_shape)
            assert parameter.shape == s.layer_shape
            s.stored.write(parameter, again)
        assert sum(math.prod(s.layer_shape) for s in specs) == x.size
        np.testing.assert_array_equal(again, x)


def test_initial_values_follow_the_spec():
    """GPT-2: embeddings and matrices N(0, 0.02), residual projections smaller by sqrt(2L), norms one, biases zero."""
    c = models.gpt.Config(vocab=512, context=64, width=128, layers=3, heads=4)
    values = {k: np.asarray(v) for k, v in named_arrays(gx.init(c, jax.random.key(0))).items()}
    for path, x in values.items():
        if path.endswith("bias"):
            assert not x.any(), path
        elif path.endswith("scale"):
            assert (x == 1).all(), path
        else:
            std = 0.02 / (6**0.5 if path.endswith(("attention/out", "mlp/down")) else 1)
            assert x.std() == pytest.approx(std, rel=5 / (2 * x.size) ** 0.5), path
            assert x.mean() == pytest.approx(0, abs=5 * std / x.size**0.5), path
    qkv = values["blocks/attention/qkv"]
    assert not np.array_equal(qkv[0], qkv[1])  # every layer draws its own


def named_arrays(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def test_initial_values_depend_on_key_and_path_alone():
    one = {"a": ParamSpec((3,), (None,), normal(1.0), Stored("a"))}
    two = {"0": ParamSpec((7,), (None,), normal(1.0), Stored("0")), **one}
    key = jax.random.key(3)
    np.testing.assert_array_equal(spec.init(one, key)["a"], spec.init(two, key)["a"])
    assert not np.array_equal(spec.init(one, key)["a"], spec.init(one, jax.random.key(4))["a"])
    assert not np.array_equal(spec.init({"b": one["a"]}, key)["b"], spec.init(one, key)["a"])


def test_stacking_adds_an_axis_and_names():
    tree = stacked(3, {"w": ParamSpec((2, 4), ("embed", "mlp"), ones, Stored("h.{}.w"))})
    s = tree["w"]
    assert (s.shape, s.axes, s.layer_shape, s.names) == (
        (3, 2, 4), ("layers", "embed", "mlp"), (2, 4), ("h.0.w", "h.1.w", "h.2.w"),
    )  # fmt: skip
    assert spec.count(tree) == 24
    assert spec.abstract(tree, jnp.bfloat16)["w"] == jax.ShapeDtypeStruct((3, 2, 4), jnp.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_vectors(name):
    """Everything with one axis (two with the stacked one) but nothing else; fused biases have more and are spared."""
    mask, specs = named_arrays(spec.decay_mask(tree_of(name))), spec.named_specs(tree_of(name))
    assert set(mask.values()) == {True, False}
    for path, decays in mask.items():
        assert decays == (not path.endswith(("bias", "scale"))), path
        assert decays == (specs[path].role != "vector"), path


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"h\.w: shape \(2, 3\) and axes \('embed',\)"):
        ParamSpec((2, 3), ("embed",), zeros, Stored("h.w"))
    with pytest.raises(ValueError, match=r"h\.w: role 'tensor'"):
        ParamSpec((2,), ("embed",), zeros, Stored("h.w"), role="tensor")
    with pytest.raises(ValueError, match=r"D is 4 in \(2, 3, 4\) and 5 in \(5, 6\)"):
        einsum("BTD,DF->BTF", jnp.ones((2, 3, 4)), jnp.ones((5, 6)))
    with pytest.raises(ValueError, match="does not fit shapes"):
        einsum("BTD,DF->BTF", jnp.ones((2, 4)), jnp.ones((4, 6)))


@pytest.mark.parametrize(
    "product", ["BTD,DF->BTF", "BTD,DHC->BTHC", "BTD,DnHC->BTnHC", "BTHC,HCD->BTD", "BTD,VD->BTV", "BTHC,HCD->TBD"]
)
def test_einsum_equals_numpy(product):
    sizes = dict(zip("BTDFHCnV", (2, 3, 8, 5, 2, 4, 3, 7), strict=True))
    r = np.random.default_rng(0)
    x, w = (r.normal(size=[sizes[c] for c in term]) for term in product.split("->")[0].split(","))
    got = einsum(product, jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(got, np.einsum(product, x, w), atol=1e-5)


def test_lookup_gives_nan_for_ids_outside_never_another_row():
    table = jnp.arange(6.0).reshape(3, 2)
    got = np.asarray(lookup(table, jnp.array([0, 2, 3, -1])))
    np.testing.assert_array_equal(got[:2], [[0, 1], [4, 5]])
    assert np.isnan(got[2:]).all()
