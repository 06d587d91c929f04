"""W8A8 products and SmoothQuant's migration, against their formulas; planned memory of quantised models."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax.cli import main
from garrulax.core import quantised as core
from garrulax.core.einsum import einsum
from garrulax.core.leaf import weights
from garrulax.core.quantised import Quantised
from garrulax.models import parameters
from garrulax.quantisation import grid, smooth
from garrulax.quantisation.planned import planned_bytes

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = gx.preset("llama-tiny", layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, vocab=131, tied=False, eos=None)
IDS = np.random.default_rng(0).integers(0, 131, (2, 9), dtype=np.int32)
AOT = pathlib.Path(__file__).parent / "aot" / "compile_quantised.py"


def with_outliers(params):
    """The same model, whose norms write a few channels fifty times larger, for weights that are as much smaller."""

    def one(path, x):
        name = jax.tree_util.keystr(path)
        if "blocks" not in name or "out" in name or "down" in name:
            return x
        return x.at[:, jnp.array([3, 40])].multiply(50 if "norm" in name else 1 / 50)

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.fixture(scope="module")
def model():
    return gx.Model(CONFIG, with_outliers(gx.init(CONFIG, jax.random.key(0))))


@pytest.mark.parametrize("factors", [None, np.geomspace(0.1, 10, 46).astype(np.float32)])
def test_w8a8_is_its_formula(factors, monkeypatch):
    """Rows of activations and of weights are whole numbers times a scale; their products are summed exactly."""
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=shape).astype(np.float32) for shape in ((75, 46), (5, 46)))
    x[2], x[3, 7] = 0, 100
    coded = grid.nearest(w, "w8a8", -1)
    if factors is not None:
        coded = dataclasses.replace(coded, factors=factors)
    leaf = jax.tree.map(jnp.asarray, coded.leaf((46,), (75,), True, "float32"))
    assert leaf.form.name == "w8a8"
    scaled = x if factors is None else x * factors
    step = np.abs(scaled).max(1, keepdims=True) / np.float32(127)
    whole = np.round(scaled / np.where(step == 0, np.float32(1), step)).astype(np.int64)
    sums = (whole @ coded.codes.astype(np.int64).T).astype(np.float64)
    theirs = sums * step.astype(np.float64) * coded.scale.astype(np.float64).T
    dense = coded.numbers().astype(np.float64)
    assert np.abs(theirs - x @ dense.T).max() > 1e-3 * np.abs(theirs).max()  # the activations are rounded
    for least in (0, 1 << 30):  # by blocks of float32, and in int32
        monkeypatch.setattr(core, "LEAST", least)
        monkeypatch.setattr(core, "BLOCK", 7 * 46)
        y, back = jax.vjp(jax.jit(lambda x: einsum("BTD,DF->BTF", x, leaf)), x[None])
        np.testing.assert_allclose(y[0], theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
        np.testing.assert_allclose(back(y)[0][0], y[0] @ dense, rtol=0, atol=1e-5 * np.abs(y[0] @ dense).max())
    int8 = dataclasses.replace(leaf, form=dataclasses.replace(leaf.form, activations=0))
    plain = core._scaled_after(jnp.asarray(x), int8)  # the form of GPUs
    np.testing.assert_allclose(plain, x @ dense.T, rtol=0, atol=2e-6 * np.abs(theirs).max())
    np.testing.assert_allclose(  # on a mesh, and for other products
        einsum("BTD,DF->BFT", x[None], leaf)[0].T, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max()
    )


def test_factors_are_those_of_the_authors(model):
    """mit-han-lab/smoothquant, smooth.py, in float64: norms are divided by what the weights are multiplied by."""
    params = gx.unstack(model.params)
    moved, kept = smooth.smooth(params, CONFIG, IDS, 0.7)
    assert not kept
    block, new, alpha = params["blocks"][0], moved["blocks"][0], 0.7
    x = np.asarray(params["tokens"], np.float64)[IDS].reshape(-1, 64)
    scale = np.asarray(block["attention_norm"]["scale"], np.float64)
    largest = np.abs(x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale).max(0)
    fcs = [np.asarray(block["attention"][name], np.float64).reshape(64, -1) for name in ("query", "key", "value")]
    of_weights = np.maximum(np.max([np.abs(w).max(1) for w in fcs], axis=0), 1e-5)
    factors = np.maximum(largest**alpha / of_weights ** (1 - alpha), 1e-5)
    np.testing.assert_allclose(new["attention_norm"]["scale"], scale / factors, rtol=1e-5)
    np.testing.assert_allclose(
        np.asarray(new["attention"]["key"]).reshape(64, -1), fcs[1] * factors[:, None], rtol=1e-5
    )
    np.testing.assert_array_equal(new["attention"]["out"], block["attention"]["out"])
    before, after = (gx.forward(p, IDS, CONFIG)[0] for p in (params, moved))
    np.testing.assert_allclose(after, before, atol=2e-6 * np.abs(before).max())


def test_large_channels_survive_smoothquant(model, tmp_path):
    logits = jax.jit(gx.forward, static_argnames="config")
    exact = logits(model.params, IDS, CONFIG)[0]
    options = {"kind": "w8a8", "tables": None}
    plain = gx.quantise(model, **options)
    small = gx.quantise(model, method="smoothquant", calibrate=[list(IDS[0])], **options)
    lost, ours = (jnp.square(logits(m.params, IDS, CONFIG)[0] - exact).mean() for m in (plain, small))
    assert ours < lost / 4
    gx.save(small, tmp_path / "a")
    again = gx.load(tmp_path / "a")
    np.testing.assert_allclose(logits(again.params, IDS, CONFIG)[0], logits(small.params, IDS, CONFIG)[0], atol=1e-5)
    names = {w.form.name for w in weights(again.params) if isinstance(w, Quantised)}
    assert names == {"w8a8"}
    gx.save(small, tmp_path / "b", quantised="garrulax")
    for one, other in zip(weights(gx.load(tmp_path / "b").params), weights(small.params), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["gpt-post", *(pytest.param(n, marks=pytest.mark.slow) for n in tiny.CONFIGS)])
def test_the_migration_changes_no_family(name):
    """Where a residual sum reads the norm too, the weights keep the factors, and the norm stays."""
    config = (
        tiny.CONFIGS[name]
        if name in tiny.CONFIGS
        else gx.preset("gpt2-tiny", layers=2, width=32, heads=2, post_norm=True)
    )
    params = gx.unstack(gx.init(config, jax.random.key(0)))
    ids = IDS % config.vocab
    moved, kept = smooth.smooth(params, config, ids, 0.5)
    if kept:
        for path, factors in kept.items():
            _, i, part, which = path.split("/")
            w = moved["blocks"][int(i)][part][which]
            shape = (-1, *(1,) * (w.ndim - 1))
            moved["blocks"][int(i)][part][which] = w / factors.reshape(shape)
    read_twice = (
        getattr(config, "post_norm", False) or getattr(config, "residual_after_norm", False)
        or not getattr(config, "pre_norm", True) or "glm130b" in type(config).__module__
    )  # fmt: skip
    assert bool(kept) == read_twice
    before, after = (gx.forward(p, ids, config)[0] for p in (params, moved))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_weights_that_keep_factors_compute_the_same():
    config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=131, context=16, post_norm=True, eos=None)
    model = gx.Model(config, gx.init(config, jax.random.key(0)))
    small = gx.quantise(model, "int8", method="smoothquant", calibrate=[list(IDS[0])], alpha=0.8, tables=None)
    assert small.params["blocks"]["attention"]["qkv"].factors is not None
    np.testing.assert_array_equal(
        small.params["blocks"]["attention_norm"]["scale"], model.params["blocks"]["attention_norm"]["scale"]
    )
    exact, ours = (gx.forward(m.params, IDS, config)[0] for m in (model, small))
    np.testing.assert_allclose(ours, exact, atol=0.03 * np.abs(exact).max())


REFUSED = [
    ({"kind": "w8a8", "group": 32}, "group=32: w8a8 has one scale for each row"),
    ({"kind": "w8a8", "symmetric": False}, "w8a8 has no zero points"),
    ({"kind": "w8a8", "method": "gptq", "calibrate": [[1, 2]]}, "makes int8 and int4, not w8a8"),
    ({"kind": "int4", "method": "smoothquant", "calibrate": [[1, 2]]}, "makes w8a8 and int8, not int4"),
    ({"kind": "w8a8", "method": "smoothquant"}, "needs texts"),
    ({"kind": "w8a8", "method": "smoothquant", "calibrate": [[1, 2]], "alpha": 1.5}, "alpha=1.5 must be a share"),
    ({"tables": "w8a8"}, "tables='w8a8' is none of"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_arguments_are_refused(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        gx.quantise(model, **arguments)


@pytest.mark.parametrize("options", [("int4", 32), ("w8a8", None), ("nf4", None, "nf4")])
def test_planned_memory_is_that_of_the_arrays(options):
    kind, group, tables = (*options, "int8")[:3]
    small = gx.quantise(gx.Model(CONFIG, gx.init(CONFIG, jax.random.key(0))), kind, group, tables=tables)
    assert planned_bytes(CONFIG, kind, group, tables) == sum(x.nbytes for x in jax.tree.leaves(small.params))


def test_chatglm_6b_fits(capsys):
    """int4 with a scale a row and a table in 16 bits is ChatGLM's own form; the other is that of `quantise`."""
    config = gx.preset("chatglm-6b")
    assert planned_bytes(config, "int4", -1, None, beside="bfloat16") <= 3.7 * 2**30
    assert planned_bytes(config, "int4") <= 3.7 * 2**30
    assert main(["info", "chatglm-6b"]) == 0
    assert "quantised to int4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "h100"])
def test_accelerators_multiply_int8_numbers(chip):
    """Compiled for chips that are not there: the operands stay int8, and no copy of the weight is made."""
    if chip == "h100":
        pytest.importorskip("jax_cuda13_plugin")
    else:
        pytest.importorskip("libtpu")
    environment = {**os.environ, "PYTHONPATH": str(AOT.parent.parent.parent)}
    command = [sys.executable, str(AOT), chip, "w8a8"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert any(result == "s32" and "s8" in operands for result, _, operands in found["products"]), found
    assert found["temporary"] < 4096 * 11008 // 4


def test_every_reader_of_a_norm_is_known():
    """What a norm writes is read by these matrices and no other, in every family."""
    for name, config in tiny.CONFIGS.items():
        block = parameters(config)["blocks"]
        found = {path for _, path in smooth.readers(block)}
        matrices = {
            (part, key) for part in ("attention", "mlp") for key, s in block[part].items() if s.role == "matrix"
        }
        assert matrices - found == {("attention", "out"), ("mlp", "down")}, name
