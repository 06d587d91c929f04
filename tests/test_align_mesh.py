"""Reinforcement learning on eight devices: rollouts, scores and losses are those of one device."""

import contextlib
import json

import jax
import numpy as np
import pytest
from test_align_rl import BANDIT
from tiny import byte_model

import garrulax as gx
from garrulax import models
from garrulax.align import rl, rollouts
from garrulax.align.policy_objectives import policy_objective, policy_params, policy_specs
from garrulax.align.reward_files import save_reward_model
from garrulax.cli import main
from garrulax.core.sharding import make_mesh, place
from garrulax.models import reward
from garrulax.train.batches import on_devices
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")
MESH = "data=2,fsdp=2,tensor=2"
END = 256


def trained(mesh):
    """The losses of four updates of PPO, what was written and its metrics, and the coefficient of the KL."""
    mesh, values = None if mesh is None else make_mesh(mesh), policy_specs(BANDIT, values=True)
    reference = models.init(BANDIT, jax.random.key(3))
    given = policy_params(reference, BANDIT, 0.1, values=True, key=jax.random.key(1))
    settings = Settings(optimizer="adamw", lr=0.01, warmup=0.0, batch=8, window=3, steps=4)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        if mesh is not None:
            reference = place(reference, models.parameters(BANDIT), mesh)
        made = rl.PolicyRollouts(
            rollouts.Prompts([[0, 5], [3]], BANDIT, None, 2), lambda found: [float(s.response[0]) for s in found],
            BANDIT, rl.PolicySettings("ppo", group=1, limit=2, beta=0.1, target_kl=0.5, minibatches=2), 8, 0,
            reference=reference, end_tokens=(), mesh=mesh,
        )  # fmt: skip
        optimizer = make_optimizer(settings, values)
        state = init_state(BANDIT, optimizer, 0, params=given, specs=values, mesh=mesh)
        update = make_train_step(BANDIT, settings, optimizer, policy_objective("ppo"))
        losses, tokens, measured = [], [], []
        for step in range(settings.steps):
            state, batch, metrics = made(state, step, state.params)
            state, seen = update(state, on_devices(batch, mesh, 1))
            losses.append(float(seen["loss"]))
            tokens.append(batch["targets"].tolist())
            measured += metrics.values()
    return losses, tokens, measured, state.params["kl_coefficient"]


@pytest.mark.slow
def test_ppo_on_a_mesh_has_the_losses_of_one_device():
    one, many = trained(None), trained(MESH)
    assert one[1] == many[1]  # the same responses
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(many[2], one[2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(many[3], one[3], rtol=1e-6)
    assert len(many[3].sharding.device_set) == 8


def metrics_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "reward", "kl", "length", "valid_reward", "value_loss", "entropy")
    return [[line[name] for line in lines if name in line] for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "mesh", "more"),
    [
        ("ppo", MESH, ["strategy=fsdp+tp"]),
        ("ppo", "fsdp=4,tensor=2", ["strategy=fsdp+tp+sp", "--lora", "rank=2"]),
        ("grpo", MESH, ["strategy=hsdp"]),
        ("rloo", "data=2,sequence=4", []),
    ],
)
def test_one_command_trains_a_policy_on_a_mesh(method, mesh, more, tmp_path):
    """With a reward model that the mesh holds too."""
    made = byte_model("llama", eos=END, context=64, layers=2)
    gx.save(gx.Model(made.config, made.params, made.tokenizer), tmp_path / "base")
    judge = reward.add_reward_head(made.params, made.config, jax.random.key(1))
    save_reward_model(gx.Model(made.config, judge, made.tokenizer), tmp_path / "reward")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"is {i}"}) for i in range(21)))
    words = ["align", str(tmp_path / "base"), "--method", method, "--data", str(prompts), "--reward",
             str(tmp_path / "reward"), "batch=8", "steps=4", "eval_every=4", "checkpoint_every=2", "lr=0.003",
             "optimizer=adamw", "log_every=1", "warmup=0", *more, "--option=limit=6", "--option=beta=0.05",
             "--option=epochs=2", f"--option=group={1 if method == 'ppo' else 4}"]  # fmt: skip
    found = []
    for name, given in (("one", []), ("many", ["--mesh", mesh])):
        assert main([*words, "--run", str(tmp_path / name), *given]) == 0
        found.append(metrics_of(tmp_path / name))
    for one, many in zip(*found, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-4)
    assert len(found[0][0]) == 2  # records of the loss


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "fsdp=3"], "mesh fsdp=3 needs 3 devices, but there are 8"),
        (["--mesh", "pipeline=2,data=4"], "a policy also writes, which does not run in stages"),
        (["--mesh", "data=8", "batch=4"], "micro-batches of 4 rows cannot be shared by 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(words, message, tmp_path, capsys):
    made = byte_model("gpt", eos=END, context=64, layers=1)
    gx.save(gx.Model(made.config, made.params, made.tokenizer), tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("\n".join([json.dumps({"prompt": "a"})] * 20))
    command = ["align", str(tmp_path / "base"), "--method", "rloo", "--data", str(tmp_path / "prompts.jsonl"),
               "--reward", "json:dumps", "--run", str(tmp_path / "run"), "--option=limit=4", *words]  # fmt: skip
    assert main(command) == 2
    assert message in capsys.readouterr().err
