"""Floating-point operations, goodput, data wait, profiler traces, trackers, products of low precision."""

import dataclasses
import sys
import time
import types

import jax
import numpy as np
import pytest

from garrulax import models
from garrulax.core import spec
from garrulax.train import flops, trackers
from garrulax.train.objectives import causal_lm
from garrulax.train.profiling import Profiler
from garrulax.train.setting_limits import TRACKERS, profiled
from garrulax.train.settings import Settings
from garrulax.train.usage import Usage

LENGTH = 256  # of the texts; attention is then a fifth of all operations


def small(name):
    """One layer of a preset's model, wide enough that elementwise operations are few."""
    config = models.preset(name)
    names = {f.name for f in dataclasses.fields(config)}
    sizes = {"layers": 1, "width": 128, "heads": 4, "context": LENGTH, "vocab": 512, "head_dim": 32,
             "kv_heads": 2 if config.kv_heads != config.heads else 4}  # fmt: skip
    if "mlp_width" in names and name != "gpt1":
        sizes["mlp_width"] = 320
    return dataclasses.replace(config, **{k: v for k, v in sizes.items() if k in names})


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    ["chatglm2-6b", slow("gpt1"), slow("gpt2"), slow("gpt-neox-20b"), slow("opt-125m"), slow("glm-base"),
     slow("glm-130b"), slow("chatglm-6b"), slow("llama-7b"), slow("qwen2-0.5b"), slow("falcon-7b")],
)  # fmt: skip
def test_flops_are_those_that_xla_counts(name):
    """XLA counts elementwise operations and the scores that the backward pass computes again too: up to 8 % more."""
    config = small(name)
    ids, weights = jax.ShapeDtypeStruct((1, LENGTH), np.int32), jax.ShapeDtypeStruct((1, LENGTH), np.float32)
    batch = {"tokens": ids, "targets": ids, "weights": weights}
    step = jax.jit(jax.value_and_grad(lambda p, b: causal_lm(p, b, config, unroll=True)[0]))
    counted = step.lower(spec.abstract(models.parameters(config)), batch).cost_analysis()["flops"]
    ours = flops.train_flops_per_token(config, LENGTH) * LENGTH
    assert 1 < counted / ours < 1.08
    assert flops.train_flops_per_token(config, LENGTH) > 1.09 * flops.train_flops_per_token(config, 0)


def test_goodput_is_the_share_of_steps_that_did_not_wait(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    usage = Usage(tokens=1000, flops=10**6, peak=1e10)
    clock[0] += 6  # compiling
    usage.waited(0.5)
    clock[0] += 4
    first = usage.record(0.4, 10)  # ten steps in these four seconds
    assert first["goodput"] == pytest.approx(3.5 / 10)
    assert first["data_wait"] == pytest.approx(0.05)
    assert first["tokens_per_second"] == pytest.approx(2500)
    assert (first["flops_per_second"], first["mfu"]) == (pytest.approx(2.5e9), pytest.approx(0.25))
    clock[0] += 10  # saving, and a step of which the time is not known
    second = usage.record(None, 1)
    assert second["goodput"] == pytest.approx(3.5 / 20)
    assert (second["data_wait"], second["mfu"]) == (0, None)
    assert second["peak_memory"] > 1e8


def test_a_trace_has_the_chosen_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with Profiler(profiled("3:5"), tmp_path) as profiler:
        for number in range(1, 8):
            with profiler.step(number):
                calls.append(number)
            if profiler.ends_with(number):
                profiler.finish(())
    assert calls == [1, 2, str(tmp_path), 3, 4, "stop", 5, 6, 7]
    with pytest.raises(KeyError), Profiler(profiled("1:9"), tmp_path) as profiler, profiler.step(1):
        raise KeyError
    assert calls[-2:] == [str(tmp_path), "stop"]  # an error leaves no trace open


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"profile": "5"}, "profile='5' is not like 100:103"),
        ({"profile": "١:٣"}, "profile='١:٣' is not like 100:103"),
        ({"profile": "5:5"}, "is not like"),
        ({"profile": "5:30", "steps": 20}, "beyond the 20 steps"),
        ({"eval_texts": ("a.txt",)}, "eval_texts='a.txt' is not like NAME=SOURCE"),
        ({"trackers": ("mlflow",)}, "trackers=mlflow: choose from wandb, trackio"),
        ({"ema": 1.0}, "ema=1.0 must be at least 0 and below 1"),
        ({"layer_decay": 0.0}, "layer_decay=0.0 must be above 0 and at most 1"),
        ({"z_loss": float("nan")}, "z_loss=nan must be"),
        ({"spike_window": 4}, "spike_window=4 must be at least 8"),
        ({"lr": float("nan")}, "lr=nan must be a finite number"),
        ({"min_lr_ratio": -1.0}, "min_lr_ratio=-1.0 must not be negative"),
        ({"document_blanks": -1.0}, "document_blanks=-1.0 must not be negative"),
        ({"skip_steps": "nan"}, "choose from none, not_finite, spikes"),
    ],
)
def test_settings_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        Settings(**overrides)


