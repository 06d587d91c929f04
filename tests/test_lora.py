"""LoRA: adapters of PEFT against logits of PEFT 0.21.2 (tests/peft), every family, gradients, training, generation."""

import dataclasses
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import training
from registry import FAMILIES
from safetensors.numpy import load_file, save_file

import garrulax as gx
from garrulax import models
from garrulax.core import lora
from garrulax.core.einsum import einsum, lookup
from garrulax.core.leaf import map_weights
from garrulax.core.lora_rows import by_row
from garrulax.core.lora_specs import adapter_specs, attach
from garrulax.kernels import masks
from garrulax.layers.shifted_attention import shifted_attention
from garrulax.models import parameters
from garrulax.train import loop
from garrulax.train import lora as adapters

pytestmark = pytest.mark.usefixtures("quick_compilation")
PEFT = pathlib.Path(__file__).parent / "peft"
QUICK = ["gpt2-patterns", "gpt2-bias", "llama-dora", "llama-save_modules", "llama-embedding", "llama-tokens"]
SLOW = ["gpt2-attn", "gpt2-rslora_all", "gpt2-dora", "llama-default", "llama-all_linear", "llama-one_layer",
        "llama-lora_bias", "llama-regex"]  # fmt: skip
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.fixture(scope="module")
def reference():
    return np.load(PEFT / "logits.npz")


@pytest.fixture(scope="module")
def bases():
    return {family: gx.load(PEFT / family / "base") for family in ("gpt2", "llama")}


def logits(model, ids):
    """Unstacked and not compiled as a whole: the small programs are the same for all adapters."""
    return np.asarray(models.forward(models.unstack(model.params), jnp.asarray(ids, jnp.int32), model.config)[0])


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_its_logits_and_is_saved_as_it_was(case, reference, bases, tmp_path):
    family, _, case = case.partition("-")
    folder, ids = PEFT / family / case, reference["input_ids"]
    model = gx.load_adapter(bases[family], folder)
    wanted = reference[f"{family}/{case}/logits"]
    assert np.abs(wanted - reference[f"{family}/base_logits"]).max() > 0.01
    np.testing.assert_allclose(logits(model, ids), wanted, atol=1e-5)
    gx.save_adapter(model, tmp_path / "saved")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / "saved", folder))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, name)
    config = (place / "adapter_config.json" for place in (tmp_path / "saved", folder))
    assert len({json.dumps(json.loads(file.read_text()), sort_keys=True) for file in config}) == 1
    if case == "lora_bias":
        with pytest.raises(ValueError, match="lora_bias"):
            gx.merge(model)
    else:
        merged = gx.merge(model)
        np.testing.assert_allclose(logits(merged, ids), wanted, atol=1e-5)
        if (folder / "merged.safetensors").exists():
            gx.save(merged, tmp_path / "merged")
            ours = load_file(tmp_path / "merged" / "model.safetensors")
            for name, tensor in load_file(folder / "merged.safetensors").items():
                np.testing.assert_allclose(ours[name], tensor, atol=1e-6, err_msg=name)


def test_rows_of_a_batch_have_their_own_adapters(reference, bases):
    ids = jnp.asarray(reference["input_ids"], jnp.int32)
    for family, a, b in (("gpt2", "attn", "rslora_all"), ("llama", "default", "all_linear")):
        base = bases[family]
        trees = [gx.load_adapter(base, PEFT / family / case).params for case in (a, b)]
        params = by_row([trees[0], base.params, trees[1]], [0, 1, 2])
        wanted = reference[f"{family}/mixed_logits"]
        np.testing.assert_allclose(logits(base.replace(params=params), ids), wanted, atol=1e-5)
    scanned = jax.jit(models.forward, static_argnums=2)(params, ids, base.config)[0]
    np.testing.assert_allclose(scanned, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="brings weights of its own"):
        by_row([base.params, gx.load_adapter(base, PEFT / "llama" / "save_modules").params], [0, 1])


