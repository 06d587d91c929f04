"""Training goes on from a model that was loaded: its weights, its config, its tokenizer, its format."""

import json
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import garrulax as gx
from garrulax.cli import costs, main
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.models.summary import bytes_of
from garrulax.train import metrics, settings, step
from garrulax.train.activations import saved_per_token

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n\n" for i in range(200))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with a tiny Mistral, which has a chat template, and a text."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = ByteTokenizer()
    tokenizer.config = {"chat_template": "{{ messages[0].content }}"}
    config = gx.preset("mistral-7b-v0.2", vocab=264, context=48, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32,
                       eos=tokenizer.eos, bos=None)  # fmt: skip
    gx.save(gx.Model(config, gx.init(config, jax.random.key(3)), tokenizer), folder / "model")
    (folder / "text.py").write_text(TEXT)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    return tmp_path


def train(model, *words):
    assert main(["train", *([str(model)] if model else []), *map(str, words)]) == 0


def test_it_starts_from_the_weights_and_ends_in_the_same_format(source, cache, capsys):
    run = cache / "run"
    train(source / "model", f"corpus={source / 'text.py'}", "steps=1", "lr=0", "adam_lr=0", "--run", run)
    said = capsys.readouterr().err
    assert f"next: garrulax generate {run} 'return x" in said
    before, after = gx.load(source / "model"), gx.load(run / "model")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert after.config == before.config
    assert json.loads((run / "model" / "config.json").read_text())["model_type"] == "mistral"
    assert after.tokenizer.config["chat_template"] == "{{ messages[0].content }}"
    s, config = settings.read_run_file(run)
    assert (s.optimizer, s.window, s.tokenizer, config) == ("adamw", 48, "model", before.config)
    assert s.preset == str(source / "model")


def test_resuming_is_exact_without_the_source_folder(source, cache, capsys):
    words = [f"corpus={source / 'text.py'}", "lr=1e-3", "warmup=0", "schedule=constant", "window=24", "eval_every=2"]
    shutil.copytree(source / "model", cache / "copy")
    train(cache / "copy", *words, "steps=2", "--run", cache / "parts")
    shutil.rmtree(cache / "copy")
    train(None, "--resume", cache / "parts", "steps=4")
    train(source / "model", *words, "steps=4", "--run", cache / "whole")
    parts, whole = (gx.load(cache / name / "model") for name in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert parts.config == whole.config
    assert parts.tokenizer.config["chat_template"]
    losses = metrics.held_out_losses(metrics.read_metrics(cache / "whole"))
    assert losses == metrics.held_out_losses(metrics.read_metrics(cache / "parts"))
    assert losses[4] < losses[2]
    assert main(["train", "--resume", str(cache / "parts"), "tokenizer=bytes", "steps=5"]) == 2
    assert "goes on with tokenizer=model" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_can_be_trained_further_and_in_bfloat16(source, cache):
    words = [f"corpus={source / 'text.py'}", "window=24", "batch=8", "lr=3e-4", "warmup=0", "schedule=constant"]
    train(source / "model", *words, "steps=1", "--run", cache / "first")
    train(cache / "first", *words, "weights=bfloat16", "steps=24", "eval_every=12", "--run", cache / "second")
    tuned = gx.load(cache / "second" / "model", dtype="stored")
    assert {p.dtype for p in jax.tree.leaves(tuned.params)} == {jnp.dtype("bfloat16")}
    losses = metrics.held_out_losses(metrics.read_metrics(cache / "second"))
    assert losses[24] < losses[12] < metrics.held_out_losses(metrics.read_metrics(cache / "first"))[1]
    train(None, "--resume", cache / "second", "steps=25")
    assert max(metrics.held_out_losses(metrics.read_metrics(cache / "second"))) == 25


def test_stochastic_rounding_keeps_small_updates_in_expectation():
    x = jnp.float32(0.0499) + jnp.linspace(0, 1e-4, 1000)  # bfloat16s are 2.4e-4 apart here
    rounded = jax.vmap(lambda key: step.stochastic_round(x, key))(jax.random.split(jax.random.key(0), 2000))
    assert rounded.dtype == jnp.bfloat16
    values = np.asarray(rounded, np.float64)
    assert len(np.unique(values)) == 2
    np.testing.assert_allclose(values.mean(0), np.asarray(x, np.float64), atol=5 * 2.4e-4 / 2 / np.sqrt(2000))
    exact = jnp.asarray([0.0, 1.0, -2.5, 0.15625], jnp.float32)
    np.testing.assert_array_equal(np.asarray(step.stochastic_round(exact, jax.random.key(1)), np.float32), exact)


def test_what_does_not_fit_is_one_line(source, cache, capsys):
    def refused(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    words = ["train", source / "model", f"corpus={source / 'text.py'}", "--run", cache / "run"]
    assert "belong to their own tokenizer" in refused(*words, "tokenizer=bytes")
    assert "window=64 is longer than model.context=48" in refused(*words, "window=64")
    assert "do not fit the config" in refused(*words, "model.layers=2")
    assert "is the folder of a model: choose another --run" in refused(*words[:-1], source / "model")
    assert "no tokenizer of its own" in refused("train", "gpt2-tiny", "tokenizer=model", f"corpus={source / 'text.py'}",
                                                "--run", cache / "run")  # fmt: skip
    assert "unknown preset 'mistral'" in refused("train", "mistral", "steps=1")
    assert not (cache / "run" / "run.json").exists()
    model = gx.load(source / "model")
    gx.save(model.replace(tokenizer=None), cache / "bare")
    assert "has no tokenizer: give the path" in refused("train", cache / "bare", f"corpus={source / 'text.py'}")


def test_the_example(source, cache, monkeypatch, capsys):
    words = [source / "model", source / "text.py", "--steps", 2, "--window", 24, "--out", cache / "out"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words)])
    runpy.run_path("examples/finetune.py", run_name="__main__")
    assert "held-out loss" in capsys.readouterr().out
    assert gx.load(cache / "out" / "model").config == gx.load(source / "model").config


def test_info_states_memory_and_time(source, capsys):
    assert main(["info", "--train", str(source / "model"), "steps=50", "batch=2", "window=32"]) == 0
    said = capsys.readouterr().out
    count = gx.count(gx.load(source / "model").config)
    assert f"4 x {count:,} (float32)" in said
    assert "50 steps" in said
    assert "2 rows x 32 tokens" in said
    assert "from its own weights" in said
    assert main(["info", str(source / "model"), "steps=50"]) == 2

    s, config = settings.read_settings(None, ["preset=llama3-8b", "optimizer=adamw"])
    c = costs.training_costs(config, s)
    assert c.optimizer == pytest.approx(2 * bytes_of(gx.count(config), "float32"), rel=1e-6)
    half = costs.training_costs(config, settings.read_settings(None, ["preset=llama3-8b", "weights=bfloat16"])[0])
    assert half.parameters * 2 == c.parameters
    assert saved_per_token(config, "full") < saved_per_token(config, "dots") < saved_per_token(config, "none")
