"""Steps that are skipped, and moving averages of the parameters."""

import dataclasses
import io
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

from garrulax.train import digests, loop, metrics
from garrulax.train import guard as guard_
from garrulax.train.averaging import next_average
from garrulax.train.settings import Settings
from garrulax.train.weights import read_weights

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")


def test_spikes_are_what_is_far_above_the_latest_steps():
    """A restatement in float64 with a list of the latest values."""
    rng = np.random.default_rng(1)
    losses = rng.normal(3, 0.1, 60)
    norms = rng.normal(1, 0.2, 60)
    losses[[3, 25, 26]], norms[[30, 41]], losses[50] = 9.0, 7.0, np.nan
    guard = guard_.first_guard(Settings(skip_steps="spikes", spike_window=16))
    judge = jax.jit(lambda g, a, b: guard_.judge(g, a, b, 4.0))
    latest, skipped, in_a_row = [], 0, 0
    for loss, norm in zip(losses, norms, strict=True):
        now = np.array(latest[-16:])
        limits = now.mean(0) + 4 * now.std(0) if len(now) >= 8 else np.full(2, np.inf)
        expected = bool(np.isfinite(loss) and loss <= limits[0] and norm <= limits[1])
        counts, guard, said = judge(guard, jnp.float32(loss), jnp.float32(norm))
        assert bool(counts) == expected
        np.testing.assert_allclose([said["loss_limit"], said["norm_limit"]], limits, rtol=1e-4)
        latest += [(loss, norm)] * expected
        skipped, in_a_row = skipped + (not expected), 0 if expected else in_a_row + 1
        assert (int(guard.skipped), int(said["in_a_row"])) == (skipped, in_a_row)
    assert skipped >= 5  # not step 3: there are too few steps before it
    why = guard_.why_skipped({"loss": np.nan, "grad_norm": 7.0, "guard": {"loss_limit": 3.0, "norm_limit": 1.5}})
    assert why == "loss nan and gradient norm 7 above 1.5"


def test_average_forgets_the_first_parameters():
    values = np.random.default_rng(0).normal(size=(30, 4))
    average, expected = {"w": jnp.zeros(4, jnp.float32)}, np.zeros(4)
    for n, value in enumerate(values):
        average = next_average(average, {"w": jnp.asarray(value, jnp.bfloat16)}, jnp.int32(n), 0.7)
        rate = min(0.7, (1 + n) / (10 + n))
        expected = rate * expected + (1 - rate) * np.float64(jnp.asarray(value, jnp.bfloat16))
    np.testing.assert_allclose(average["w"], expected, rtol=1e-5)
    assert average["w"].dtype == jnp.float32


class Spoiled:
    """A tiny run, in which the weights of some steps are not numbers; it exports, writes, and has a second text."""

    def __init__(self, folder, overrides, bad):
        self.run = training.make(folder, ["optimizer=adamw", "log_every=1", *overrides])
        right = self.run.data.batch_at

        def batch_at(step):
            batch = right(step)
            return {**batch, "weights": batch["weights"] * np.float32(np.nan)} if step + 1 in bad else batch

        data = dataclasses.replace(self.run.data, batch_at=batch_at, eval_texts={"again": self.run.data.held_out})
        self.exported: list[int] = []
        self.run = dataclasses.replace(
            self.run, data=data, export=lambda params, step: self.exported.append(step),
            write_samples=lambda params: [("The jay", f" laughs {params['tokens'].shape[0]} times")],
        )  # fmt: skip

    def train(self, **options):
        out = io.StringIO()
        return loop.train(self.run, out=out, **options), out.getvalue()


def test_a_run_skips_bad_steps_logs_them_and_goes_on_exactly(tmp_path):
    options = ["skip_steps=not_finite", "ema=0.5", "checkpoint_every=3", "eval_every=100",
               "export_every=2", "sample_every=4"]  # fmt: skip
    first = Spoiled(tmp_path / "whole", options, {3, 5})
    whole, said = first.train()
    assert "step 3 skipped: loss nan and gradient norm nan" in said
    records = metrics.read_metrics(tmp_path / "whole")
    assert [r["step"] for r in records if r.get("skipped")] == [3, 5]
    rates = {r["step"]: r["lr"] for r in records if "lr" in r}
    assert rates[4] == rates[3]  # the schedule waits: a skipped step is no update
    assert first.exported == [2, 4, 6]
    assert [(r["step"], r["prompt"], r["sample"]) for r in records if "sample" in r] == [
        (4, "The jay", " laughs 264 times")
    ]
    (loss,) = [r["valid_loss/again"] for r in records if "valid_loss/again" in r]
    assert loss == whole.evaluation.loss
    part = Spoiled(tmp_path / "part", options, {3, 5})
    saves = loop.Checkpoints.save

    def save_then_die(self, state, step, loss=None):
        saves(self, state, step, loss)
        raise KeyboardInterrupt

    with unittest.mock.patch.object(loop.Checkpoints, "save", save_then_die), pytest.raises(KeyboardInterrupt):
        part.train()
    resumed, _ = part.train(resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    # What is evaluated, returned and read back is the average, not the parameters.
    assert resumed.evaluation.loss == whole.evaluation.loss
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / "whole", 6)[1], whole.params)
    files = [p for p in (tmp_path / "whole/checkpoints/6").rglob("*") if p.is_file() and p.name != digests.NAME]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 4]))
    with pytest.raises(digests.DamagedError, match=victim.name):
        read_weights(tmp_path / "whole", 6)


def test_too_many_skipped_steps_stop_a_run(tmp_path):
    with pytest.raises(loop.Diverged, match="step 3: 2 steps in a row were skipped, the last for its loss nan"):
        Spoiled(tmp_path, ["skip_steps=not_finite", "most_skipped=2"], {2, 3, 4}).train()
