"""GPT-1's tasks: the original's numbers, its inputs and its dropout; and that every head learns."""

import dataclasses
import functools
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import FOLDER, relative_error
from safetensors.numpy import load_file

import garrulax as gx
from garrulax import models
from garrulax.core import spec
from garrulax.core.sharding import make_mesh
from garrulax.models import heads
from garrulax.train import tasks
from garrulax.train.batches import on_devices
from garrulax.train.objectives import negative_log_likelihood
from garrulax.train.optimizers import make_optimizer
from garrulax.train.settings import Settings
from garrulax.train.state import abstract_state, init_state
from garrulax.train.step import make_train_step

Z = np.load(FOLDER / "gpt1_tasks_s0.npz")
CONFIG = models.gpt.Config(vocab=93, context=24, width=32, layers=3, heads=4, post_norm=True, bos=None, eos=None)
CONTROL = tasks.ControlTokens(90, 91, 92)
CONTRACT = 2e-6
HEAD = {"classification": 3, "entailment": 3, "similarity": 3, "multiple_choice": 1}
PREFIX = {"multiple_choice": "mc"}


pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def reference(outputs):
    """The trunk, whose tensors have no prefix, with one of the two heads."""
    stored = load_file(FOLDER / "gpt1_tasks_s0.safetensors")

    def one(s):
        parts = [s.layout.read(stored[name.removeprefix("transformer.")]) for name in s.names]
        return jnp.asarray(np.stack(parts) if s.layers else parts[0])

    head = {"weight": stored[f"clf{outputs}_w"], "bias": stored[f"clf{outputs}_b"]}
    return {**spec.map_specs(one, models.gpt.parameters(CONFIG)), "classifier": jax.tree.map(jnp.asarray, head)}


def reference_batch(task):
    name = PREFIX.get(task, task)
    if task == "similarity":
        tokens = np.stack([Z["sim_X1"], Z["sim_X2"]], axis=1)
        last = (tokens == CONTROL.classify).argmax(-1)
        return {"tokens": tokens, "weights": (np.arange(24) <= last[..., None]).astype(np.float32)}
    shape = (len(Z[f"{name}_y"]), -1, 24)
    tokens, labels = Z[f"{name}_X"].astype(np.int32).reshape(shape), Z[f"{name}_y"].astype(np.int32)
    return {"tokens": tokens, "weights": Z[f"{name}_M"].reshape(shape), "labels": labels}


@functools.partial(jax.jit, static_argnums=2)
def everything(p, batch, task):
    """Logits, losses of the examples, and by what the language model chooses from its losses and the objective."""
    x = tasks.hidden_states(p, batch, CONFIG)
    logits = tasks.task_logits(p, x, batch, task)
    lm = {outputs: tasks.lm_losses(p, x, batch, CONFIG, outputs).reshape(-1) for outputs in tasks.LM_OUTPUTS}
    objective = {
        outputs: tasks.make_objective(task, lm_outputs=outputs)(p, batch, CONFIG) for outputs in tasks.LM_OUTPUTS
    }
    return logits, negative_log_likelihood(logits, batch["labels"]), lm, objective


@pytest.mark.parametrize("task", ["classification", "entailment", "multiple_choice"])
def test_logits_and_losses_equal_the_original(task, table):
    name, batch = PREFIX.get(task, task), reference_batch(task)
    logits, losses, lm, objective = everything(reference(HEAD[task]), batch, task)
    errors = [relative_error(logits, Z[f"{name}_logits"]), relative_error(losses, Z[f"{name}_clf_loss"])]
    for theirs, ours in (("openai", "matrix"), ("vocab", "vocabulary")):
        loss, metrics = objective[ours]
        errors.append(relative_error(lm[ours], Z[f"{name}_lm_{theirs}"]))
        errors.append(relative_error(loss, Z[f"{name}_total_{theirs}"]))
        np.testing.assert_allclose(metrics["task_loss"] + 0.5 * metrics["lm_loss"], loss, rtol=1e-6)
        assert metrics["tokens"] == len(logits)
        assert metrics["correct"] == (Z[f"{name}_logits"].argmax(-1) == batch["labels"]).sum()
    table("GPT-1", "full", max(errors))
    assert max(errors) <= CONTRACT


