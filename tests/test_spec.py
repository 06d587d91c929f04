"""The ParamSpec tree: layouts there and back, initial values, roles; the product with weight leaves."""

import itertools
import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.interpreters.partial_eval import dce_jaxpr
from registry import FAMILIES

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.core.einsum import einsum, lookup
from garrulax.core.layout import bias_pattern, parse_layout
from garrulax.core.spec import Declare, normal, ones, stacked

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("gpt2-tiny", "glm-tiny", "llama-tiny", *FAMILIES)


def tree_of(name):
    return models.parameters(FAMILIES[name].with_all_parts if name in FAMILIES else gx.preset(name))


@st.composite
def layouts(draw):
    """A pattern of einops, with sizes of its letters."""
    letters = [chr(ord("a") + i) for i in range(draw(st.integers(1, 5)))]
    cuts = sorted(draw(st.sets(st.integers(1, len(letters) - 1)))) if len(letters) > 1 else []
    groups = [letters[a:b] for a, b in itertools.pairwise([0, *cuts, len(letters)])]
    first = draw(st.sampled_from(groups))  # the inputs of a weight are the first letters of the parameter
    rest = [letter for letter in letters if letter not in first]
    target = [*draw(st.permutations(first)), *(draw(st.permutations(rest)) if rest else [])]
    left = " ".join(f"({' '.join(group)})" if draw(st.booleans()) or len(group) > 1 else group[0] for group in groups)
    return f"{left} -> {' '.join(target)}", {letter: draw(st.integers(1, 4)) for letter in letters}, len(first)


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_a_layout_reads_as_einops_does_and_write_inverts_it(case):
    pattern, sizes, inputs = case
    layout = parse_layout("x", pattern, sizes, {})
    x = np.arange(math.prod(layout.stored_shape)).reshape(layout.stored_shape)
    used = {letter: size for letter, size in sizes.items() if letter in pattern}
    parameter = layout.read(x)
    np.testing.assert_array_equal(parameter, einops.rearrange(x, pattern, **used))
    assert layout.shape == parameter.shape
    assert layout.inputs == inputs
    again = np.empty_like(x)
    layout.write(parameter, again)
    np.testing.assert_array_equal(again, x)


