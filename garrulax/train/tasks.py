"""Fine-tuning a GPT on labelled examples: the four tasks of GPT-1, with their inputs, heads and loss.

Letters: B examples, S sequences of an example, T tokens, D model width, N classes, V vocabulary.
Source: Radford et al. 2018, sections 3.2 and 3.3, figure 1; openai/finetune-transformer-lm train.py.

A batch is a dict: tokens int32 [B, S, T], padded on the right; weights float32 [B, S, T], 1 for tokens and 0 for
padding; labels int32 [B], a class, or for multiple choice the index of the right sequence. The parameters are those of
the model and a head named `classifier`:

    params, config = heads.add_tokens(params, config, 3, key)
    specs = {**gpt.parameters(config), "classifier": heads.classifier(config, outputs=2)}
    params |= spec.init({"classifier": specs["classifier"]}, key)
    optimizer = make_optimizer(settings, specs)
    state = init_state(config, optimizer, seed, params=params, specs=specs)
    step = make_train_step(config, settings, optimizer, make_objective("entailment"))

examples/gpt1_tasks.py is a complete program.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import einsum
from garrulax.core.spec import Tree
from garrulax.layers.dropout import dropout, split
from garrulax.models import gpt, heads
from garrulax.train.objectives import Batch, Objective, negative_log_likelihood

#: The texts of one example of each task.
TASKS = {
    "classification": "one text",
    "entailment": "a premise and a hypothesis",
    "similarity": "two texts",
    "multiple_choice": "a text and at least two answers",
}
LM_OUTPUTS = ("vocabulary", "matrix")


@dataclasses.dataclass(frozen=True)
class ControlTokens:
    """Ids of the control tokens.

    Attributes:
        start: Begins a sequence.
        delimiter: Separates two texts.
        classify: Ends a sequence; the head reads its state.
    """

    start: int
    delimiter: int
    classify: int

    @classmethod
    def of(cls, config: gpt.Config) -> "ControlTokens":
        """The last three ids of the vocabulary, after `heads.add_tokens` has added three."""
        return cls(*range(config.vocab - 3, config.vocab))


def sequences(task: str, texts: Sequence[Sequence[int]], control: ControlTokens, length: int) -> list[list[int]]:
    """The token sequences of one example.

    One text gives [start, text, classify]. Two texts give [start, text, delimiter, text, classify]; similarity has this
    in both orders, and multiple choice has one such sequence for each answer. Every text is cut to an equal share of
    the length, as in the original code.

    Args:
        task: A name in `TASKS`.
        texts: Token ids of the texts that `TASKS` lists for the task.
        control: Ids of the control tokens.
        length: Greatest length of a sequence.

    Raises:
        ValueError: For a wrong number of texts, and for a length that is too short for them.
    """
    _check_task(task)
    fits = {"classification": len(texts) == 1, "multiple_choice": len(texts) > 2}.get(task, len(texts) == 2)
    if not fits:
        raise ValueError(f"an example of {task} is {TASKS[task]}, not {len(texts)} texts")
    texts_in_sequence = min(len(texts), 2)
    share = (length - texts_in_sequence - 1) // texts_in_sequence
    if share < 1:
        raise ValueError(f"length={length} is too short for {TASKS[task]} and the control tokens")
    cut = [[int(token) for token in text[:share]] for text in texts]
    if task == "classification":
        orders = [cut]
    elif task == "multiple_choice":
        orders = [[cut[0], answer] for answer in cut[1:]]
    else:
        orders = [cut, cut[::-1]] if task == "similarity" else [cut]
    return [_joined(order, control) for order in orders]


def _joined(texts: list[list[int]], control: ControlTokens) -> list[int]:
    out = [control.start]
    for text in texts:
        out += [*text, control.delimiter]
    return [*out[:-1], control.classify]


def make_batch(
    task: str,
    examples: Sequence[Sequence[Sequence[int]]],
    labels: Sequence[int],
    control: ControlTokens,
    length: int,
    pad: int = 0,
) -> dict[str, np.ndarray]:
    """Makes a batch, see the module docstring.

    Args:
        task: A name in `TASKS`.
        examples: B examples, each a list of texts as for `sequences`.
        labels: Of the examples.
        control: Ids of the control tokens.
        length: T.
        pad: Id that fills up the rows.

    Raises:
        ValueError: As `sequences` does; and if the examples have different numbers of choices, or labels are missing or
            out of range.
    """
    rows = [sequences(task, texts, control, length) for texts in examples]
    if len(rows) != len(labels) or not rows:
        raise ValueError(f"there are {len(rows)} examples and {len(labels)} labels")
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the examples of a batch must have the same number of choices")
    classes = len(rows[0]) if task == "multiple_choice" else np.inf
    if not all(0 <= label < classes for label in labels):
        raise ValueError(f"labels {list(labels)} must be classes or indices of choices, counted from 0")
    tokens = np.full((len(rows), len(rows[0]), length), pad, np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for i, row in enumerate(rows):
        for j, sequence in enumerate(row):
            tokens[i, j, : len(sequence)], weights[i, j, : len(sequence)] = sequence, 1
    return {"tokens": tokens, "weights": weights, "labels": np.asarray(labels, np.int32)}


def make_objective(
    task: str, lm_weight: float = 0.5, lm_outputs: str = "vocabulary", head_dropout: float = 0.1
) -> Objective:
    """Makes the objective of a task: mean cross entropy of the labels + lm_weight * mean language-model loss.

    With a key, embedding dropout applies to the embedding matrix instead of the embedded tokens, as in the original
    code: an entry dropped from a token's row is 0 at all positions of that token, and in the output logits.

    Its metrics are tokens (the number of examples, since the scalar is a mean over examples), correct (the number of
    examples predicted right), task_loss and lm_loss.

    Args:
        task: A name in `TASKS`.
        lm_weight: Of the language-model loss (lambda in the paper).
        lm_outputs: The outputs that the language model chooses from, see `lm_losses`.
        head_dropout: Rate of dropout of the states before the head.

    Raises:
        ValueError: For an unknown task or `lm_outputs`, and a rate outside 0 <= rate < 1.
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
            params, config = _with_embedding_dropout(params, config, embedding_key)
        x = hidden_states(params, batch, config, layers_key, **options)  # [B, S, T, D]
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
    """Logits of a batch, which needs no labels: [B, N], or [B, S] for multiple choice."""
    return task_logits(params, hidden_states(params, batch, config), batch, task)