@pytest.mark.slow
def test_generate_takes_an_adapter_for_every_prompt(bases):
    model = bases["llama"]
    for case in ("default", "all_linear"):
        model = gx.load_adapter(model, PEFT / "llama" / case, name=case)
    prompts, names = [[5, 17, 3], [5, 17, 3], [9, 2]], ["default", None, "all_linear"]
    options = {"max_new_tokens": 8, "seed": [1, 1, 2]}
    together = gx.generate(model, prompts, adapter=names, **options)
    for prompt, name, seed, one in zip(prompts, names, options["seed"], together, strict=True):
        alone = model if name is None else model.adapters[name]
        # Rows with an adapter of their own in a batch of one: one program of another shape for all three
        assert one.tokens == gx.generate(alone, prompt, max_new_tokens=8, seed=seed).tokens, name
    assert together[0].tokens != together[1].tokens
    with pytest.raises(ValueError, match="no adapter 'french': there are default, all_linear"):
        gx.generate(model, prompts[0], adapter="french")
    with pytest.raises(ValueError, match="2 names for 3 prompts"):
        gx.generate(model, prompts, adapter=["default", None])


def randomly_adapted(params, specs, rule, seed=0, **options):
    """Parameters with adapters that change the logits."""
    params = attach(params, specs, rule, 3, 6.0, jax.random.key(seed), **options)

    def filled(w):
        if not isinstance(w, lora.Lora):
            return w
        arrays = {name: getattr(w, name) for name in ("a", "b")}
        drawn = {
            name: 0.1 * jax.random.normal(jax.random.key(x.size + seed), x.shape, x.dtype) for name, x in arrays.items()
        }
        return dataclasses.replace(w, **drawn)

    return map_weights(filled, params)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_multiplies_through_einsum(name):
    config = tiny.CONFIGS[name]
    tokens = jax.ShapeDtypeStruct((1, 4), np.int32)

    def adapted(tokens):  # an adapter is no array: any other product or lookup fails
        params = attach(tiny.params(config), parameters(config), lambda path, s: True, 2, 2.0, jax.random.key(0))
        return models.forward(params, tokens, config)[0]

    assert jax.eval_shape(adapted, tokens).shape == (1, 4, config.vocab)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_weight_of_every_family_can_have_an_adapter(name, tmp_path):
    config = tiny.CONFIGS[name]
    specs, params = parameters(config), tiny.params(config)
    tokens = jnp.array([[3, 1, 2, 5]], jnp.int32)
    model = gx.Model(config, params)
    new = gx.lora(model, rank=2, targets=lambda path, s: True)
    np.testing.assert_array_equal(logits(new, tokens), logits(model, tokens))
    adapted = model.replace(params=randomly_adapted(params, specs, lambda path, s: True))
    unlike = logits(adapted, tokens)
    assert np.abs(unlike - logits(model, tokens)).max() > 1e-3
    np.testing.assert_allclose(unlike, logits(gx.merge(adapted), tokens), atol=3e-5, rtol=1e-4)
    # What a file fuses is written as one pair and read back as its parts.
    matrices = model.replace(params=randomly_adapted(params, specs, "all"), adapter={"r": 3, "lora_alpha": 6})
    gx.save_adapter(matrices, tmp_path / "adapter")
    again = gx.load_adapter(model, tmp_path / "adapter")
    np.testing.assert_allclose(logits(again, tokens), logits(matrices, tokens), atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("product", "shape", "first", "x"),
    [
        ("BTD,DHC->BTHC", (4, 3, 2), 1, (2, 5, 4)),
        ("BTHC,HCD->BTD", (3, 2, 4), 2, (2, 5, 3, 2)),
        ("BTD,VD->BTV", (7, 4), 1, (2, 5, 4)),
        ("lookup", (7, 4), 1, (2, 5)),
    ],
)
def test_products_and_gradients_are_those_of_the_sum(product, shape, first, x):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 4)
        w, a, b = (
            jax.random.normal(k, s, np.float64)
            for k, s in zip(keys, (shape, (*shape[:first], 2), (2, *shape[first:])), strict=False)
        )
        x = jax.random.randint(keys[3], x, 0, 7) if product == "lookup" else jax.random.normal(keys[3], x, np.float64)

        def ours(a, b):
            leaf = lora.Lora(w, a, b, jnp.float32(0.5))
            return lookup(leaf, x) if product == "lookup" else einsum(product, x, leaf)

        def theirs(a, b):
            total = w + 0.5 * jnp.tensordot(a, b, 1)
            return total[x] if product == "lookup" else jnp.einsum(product, x, total)

        np.testing.assert_allclose(jax.jit(ours)(a, b), jax.jit(theirs)(a, b), rtol=1e-12)
        gradients = (jax.jit(jax.grad(lambda *p, f=f: jnp.sum(jnp.sin(f(*p))), (0, 1)))(a, b) for f in (ours, theirs))
        jax.tree.map(lambda g, h: np.testing.assert_allclose(g, h, rtol=1e-10), *gradients)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_gradients_of_a_model_are_those_through_the_merged_weights(family):
    config = tiny.CONFIGS[family]
    specs = parameters(config)
    tokens = jnp.array([[3, 1, 2, 5]], jnp.int32)
    with jax.enable_x64(True):
        params = models.unstack(models.init(config, jax.random.key(0), dtype="float64"))
        rule = ["tokens", "all"] if config.tied else ["tokens", "head", "all"]
        trained, frozen = lora.split(randomly_adapted(params, specs, rule))

        def loss(trained, change):
            return jnp.sum(jnp.sin(models.forward(change(lora.join(trained, frozen)), tokens, config)[0]))

        ours, theirs = (jax.jit(jax.grad(lambda x, f=f: loss(x, f)))(trained) for f in (lambda p: p, lora.merge))
        assert jax.tree.leaves(ours)[0].dtype == np.float64
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9), ours, theirs)