def test_parameters_fused_in_one_tensor_come_apart_and_together():
    """Falcon's [groups, query heads + key + value, width, D]: a part and single entries of one dimension."""
    x = np.arange(2 * 5 * 3 * 4).reshape(30, 4)
    sizes = {"K": 2, "N": 5, "G": 3, "C": 3, "D": 4}
    query = parse_layout("x", "(K N C) D -> D K G C", sizes, {"N": slice(0, 3)})
    key, value = (parse_layout("x", "(K N C) D -> D K C", sizes, {"N": i}) for i in (3, 4))
    again = np.full_like(x, -1)
    for layout, shape in ((query, (4, 2, 3, 3)), (key, (4, 2, 3)), (value, (4, 2, 3))):
        parameter = layout.read(x)
        assert parameter.shape == layout.shape == shape
        layout.write(parameter, again)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(key.read(x), x.reshape(2, 5, 3, 4)[:, 3].transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("pattern", "parts", "message"),
    [
        ("(H C D -> D H C", {}, "groups on the left side only"),
        ("H C D", {}, "groups on the left side only"),
        ("F D -> (D F)", {}, "groups on the left side only"),
        ("F D F -> D F", {}, "F stands twice on one side"),
        ("F D -> D F D", {}, "D stands twice on one side"),
        ("F X -> X F", {}, "X has no size"),
        ("(H C) D -> D H", {}, "C is on the left side only: say which part is taken of it, such as C=0"),
        ("F D -> D F C", {}, "C is on the right side only"),
        ("(H three C) D -> D H C", {"three": 3}, "three=3 is not an entry of 3"),
        ("(H C) D -> D H C", {"two": 0}, "a part is taken of two"),
        ("(N C) D -> D H C", {"N": slice(0, 3)}, "N=0:3 of 6 needs a letter of that size on the right"),
        ("(N C) D -> D H C", {"N": slice(5, 7)}, "N=5:7 is not a range of 6 entries"),
        ("(H C) D -> C D H", {}, "C, H share a stored dimension and must be the first letters"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_when_it_is_declared(pattern, parts, message):
    with pytest.raises(ValueError, match=rf"h\.w: layout .*{message}"):
        parse_layout("h.w", pattern, {"D": 4, "F": 8, "H": 2, "C": 3, "N": 6}, parts)


@pytest.mark.parametrize("pattern", ["(H three C) D -> D H C", "D (three H C) -> D three H C", "D (H C) -> H C D"])
def test_the_bias_of_a_weight_has_its_outputs(pattern):
    """A bias lies as the product of zeros with the weight, plus the bias, does."""
    assert (
        bias_pattern(pattern)
        == {
            "(H three C) D -> D H C": "(H three C) -> H C",
            "D (three H C) -> D three H C": "(three H C) -> three H C",
            "D (H C) -> H C D": "(D) -> D",
        }[pattern]
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_has_a_layout_that_inverts(name):
    """Parameters that share a stored tensor fill it, without overlap."""
    fused = {}
    for s in spec.named_specs(tree_of(name)).values():
        fused.setdefault(s.name, []).append(s.layout)
    for parts in fused.values():
        x = np.arange(math.prod(parts[0].stored_shape)).reshape(parts[0].stored_shape)
        again = np.full_like(x, -1)
        for layout in parts:
            assert layout.stored_shape == x.shape
            parameter = layout.read(x)
            assert parameter.shape == layout.shape
            layout.write(parameter, again)
        assert sum(math.prod(layout.shape) for layout in parts) == x.size
        np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_reads_every_parameter(family):
    """Of the program of the forward pass, after what no output depends on is removed."""
    config = FAMILIES[family].with_all_parts
    params = jax.eval_shape(lambda key: gx.unstack(gx.init(config, key)), jax.random.key(0))
    assert unread(lambda p, tokens: gx.forward(p, tokens, config)[0], params) == []


def test_a_parameter_that_nothing_reads_is_named():
    """Such as a bias under another name than `layers.mlp.linear` looks for."""
    config = FAMILIES["llama"].config
    params = jax.eval_shape(lambda key: gx.unstack(gx.init(config, key)), jax.random.key(0))
    params["upbias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    forward = lambda p, t: gx.forward({k: v for k, v in p.items() if k != "upbias"}, t, config)[0]  # noqa: E731
    assert unread(forward, params) == ["upbias"]


def unread(f, params):
    jaxpr = jax.make_jaxpr(f)(params, jax.ShapeDtypeStruct((1, 8), jnp.int32)).jaxpr
    leaves = spec.named_leaves(params)
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [name for name, read in zip(leaves, used, strict=False) if not read]


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
    declare = Declare(normal(1.0), D=3, F=7)
    one = {"a": declare.embedding("a", "D -> D")}
    two = {"0": declare.embedding("0", "F -> F"), **one}
    key = jax.random.key(3)
    np.testing.assert_array_equal(spec.init(one, key)["a"], spec.init(two, key)["a"])
    assert not np.array_equal(spec.init(one, key)["a"], spec.init(one, jax.random.key(4))["a"])
    assert not np.array_equal(spec.init({"b": one["a"]}, key)["b"], spec.init(one, key)["a"])


def test_stacking_adds_an_axis_and_names():
    tree = stacked(3, Declare(ones, D=2, F=4).linear("w", "h.{}", "F D -> D F"))
    s = tree["w"]
    assert (s.shape, s.axes, s.layer_shape, s.names) == (
        (3, 2, 4), ("layers", "embed", "mlp"), (2, 4), ("h.0.weight", "h.1.weight", "h.2.weight"),
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