def hidden_states(
    params: Tree, batch: Batch, config: gpt.Config, key: jax.Array | None = None, **options: Any
) -> jax.Array:
    """Hidden states [B, S, T, D] of a batch.

    Args:
        params: Of the model.
        batch: See the module docstring.
        config: Of the model.
        key: PRNG key for dropout; None is without dropout.
        **options: Passed on to `models.hidden`.

    Raises:
        ValueError: If the rows are longer than the model's context.
    """
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
    """Applies the head to the last token of every sequence, which is `classify`.

    Args:
        params: Of the model and the head.
        x: Hidden states [B, S, T, D].
        batch: See the module docstring; its weights say where the sequences end.
        task: A name in `TASKS`.
        rate: Of dropout before the head.
        key: PRNG key for dropout; None is without dropout.

    Returns:
        Logits [B, N], or [B, S] for multiple choice.
    """
    _check_task(task)
    last = jnp.sum(batch["weights"], axis=-1).astype(jnp.int32) - 1  # [B, S]
    states = heads.state_at(x, last)  # [B, S, D]
    return heads.head_logits(states, params["classifier"], choose=task == "multiple_choice", rate=rate, key=key)


def lm_losses(params: Tree, x: jax.Array, batch: Batch, config: gpt.Config, outputs: str = "vocabulary") -> jax.Array:
    """Mean negative log-likelihood (nats) of the tokens of each sequence, except its first.

    Args:
        params: Of the model.
        x: Hidden states [B, S, T, D].
        batch: See the module docstring.
        config: Of the model.
        outputs: "vocabulary": softmax over the tokens. "matrix": softmax over the tokens and the positions, since the
            original code has both in one tied matrix and uses all its rows as outputs.

    Returns:
        [B, S].

    Raises:
        ValueError: For "matrix" if the output head is not tied.
    """
    if outputs == "matrix" and not config.tied:
        raise ValueError("lm_outputs='matrix' needs a tied output: the matrix is the embedding's")
    tokens, weights = batch["tokens"][:, :, 1:], batch["weights"][:, :, 1:]
    examples, sequences, length = tokens.shape
    states = x[:, :, :-1].reshape(examples * sequences, length, -1)
    logits = models.family(config).logits(params, states, config)
    nll = negative_log_likelihood(logits, tokens.reshape(-1, length))
    if outputs == "matrix":
        position_logits = einsum("BTD,VD->BTV", states, params["positions"])
        # nll has the tokens' sum as its denominator; add log(sum of both) - log(sum of tokens). Joining both arrays of
        # logits instead would gather them on a mesh.
        nll = nll + jax.nn.softplus(_log_sum(position_logits) - _log_sum(logits))
    nll = nll.reshape(tokens.shape)
    return jnp.sum(nll * weights, axis=-1) / jnp.sum(weights, axis=-1)


def _log_sum(logits: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits.astype(at_least_float32(logits.dtype)), axis=-1)


def _with_embedding_dropout(params: Tree, config: gpt.Config, key: jax.Array) -> tuple[Tree, gpt.Config]:
    """Parameters with dropout applied to the embedding matrices, and a config without embedding dropout."""
    keys = jax.random.split(key)
    tables = {
        name: dropout(params[name], config.embedding_dropout, k)
        for name, k in zip(("tokens", "positions"), keys, strict=True)
    }
    return {**params, **tables}, dataclasses.replace(config, embedding_dropout=0.0)


def _check_task(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