@pytest.mark.slow
def test_on_a_mesh_it_computes_the_same():
    config = tiny.CONFIGS["llama"]
    tokens = jnp.tile(jnp.array([[3, 1, 2, 5]], jnp.int32), (4, 1))
    params = tiny.params(config)
    one = randomly_adapted(params, parameters(config), "all", dora=True)
    wanted = models.forward(one, tokens, config)[0]
    from garrulax.core import sharding

    mesh = gx.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        placed = sharding.place(one, parameters(config), mesh)
        query = placed["blocks"]["attention"]["query"]
        assert query.a.sharding.spec == jax.P(None, "fsdp", None)
        assert query.b.sharding.spec == jax.P(None, None, "tensor", None)
        born = gx.lora(gx.Model(config, sharding.place(params, parameters(config), mesh)), rank=3)
        assert born.params["blocks"]["attention"]["query"].a.sharding.spec[1] == "fsdp"
        found = jax.jit(models.forward, static_argnames="config")(
            placed, jax.device_put(tokens, jax.P(("fsdp",), None)), config
        )[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


# -- Training ---------------------------------------------------------------------------------------------------------

WORDS = ["optimizer=adamw", "lr=0.02", "steps=8", "eval_every=4", "checkpoint_every=4",
         "lora=rank=4,plus=4,whole=ln_f"]  # fmt: skip


def trained(folder, change=0.0, **options):
    run = training.make(folder, WORDS)
    params = models.init(run.config, jax.random.key(3))
    params["tokens"] = params["tokens"].at[0, 0].add(change)
    return loop.train(dataclasses.replace(run, params=params), out=io.StringIO(), **options), params


def test_training_changes_the_adapters_alone(tmp_path):
    result, base = trained(tmp_path / "run")
    run = training.make(tmp_path / "run", WORDS)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = {int(r["step"]): r["valid_loss"] for r in map(json.loads, lines) if "valid_loss" in r}
    assert losses[8] < losses[4] < 5.5
    up = result.params["blocks"]["mlp"]["up"]
    np.testing.assert_array_equal(up.base, base["blocks"]["mlp"]["up"])
    np.testing.assert_array_equal(result.params["tokens"], base["tokens"])
    assert np.abs(up.b).max() > 0
    assert np.abs(result.params["norm"]["scale"] - base["norm"]["scale"]).max() > 0
    size = sum(f.stat().st_size for f in (tmp_path / "run" / "checkpoints" / "8").rglob("*") if f.is_file())
    assert size < 0.8 * sum(x.nbytes for x in jax.tree.leaves(base))
    with pytest.raises(ValueError, match=r"data\.base is"):
        trained(tmp_path / "run", change=1e-4, resume=True)

    about = adapters.read(run.settings.lora).adapter(run.config)
    gx.save_adapter(gx.Model(run.config, result.params, adapter=about), tmp_path / "adapter")
    loaded = gx.load_adapter(gx.Model(run.config, base), tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, result.params)


@pytest.mark.slow
def test_training_goes_on_exactly(tmp_path):
    result, _ = trained(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "8")
    again, _ = trained(tmp_path / "run", resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


def test_lora_plus_moves_b_faster():
    config = tiny.CONFIGS["llama"]
    specs = parameters(config)
    params = jax.eval_shape(lambda: attach(tiny.params(config), specs, "up", 2, 2.0, jax.random.key(0)))
    made = adapter_specs(params, specs)
    pairs = jax.tree.map(lambda s: np.ones(s.shape, np.float32), lora.split(params)[0])
    optimizer = adapters.plus_rates(optax.sgd(1.0), made, 16)
    moved = optimizer.update(pairs, optimizer.init(pairs), pairs)[0]["blocks"]["mlp"]["up"]
    np.testing.assert_allclose(moved["a"], -1)
    np.testing.assert_allclose(moved["b"], -16)


# -- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number of at least 1"),
        ({"rank": 2.5}, "rank=2.5 must be a whole number"),
        ({"alpha": -1}, "alpha=-1 must be a number above 0"),
        ({"alpha": float("nan")}, "alpha=nan must be a number above 0"),
        ({"targets": ["q_prj"]}, "'q_prj' matches no weight of this model: did you mean q_proj"),
        ({"targets": lambda path, s: False}, "the rule chooses no weight"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["tokens"], "dora": True}, "dora is for matrices: leave tokens out"),
    ],
)
def test_what_cannot_be_attached_is_refused(options, message, bases):
    with pytest.raises(ValueError, match=message):
        gx.lora(bases["llama"], **options)


