"""Fine-tuning a GPT on labelled examples: GPT-1's four tasks, their inputs, heads and loss.

Letters: B examples, S sequences of an example, T tokens, D model width, N classes, V vocabulary.
Source: Radford et al. 2018, sections 3.2 and 3.3, figure 1; openai/finetune-transformer-lm train.py.

A batch is a dict: tokens int32 [B, S, T], padded on the right; weights float32 [B, S, T], 1 on tokens and 0 on padding;
labels int32 [B], a class, or for a choice which sequence. Parameters are the model's with the head as `classifier`:

    params, config = heads.add_tokens(params, config, 3, key)
    specs = {**gpt.parameters(config), "classifier": heads.classifier(config, outputs=2)}
    params |= spec.init({"classifier": specs["classifier"]}, key)
    optimizer = make_optimizer(settings, specs)
    state = init_state(config, optimizer, seed, params=params, specs=specs)
    step = make_train_step(config, settings, optimizer, finetuning("entailment"))
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core.einsum import einsum
from garrulax.core.spec import Tree
from garrulax.layers.dropout import dropout, split
from garrulax.models import gpt, heads
from garrulax.train.objectives import Batch, Objective, negative_log_likelihood

#: What an example of each consists of.
TASKS = {
    "classification": "one text",
    "entailment": "a premise and a hypothesis",
    "similarity": "two texts",
    "multiple_choice": "a text and at least two answers",
}
LM_OUTPUTS = ("vocabulary", "matrix")


@dataclasses.dataclass(frozen=True)
class Control:
    """Ids of the tokens that a text begins with, that stands between two texts, and that the head is asked at."""

    start: int
    delimiter: int
    classify: int

    @classmethod
    def of(cls, config: gpt.Config) -> "Control":
        """The last three ids of a vocabulary that `heads.add_tokens` made three longer."""
        return cls(*range(config.vocab - 3, config.vocab))


def sequences(task: str, texts: Sequence[Sequence[int]], control: Control, length: int) -> list[list[int]]:
    """The token sequences of one example, each of at most `length`.

    task: a name in `TASKS`, which says what texts (token ids) there must be. One text gives [start, text, classify],
    two [start, text, delimiter, text, classify]; similarity gives both orders, a choice one sequence an answer. Of
    each text as many tokens are kept as fit if all are as long, as in the original.
    Raises ValueError for another number of texts, and for a length without room for them.
    """
    _check_task(task)
    fits = {"classification": len(texts) == 1, "multiple_choice": len(texts) > 2}.get(task, len(texts) == 2)
    if not fits:
        raise ValueError(f"an example of {task} is {TASKS[task]}, not {len(texts)} texts")
    together = min(len(texts), 2)
    room = (length - together - 1) // together
    if room < 1:
        raise ValueError(f"length={length} has no room for {TASKS[task]} and the control tokens")
    cut = [[int(token) for token in text[:room]] for text in texts]
    if task == "classification":
        orders = [cut]
    elif task == "multiple_choice":
        orders = [[cut[0], answer] for answer in cut[1:]]
    else:
        orders = [cut, cut[::-1]] if task == "similarity" else [cut]
    return [_joined(order, control) for order in orders]


def _joined(texts: list[list[int]], control: Control) -> list[int]:
    out = [control.start]
    for text in texts:
        out += [*text, control.delimiter]
    return [*out[:-1], control.classify]


def make_batch(
    task: str,
    examples: Sequence[Sequence[Sequence[int]]],
    labels: Sequence[int],
    control: Control,
    length: int,
    pad: int = 0,
) -> dict[str, np.ndarray]:
    """The batch of some examples, each the texts that `sequences` takes, in rows of `length` tokens filled up with pad.

    Raises ValueError as `sequences` does, and where examples differ in the number of choices or from the labels'.
    """
    rows = [sequences(task, texts, control, length) for texts in examples]
    if len(rows) != len(labels) or not rows:
        raise ValueError(f"there are {len(rows)} examples and {len(labels)} labels")
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the examples of a batch must have the same number of choices")
    most = len(rows[0]) if task == "multiple_choice" else np.inf
    if not all(0 <= label < most for label in labels):
        raise ValueError(f"labels {list(labels)} are not all classes from 0, or choices, that there are")
    tokens = np.full((len(rows), len(rows[0]), length), pad, np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for i, row in enumerate(rows):
        for j, sequence in enumerate(row):
            tokens[i, j, : len(sequence)], weights[i, j, : len(sequence)] = sequence, 1
    return {"tokens": tokens, "weights": weights, "labels": np.asarray(labels, np.int32)}


def finetuning(
    task: str, lm_weight: float = 0.5, lm_outputs: str = "vocabulary", head_dropout: float = 0.1
) -> Objective:
    """The objective of a task: mean cross entropy of the labels + lm_weight * mean loss of the language model.

    lm_outputs: what the language model chooses from, see `lm_losses`. head_dropout: of the states that the head sees.
    Given a key, the config's embedding_dropout falls on the embedding matrix, so that a token's entries are gone
    wherever it stands and from the logits, as in the original. Metrics: tokens (examples, which the scalar is a mean
    over), correct (examples), task_loss, lm_loss.
    """
    _check_task(task)
    if lm_outputs not in LM_OUTPUTS:
        raise ValueError(f"unknown lm_outputs {lm_outputs!r}: choose from {', '.join(LM_OUTPUTS)}")
    if not 0 <= head_dropout < 1:
        raise ValueError(f"head_dropout={head_dropout} must be at least 0 and below 1")

    def loss(
        params: Tree, batch: Batch, config: gpt.Config, key: jax.Array | None = None, **options: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        embedding_key, layers_key, head_key = split(key, 3)
        if embedding_key is not None:
            params, config = _with_dropped_matrix(params, config, embedding_key)
        x = hidden_states(params, batch, config, layers_key, **options)
        logits = task_logits(params, x, batch, task, head_dropout, head_key)
        task_loss = jnp.mean(negative_log_likelihood(logits, batch["labels"]))
        lm_loss = jnp.mean(lm_losses(params, x, batch, config, lm_outputs))
        metrics = {
            "tokens": jnp.float32(len(logits)),
            "correct": jnp.sum(jnp.argmax(logits, axis=-1) == batch["labels"]),
            "task_loss": task_loss,
            "lm_loss": lm_loss,
        }
        return task_loss + lm_weight * lm_loss, metrics

    return loss


def predict(params: Tree, batch: Batch, config: gpt.Config, task: str) -> jax.Array:
    """Logits of a batch, which needs no labels: [B, N], for a choice [B, S]."""
    return task_logits(params, hidden_states(params, batch, config), batch, task)


def hidden_states(
    params: Tree, batch: Batch, config: gpt.Config, key: jax.Array | None = None, **options: Any
) -> jax.Array:
    """Hidden states [B, S, T, D] of a batch; options go to `models.hidden`. Raises ValueError where it is too long."""
    tokens = batch["tokens"]
    examples, sequences, length = tokens.shape
    if length > config.context:
        raise ValueError(f"rows of {length} tokens are longer than the model's context={config.context}")
    model = {name: part for name, part in params.items() if name != "classifier"}
    x, _ = models.hidden(model, tokens.reshape(-1, length), config, key=key, **options)
    return x.reshape(examples, sequences, length, -1)


def task_logits(
    params: Tree, x: jax.Array, batch: Batch, task: str, rate: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """Logits [B, N], for a choice [B, S], from hidden states x [B, S, T, D]: of the last token, which is classify.

    rate, key: dropout as in `heads.score`.
    """
    _check_task(task)
    last = jnp.sum(batch["weights"], axis=-1).astype(jnp.int32) - 1
    states = heads.state_at(x, last)
    return heads.score(states, params["classifier"], choose=task == "multiple_choice", rate=rate, key=key)


def lm_losses(params: Tree, x: jax.Array, batch: Batch, config: gpt.Config, outputs: str = "vocabulary") -> jax.Array:
    """Mean negative log-likelihood (nats) of each sequence's tokens after the first, from hidden states x: [B, S].

    outputs: "vocabulary" chooses among the tokens; "matrix" among all rows of the original's one matrix of tokens and
    positions, which is what its code does. Raises ValueError for "matrix" where the output is not tied.
    """
    if outputs == "matrix" and not config.tied:
        raise ValueError("lm_outputs='matrix' needs a tied output: the matrix is the embedding's")
    tokens, weights = batch["tokens"][:, :, 1:], batch["weights"][:, :, 1:]
    examples, sequences, length = tokens.shape
    states = x[:, :, :-1].reshape(examples * sequences, length, -1)
    logits = models.family(config).logits(params, states, config)
    nll = negative_log_likelihood(logits, tokens.reshape(-1, length))
    if outputs == "matrix":
        places = einsum("BTD,VD->BTV", states, params["positions"])
        # log(sum of both parts) - log(sum of the tokens' part); joining the logits would have to gather them on a mesh
        nll = nll + jax.nn.softplus(_log_sum(places) - _log_sum(logits))
    nll = nll.reshape(tokens.shape)
    return jnp.sum(nll * weights, axis=-1) / jnp.sum(weights, axis=-1)


def _log_sum(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)


def _with_dropped_matrix(params: Tree, config: gpt.Config, key: jax.Array) -> tuple[Tree, gpt.Config]:
    keys = jax.random.split(key)
    tables = {
        name: dropout(params[name], config.embedding_dropout, k)
        for name, k in zip(("tokens", "positions"), keys, strict=True)
    }
    return {**params, **tables}, dataclasses.replace(config, embedding_dropout=0.0)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