def test_similarity_adds_the_states_of_both_orders():
    batch = reference_batch("similarity")
    assert relative_error(tasks.predict(reference(3), batch, CONFIG, "similarity"), Z["sim_logits"]) <= CONTRACT
    swapped = {k: v[:, ::-1] for k, v in batch.items()}
    assert relative_error(tasks.predict(reference(3), swapped, CONFIG, "similarity"), Z["sim_logits"]) <= CONTRACT


@pytest.mark.parametrize("task", HEAD)
def test_inputs_equal_the_original(task):
    """The reference batches, put together again from the texts in them."""
    expected = reference_batch(task)
    examples = []
    for rows, weights in zip(expected["tokens"], expected["weights"], strict=True):
        texts = []
        for row, weight in zip(rows, weights, strict=True):
            inner = row[weight > 0][1:-1]
            cuts = np.flatnonzero(inner == CONTROL.delimiter)
            texts.append(np.split(inner, cuts)[0].tolist())
            texts += [part[1:].tolist() for part in np.split(inner, cuts)[1:]]
        examples.append(texts[:2] + texts[3::2] if task == "multiple_choice" else texts[:2])
    got = tasks.make_batch(task, examples, [0] * len(examples), CONTROL, 24)
    np.testing.assert_array_equal(got["tokens"], expected["tokens"])
    np.testing.assert_array_equal(got["weights"], expected["weights"])


def test_long_texts_keep_their_beginning():
    """Of two texts 254 tokens each at a length of 512: the original's n_ctx // 2 - 2."""
    long, short = list(range(5, 400)), [1, 2]
    (row,) = tasks.sequences("entailment", [long, short], CONTROL, 512)
    assert row == [90, *long[:254], 91, 1, 2, 92]
    assert len(tasks.sequences("entailment", [long, long], CONTROL, 512)[0]) == 511
    assert tasks.sequences("classification", [long], CONTROL, 6) == [[90, 5, 6, 7, 8, 92]]
    assert tasks.sequences("classification", [[]], CONTROL, 6) == [[90, 92]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tasks.sequences("cloze", [[1]], CONTROL, 9), "unknown task 'cloze': choose from classification"),
        (lambda: tasks.sequences("entailment", [[1]], CONTROL, 9), "is a premise and a hypothesis, not 1 texts"),
        (lambda: tasks.sequences("multiple_choice", [[1], [2]], CONTROL, 9), "at least two answers, not 2 texts"),
        (lambda: tasks.sequences("similarity", [[1], [2]], CONTROL, 4), "length=4 is too short for two texts"),
        (lambda: tasks.make_batch("classification", [[[1]]], [0, 1], CONTROL, 9), "1 examples and 2 labels"),
        (lambda: tasks.make_batch("classification", [[[1]]], [-1], CONTROL, 9), "labels"),
        (lambda: tasks.make_batch("multiple_choice", [[[1], [2], [3]]], [2], CONTROL, 9), "labels"),
        (
            lambda: tasks.make_batch("multiple_choice", [[[1], [2], [3]], [[1]] * 4], [0, 0], CONTROL, 9),
            "same number of choices",
        ),
        (lambda: tasks.make_objective("ranking"), "unknown task 'ranking'"),
        (lambda: tasks.make_objective("similarity", lm_outputs="all"), "unknown lm_outputs 'all'"),
        (lambda: tasks.make_objective("similarity", head_dropout=1.0), "head_dropout=1.0"),
        (
            lambda: tasks.hidden_states({}, {"tokens": np.zeros((1, 1, 25), int)}, CONFIG),
            "25 tokens are longer than the model's context=24",
        ),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_matrix_is_the_tied_one():
    untied = dataclasses.replace(CONFIG, tied=False)
    with pytest.raises(ValueError, match="needs a tied output"):
        tasks.lm_losses({}, jnp.zeros((3, 1, 24, 32)), reference_batch("entailment"), untied, "matrix")