def test_one_adapter_at_a_time(bases):
    model = gx.lora(bases["llama"])
    with pytest.raises(ValueError, match="has adapters already"):
        gx.lora(model)
    with pytest.raises(ValueError, match="has adapters already"):
        gx.load_adapter(model, PEFT / "llama" / "default")
    with pytest.raises(ValueError, match="saving needs plain weights, but the model has LoRA adapters: merge them"):
        gx.save(model, "unused")
    with pytest.raises(ValueError, match="no adapters to merge"):
        gx.merge(bases["llama"])
    with pytest.raises(ValueError, match="no adapter to save"):
        gx.save_adapter(bases["llama"], "unused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weights of the model too"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq' changes"),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"target_parameters": ["x"]}, "target_parameters="),
        ({"a_new_field": 3}, "a_new_field='3' is not implemented"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not implemented"),
        ({"lora_alpha": -4}, "alpha=-4 must be a number above 0"),
        ({"bias": "some"}, "bias='some' must be"),
        ({"modules_to_save": ["norm"]}, "lacks model.layers.0.input_layernorm.weight"),
    ],
)
def test_what_a_file_says_and_we_do_not_know_is_refused(changes, message, bases, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(PEFT / "llama" / "default", folder)
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(ValueError, match=message):
        gx.load_adapter(bases["llama"], folder)


def test_an_adapter_of_another_model_is_refused(bases, tmp_path):
    with pytest.raises(ValueError, match=r"another model: it has model\.layers\.0\.self_attn\.q_proj"):
        gx.load_adapter(bases["gpt2"], PEFT / "llama" / "default")
    folder = tmp_path / "adapter"
    shutil.copytree(PEFT / "llama" / "default", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file(tensors | {name: np.ones((20, 4), np.float32)}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"v_proj.lora_B.weight is \(20, 4\), not \(16, 4\)"):
        gx.load_adapter(bases["llama"], folder)
    del tensors[name]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="only one matrix of its pair"):
        gx.load_adapter(bases["llama"], folder)
    with pytest.raises(FileNotFoundError, match="is not the folder of an adapter"):
        gx.load_adapter(bases["llama"], PEFT / "llama" / "base")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora=rank=0"], "lora: rank=0 must be"),
        (["lora=rnk=4"], "lora=rnk=4: write NAME=VALUE, where NAME is one of rank"),
        (["lora=rank=4", "optimizer=muon"], "optimizer=muon is for matrices"),
        (["lora=rank=4", "optimizer=adamw", "embedding_shrink=0.1"], "embedding_shrink=0.1 does not go with lora"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        training.make("unused", words)


def test_training_all_weights_refuses_leaves(tmp_path):
    run = training.make(tmp_path / "run")
    model = gx.lora(gx.Model(run.config, models.init(run.config, jax.random.key(0))))
    with pytest.raises(ValueError, match="training all weights needs plain weights, but the model has LoRA adapters"):
        loop.train(dataclasses.replace(run, params=model.params), out=io.StringIO())


# -- LongLoRA ---------------------------------------------------------------------------------------------------------


def test_shifted_attention_is_that_of_longlora_without_its_roll(reference):
    q, k, v, wanted = (reference[f"longlora/{name}"] for name in ("q", "k", "v", "out_masked"))
    q, k, v = (jnp.asarray(x).swapaxes(1, 2) for x in (q, k, v))  # [B, T, H, C]
    mask = masks.causal(1, 16)
    mask = dataclasses.replace(mask, query={**mask.query, "position": mask.query["rank"]})
    np.testing.assert_allclose(shifted_attention(q, k, v, mask, 4, {}), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="an even number of heads, not 3"):
        shifted_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3], mask, 4, {})


@pytest.mark.slow
def test_a_model_is_trained_in_groups_and_merged(tmp_path):
    config = dataclasses.replace(tiny.CONFIGS["llama"], kv_heads=2)
    params, tokens = tiny.params(config), jnp.arange(16, dtype=jnp.int32)[None]
    whole, grouped, one = (gx.forward(params, tokens, config, group=group)[0] for group in (0, 4, 64))
    np.testing.assert_allclose(one, whole, atol=1e-6)
    assert np.abs(grouped - whole).max() > 1e-3
    words = [word for word in WORDS if not word.startswith("lora=")]
    words += ["lora=rank=2,targets=query+key+value+out,whole=norm,group=8", "preset=llama-tiny", "model.kv_heads=4"]
    run = training.make(tmp_path / "run", [*words, "model.tied=true", "model.mlp_width=32"])
    base = models.init(run.config, jax.random.key(3))
    result = loop.train(dataclasses.replace(run, params=base), out=io.StringIO())
    assert np.abs(result.params["norm"]["scale"] - base["norm"]["scale"]).max() > 0
    merged = gx.merge(gx.Model(run.config, result.params, adapter={"r": 2}))
    gx.save(merged, tmp_path / "merged")
    assert gx.load(tmp_path / "merged").config == run.config
