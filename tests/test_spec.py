"""The Spec tree: layouts there and back, initial values, roles; the product with weight leaves."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.core.einsum import einsum, lookup
from garrulax.core.spec import Spec, Stored, normal, ones, stacked, zeros

NAMES = ("gpt2-tiny", "glm-tiny", "llama-tiny")


def tree_of(name):
    c = gx.preset(name)
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
    np.testing.assert_array_equal(stored.write(parameter, stored_shape), x)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_one_name_and_a_layout_that_inverts(name):
    named = spec.named_specs(tree_of(name))
    names = [n for s in named.values() for n in s.names]
    assert len(names) == len(set(names))
    for s in named.values():
        stored_shape = s.stored_shape or s.layer_shape
        assert math.prod(stored_shape) == math.prod(s.layer_shape)
        x = np.arange(math.prod(stored_shape)).reshape(stored_shape)
        parameter = s.stored.read(x, s.layer_shape)
        assert parameter.shape == s.layer_shape
        np.testing.assert_array_equal(s.stored.write(parameter, stored_shape), x)


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
    one = {"a": Spec((3,), (None,), normal(1.0), Stored("a"))}
    two = {"0": Spec((7,), (None,), normal(1.0), Stored("0")), **one}
    key = jax.random.key(3)
    np.testing.assert_array_equal(spec.init(one, key)["a"], spec.init(two, key)["a"])
    assert not np.array_equal(spec.init(one, key)["a"], spec.init(one, jax.random.key(4))["a"])
    assert not np.array_equal(spec.init({"b": one["a"]}, key)["b"], spec.init(one, key)["a"])


def test_stacking_adds_an_axis_and_names():
    tree = stacked(3, {"w": Spec((2, 4), ("embed", "mlp"), ones, Stored("h.{}.w"))})
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
        Spec((2, 3), ("embed",), zeros, Stored("h.w"))
    with pytest.raises(ValueError, match=r"h\.w: role 'tensor'"):
        Spec((2,), ("embed",), zeros, Stored("h.w"), role="tensor")
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