def test_trackers_get_every_record(tmp_path, monkeypatch):
    calls = []
    for name in TRACKERS:
        fake = types.ModuleType(name)
        for function in ("init", "log", "finish"):
            setattr(fake, function, lambda *a, _n=name, _f=function, **k: calls.append((_n, _f, a, k)))
        monkeypatch.setitem(sys.modules, name, fake)
    with trackers.Trackers(("wandb", "trackio"), tmp_path / "mine", {"lr": 0.1}) as both:
        both.write(4, {"loss": 2.0, "bits_per_byte": None})
    first = calls[0][3]
    assert (calls[0][:2], first["name"], first["config"]) == (("wandb", "init"), "mine", {"lr": 0.1})
    assert [call[:3] for call in calls[2:]] == [
        ("wandb", "log", ({"loss": 2.0},)), ("trackio", "log", ({"loss": 2.0},)),
        ("wandb", "finish", ()), ("trackio", "finish", ()),
    ]  # fmt: skip
    said = []
    with trackers.Trackers(("wandb", "trackio"), tmp_path / "mine", {}, said.append) as both:
        monkeypatch.setattr(sys.modules["wandb"], "log", lambda *_, **__: 1 / 0)
        both.write(5, {"loss": 1.0})
        both.write(6, {"loss": 1.0})
    assert said == ["no more records for wandb: division by zero; metrics.jsonl has everything"]
    assert [call[1] for call in calls[-3:]] == ["log", "log", "finish"]  # of the other one
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    with pytest.raises(OSError, match="trackers=wandb does not start: division by zero; log in, or leave it out"):
        trackers.Trackers(("wandb",), tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'garrulax\[wandb\]'"):
        trackers.check_trackers(("wandb",))


def test_products_of_int8_are_the_formula():
    """Qwix: round(127.5 a / max |a|), clipped to [-128, 127]; here max |a| is 127.5 / 32."""
    pytest.importorskip("qwix")
    from garrulax.train.quantized import quantized_dot

    rng = np.random.default_rng(0)
    x, w, dy = (np.clip(rng.normal(size=(32, 32)), -3.9, 3.9).astype(np.float32) for _ in range(3))
    for a in (x, w, dy):
        np.fill_diagonal(a, 127.5 / 32)

    def rounded(a):
        return np.clip(np.round(np.float64(a) * 32), -128, 127) / 32

    y, backward = jax.vjp(quantized_dot("int8"), x, w)
    dx, dw = backward(dy)
    np.testing.assert_allclose(y, rounded(x) @ rounded(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, rounded(dy) @ rounded(w).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ dy, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("name", [next(iter(family.PRESETS)) for family in models.FAMILIES])
def test_every_family_computes_with_quantised_products(name, kind):
    pytest.importorskip("qwix")
    from garrulax.train.quantized import quantized

    config = small(name)
    specs = models.parameters(config)
    params = spec.init(specs, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 512, (2, 32)).astype(np.int32)
    batch = {"tokens": ids, "targets": ids, "weights": np.ones((2, 32), np.float32)}

    def gradient(change):
        loss = lambda p: causal_lm(change(p), batch, config)[0]  # noqa: E731
        return spec.named_leaves(jax.jit(jax.grad(loss))(params))

    plain, low = gradient(lambda p: p), gradient(lambda p: quantized(p, specs, kind))
    for name, g in plain.items():
        cosine = np.vdot(g, low[name]) / (np.linalg.norm(g) * np.linalg.norm(low[name]) + 1e-30)
        assert cosine > 0.98 or np.abs(g).max() < 1e-6, name
    changed = [name for name in plain if name.startswith("blocks") and np.any(plain[name] != low[name])]
    assert changed