def test_added_tokens_leave_the_model_as_it_was():
    small = dataclasses.replace(CONFIG, vocab=90, layers=1, tied=False)
    params = gx.init(small, jax.random.key(0))
    wide, config = heads.add_tokens(params, small, 3, jax.random.key(1))
    assert config.vocab == 93
    assert tasks.ControlTokens.of(config) == CONTROL
    assert jax.tree.map(jnp.shape, wide) == spec.map_specs(lambda s: s.shape, models.gpt.parameters(config))
    tokens = jnp.arange(20).reshape(2, 10)
    forward = jax.jit(gx.forward, static_argnums=2)
    np.testing.assert_array_equal(forward(wide, tokens, config)[0][..., :90], forward(params, tokens, small)[0])
    for name in ("tokens", "head"):
        assert 0.01 < np.std(wide[name][90:]) < 0.03
    assert not np.array_equal(wide["tokens"][90:], wide["head"][90:])
    assert gx.count(gx.preset("gpt1", vocab=40478 + 3)) == 116_537_088  # the original's body for fine-tuning


def test_the_head_s_dropout_is_one_for_all_choices():
    """Equal choices stay equal under dropout; and what stays is scaled so that the mean does."""
    p = {"weight": jnp.ones((64, 1)), "bias": jnp.zeros(1)}
    states = jnp.broadcast_to(jnp.arange(1.0, 201)[:, None, None], (200, 2, 64))
    logits = heads.head_logits(states, p, choose=True, rate=0.3, key=jax.random.key(0))
    np.testing.assert_array_equal(logits[:, 0], logits[:, 1])
    kept = np.asarray(logits[:, 0] * 0.7 / jnp.arange(1.0, 201))
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    assert len(set(kept.round())) > 5  # every example has its own
    assert abs(kept.mean() / 64 - 0.7) < 4 * np.sqrt(0.3 * 0.7 / (64 * 200))
    np.testing.assert_array_equal(heads.head_logits(states, p, choose=True)[:, 0], 64 * jnp.arange(1.0, 201))


def test_embedding_dropout_falls_on_the_matrix():
    """A dropped entry is 0 wherever its token stands, and in the rows that give the logits."""
    c = models.gpt.Config(
        vocab=9, context=8, width=128, layers=1, heads=1, embedding_dropout=0.5, attention_dropout=0.0,
        residual_dropout=0.0, post_norm=True,
    )  # fmt: skip
    params, key = gx.init(c, jax.random.key(0)), jax.random.key(1)
    dropped, without = tasks._with_embedding_dropout(params, c, jax.random.split(key, 3)[0])
    assert without == dataclasses.replace(c, embedding_dropout=0.0)
    for name in ("tokens", "positions"):
        before, after = params[name], dropped[name]
        assert abs((after == 0).mean() - 0.5) < 0.05
        np.testing.assert_allclose(after, jnp.where(after == 0, 0, 2 * before))
    head = {"classifier": {"weight": jnp.ones((128, 2)), "bias": jnp.zeros(2)}}
    batch = {"tokens": np.full((1, 1, 8), 3), "weights": np.ones((1, 1, 8)), "labels": np.zeros(1, int)}
    loss = jax.jit(tasks.make_objective("classification", head_dropout=0.0), static_argnums=2)
    with_key, _ = loss(params | head, batch, c, key)
    assert with_key == pytest.approx(float(loss(dropped | head, batch, without)[0]), rel=1e-6)
    assert with_key != pytest.approx(float(loss(params | head, batch, without)[0]), rel=1e-3)


def example(task, rng):
    """Texts of letters of two kinds (ids 0..9 and 10..19), whose kinds decide; chance is 1/2, for entailment 1/3."""
    kinds = rng.integers(0, 2, 3)

    def text(kind):
        return (rng.integers(0, 10, rng.integers(2, 5)) + 10 * kind).tolist()

    if task == "classification":
        return [text(kinds[0])], kinds[0]
    if task == "multiple_choice":
        answers = [text(0), text(1)]
        return [text(kinds[0]), *(answers if kinds[1] else answers[::-1])], int(kinds[0] != kinds[1])
    label = int(kinds[0] == kinds[1])
    if task == "entailment":  # which of the three: same, first kind then second, or the other way round
        label += int(kinds[0] > kinds[1]) * 2
    return [text(kinds[0]), text(kinds[1])], label


def examples(task, rng, count):
    texts, labels = zip(*(example(task, rng) for _ in range(count)), strict=True)
    return texts, labels


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [task if task == "multiple_choice" else pytest.param(task, marks=pytest.mark.slow) for task in HEAD]
)
def test_every_head_learns(task):
    rng = np.random.default_rng(0)
    small = models.gpt.Config(vocab=20, context=16, width=32, layers=2, heads=2, post_norm=True, init_std=0.1)
    params, config = heads.add_tokens(gx.init(small, jax.random.key(0)), small, 3, jax.random.key(1))
    control = tasks.ControlTokens.of(config)
    outputs = {"entailment": 3, "multiple_choice": 1}.get(task, 2)
    head = {"classifier": heads.classifier(config, outputs)}
    params |= spec.init(head, jax.random.key(2))
    settings = Settings(
        optimizer="adamw", schedule="warmup_linear", warmup=0.1, min_lr_ratio=0.0, lr=5e-3, weight_decay=0.01,
        beta2=0.999, steps=100, dropout=True,
    )  # fmt: skip
    specs = models.gpt.parameters(config) | head
    optimizer = make_optimizer(settings, specs)
    step = make_train_step(config, settings, optimizer, tasks.make_objective(task))
    state = init_state(config, optimizer, 0, params=params, specs=specs)
    for _ in range(settings.steps):
        batch = tasks.make_batch(task, *examples(task, rng, 32), control, 12)
        state, metrics = step(state, {k: v[None] for k, v in batch.items()})
    assert metrics["finite"]
    batch = tasks.make_batch(task, *examples(task, rng, 256), control, 12)
    right = tasks.predict(state.params, batch, config, task).argmax(-1) == batch["labels"]
    assert right.mean() > 0.9


def test_fine_tuning_on_a_mesh_equals_one_device():
    """Without dropout, whose draws depend on where they are made; the state as it would be restored."""
    task = "multiple_choice"
    small = dataclasses.replace(CONFIG, vocab=96, layers=1)
    specs = models.gpt.parameters(small) | {"classifier": heads.classifier(small, HEAD[task])}
    params = spec.init(specs, jax.random.key(0))
    batch = tasks.make_batch(task, *examples(task, np.random.default_rng(0), 8), CONTROL, 12)
    loss = jax.jit(jax.value_and_grad(lambda p, b: tasks.make_objective(task, lm_outputs="matrix")(p, b, small)[0]))
    expected, gradients = loss(params, batch)
    optimizer = make_optimizer(Settings(), specs)
    mesh = make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        state = init_state(small, optimizer, 0, mesh=mesh, params=params, specs=specs)
        target = abstract_state(small, optimizer, mesh=mesh, specs=specs)
        value, got = loss(state.params, on_devices(batch, mesh))
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, gradients)


@pytest.mark.slow
def test_the_example_runs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpt1_tasks.py", "--steps", "2"])
    runpy.run_path("examples/gpt1_tasks.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "pre-training" in printed
    assert re.search(r"accuracy on held-out files: \d+\.\d% \(chance is 50 %\)", printed)
