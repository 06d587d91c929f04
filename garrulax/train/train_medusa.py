"""`train_medusa`: trains Medusa heads for a model that stays as it is."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import half
from garrulax.core.config import Count, ModelConfig, OptionalSize, Positive, Size, check_value
from garrulax.core.spec import Tree
from garrulax.models import medusa
from garrulax.models.medusa import MedusaHeads
from garrulax.models.unpack import ModelLike, unpack_model
from garrulax.train.batches import on_devices
from garrulax.train.documents import isolated_causal
from garrulax.train.medusa import DECAY, correct, heads_objective
from garrulax.train.objectives import mask_of
from garrulax.train.optimizers import make_optimizer
from garrulax.train.rows import HostBatch
from garrulax.train.settings import Settings
from garrulax.train.state import init_state
from garrulax.train.step import make_train_step

WINDOW = 128  # tokens in a row, where nobody says how many
RANKS = 10  # guesses of a head that are counted
KEPT_BYTES = 2**30  # of hidden states that are kept for the next time that a row comes
HELD_OUT = 0.05  # share of the rows on which the guesses are counted

Text = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed texts: each row is a window of the texts one after another.

    Attributes:
        windows: int32 [R, T + 1], tokens.
        segments: int32 [R, T + 1], the text of each token, counted from 0 in each row.
    """

    windows: np.ndarray
    segments: np.ndarray

    def batch(self, rows: Sequence[int] | np.ndarray) -> HostBatch:
        """A batch for next-token prediction within each text (`documents.isolated_causal`)."""
        return isolated_causal(self.windows[rows], self.segments[rows])


def train_medusa(
    model: ModelLike,
    texts: Iterable[Text],
    *,
    heads: int | MedusaHeads = 4,
    layers: int = 1,
    choices: int | None = None,
    steps: int = 300,
    batch: int = 8,
    window: int | None = None,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    decay: float = DECAY,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> MedusaHeads:
    """Trains Medusa heads for a frozen model (Medusa-1, Cai et al. 2024, section 2.2.1).

    The heads learn best what the model itself would write, so the best texts are its own: continue beginnings of texts
    with `gx.generate` at the temperature at which the heads will be used (docs/medusa.md).

    The parameters of the model get no gradients and no optimizer state, and its hidden states are computed once for
    each row of tokens as long as they take less than 1 GiB.

    Args:
        model: From `gx.load`, or (params, config) with texts as token ids.
        texts: Texts, or lists of token ids; no label of a head lies in another text. As many are read as the steps
            need.
        heads: Number of heads, or heads to train further.
        layers: Residual blocks of a new head.
        choices: Number of tokens that new heads choose from, the most frequent ones of the texts; None is all. With few
            of them the heads of a small model are much faster.
        steps: Number of updates.
        batch: Rows in a step.
        window: Tokens in a row; fewer if the texts have fewer. None is 128, or the model's context if it is shorter.
        lr: Peak learning rate, after a warm-up of 5 % of the steps; it falls to a tenth along a cosine.
        optimizer: "adamw" or "muon".
        decay: Weight of a head's loss divided by that of the head before.
        seed: Decides the order of the rows.
        report: Called with a line about the progress now and then.

    Returns:
        The heads; their `accuracy` was counted on every twentieth row, which was not trained on. Of fewer than twenty
        rows none is held out, and it was counted on the first, so that it says little.

    Raises:
        TypeError: The texts are one string.
        ValueError: The texts are too short or there are none, the model fills blanks, or an argument is out of range,
            such as a window that is longer than the model's context.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96, eos=None)
        >>> model = (gx.init(config, jax.random.key(0)), config)
        >>> heads = gx.train_medusa(model, [list(range(96))] * 4, heads=2, steps=2, batch=2, window=16)
        >>> heads.config.heads, heads.accuracy.shape
        (2, (2, 10))
    """
    params, config, _ = unpack_model(model)
    window = _window(window, config)
    settings = Settings(steps=steps, batch=batch, window=window, lr=lr, adam_lr=lr, optimizer=optimizer, weight_decay=0)
    medusa.check_family(config)
    check_value("lr", lr, Positive)
    check_value("decay", decay, Positive)
    check_value("seed", seed, Count)
    check_value("choices", choices, OptionalSize)
    rows = pack(model, texts, window, most=steps * batch)
    held_out = np.arange(len(rows.windows)) % round(1 / HELD_OUT) == round(1 / HELD_OUT) - 1
    train, valid = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if isinstance(heads, int):
        frequent = None if choices is None else most_frequent(rows.windows[train], choices, config.vocab).tolist()
        heads = medusa.init(model, heads, layers, frequent)
    medusa.check_heads(heads, config)
    if rows.windows.shape[1] < heads.config.heads + 2:
        raise ValueError(f"rows of {rows.windows.shape[1]} tokens are too short for {heads.config.heads} heads")
    c, specs = heads.config, medusa.parameters(heads.config)
    made = make_optimizer(settings, specs)
    state = init_state(config, made, seed, params=heads.params, specs=specs)
    step = make_train_step(config, settings, made, heads_objective(c, heads.tokens, decay))
    states = _States(half.from_bits(params), config, rows)
    for number, chosen in zip(range(steps), _order(train, batch, seed), strict=False):
        state, metrics = step(state, on_devices(states.batch(chosen), None, 1))
        if report is not None and (number % 20 == 19 or number + 1 == steps):
            report(f"step {number + 1:,} of {steps:,}  loss {float(metrics['loss']):.4f}")
        if number + 1 == steps and not bool(metrics["finite"]):
            raise FloatingPointError("the loss of the heads is not finite: try a lower lr")
    dtype = jax.tree.leaves(heads.params)[0].dtype
    trained = dataclasses.replace(heads, params=jax.tree.map(lambda x: x.astype(dtype), state.params))
    parts = valid if len(valid) else train[:1]
    return dataclasses.replace(trained, accuracy=_accuracy(trained, states, parts, batch))


def medusa_accuracy(
    model: ModelLike, heads: MedusaHeads, texts: Iterable[Text], *, window: int | None = None, batch: int = 8
) -> np.ndarray:
    """How often the heads guess right.

    Args:
        model: The model.
        heads: Its heads.
        texts: Texts, or lists of token ids.
        window: Tokens in a row, as in `train_medusa`.
        batch: Rows that are read at once.

    Returns:
        [k, 10]: entry [i, j] is the share of tokens that head i's guess of rank j predicts right.

    Raises:
        ValueError: As `train_medusa` does.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.models import medusa
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> gx.medusa_accuracy(model, medusa.init(model, heads=2), [list(range(96))], window=16).shape
        (2, 10)
    """
    params, config, _ = unpack_model(model)
    medusa.check_heads(heads, config)
    rows = pack(model, texts, _window(window, config))
    return _accuracy(heads, _States(half.from_bits(params), config, rows), np.arange(len(rows.windows)), batch)


def _window(window: int | None, config: ModelConfig) -> int:
    """Tokens in a row: as many as are asked for; None is `WINDOW`, or the model's context if it is shorter."""
    if window is None:
        return min(WINDOW, config.context)
    check_value("window", window, Size)
    if window > config.context:
        raise ValueError(f"window={window} is longer than model.context={config.context}: lower it or leave it out")
    return window


def pack(model: ModelLike, texts: Iterable[Text], window: int, most: int | None = None) -> Rows:
    """Puts texts one after another into rows.

    Args:
        model: The model; its tokenizer reads texts.
        texts: Texts, or lists of token ids.
        window: Tokens in a row.
        most: Number of rows after which no more texts are read.
    """
    _, config, tokenizer = unpack_model(model)
    if isinstance(texts, str):
        raise TypeError("texts must be several texts, such as [text], not one string")
    ids: list[np.ndarray] = []
    count = 0
    for text in texts:
        if isinstance(text, str) and tokenizer is None:
            raise ValueError("a text needs a model with a tokenizer: give lists of token ids")
        one = np.asarray(tokenizer.encode(text) if isinstance(text, str) else text)  # type: ignore[union-attr]
        if one.ndim != 1 or (one.size and one.dtype.kind not in "iu"):
            raise ValueError(f"texts must be texts or lists of token ids, one of which is {text!r:.60}")
        if one.size and not 0 <= one.min() <= one.max() < config.vocab:
            raise ValueError(f"token ids must be from 0 to {config.vocab - 1}, the model's vocabulary")
        ids.append(one.astype(np.int32))
        count += len(one)
        if most is not None and count > most * window:
            break
    whole = np.concatenate([*ids, np.zeros(0, np.int32)])
    window = min(window, len(whole) - 1)
    if window < 2:
        raise ValueError(f"the texts have {len(whole)} tokens, too few to train on")
    number = (len(whole) - 1) // window
    index = np.arange(number)[:, None] * window + np.arange(window + 1)
    owner = np.repeat(np.arange(len(ids)), [len(one) for one in ids])[index]
    return Rows(whole[index], (owner - owner[:, :1]).astype(np.int32))


def most_frequent(tokens: np.ndarray, count: int, vocab: int) -> np.ndarray:
    """The ids of the `count` most frequent tokens; of equally frequent ones those with lower ids.

    Raises:
        ValueError: There are not so many ids.
    """
    if not 0 < count <= vocab:
        raise ValueError(f"choices={count} must be from 1 to the vocabulary of {vocab}")
    times = np.bincount(tokens.reshape(-1), minlength=vocab)
    return np.argsort(-times, kind="stable")[:count]


def _order(rows: np.ndarray, batch: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of rows without end; each epoch has its own order."""
    random = np.random.default_rng(seed)
    left = np.zeros(0, rows.dtype)
    while True:
        while len(left) < batch:
            left = np.concatenate([left, random.permutation(rows)])
        yield left[:batch]
        left = left[batch:]


class _States:
    """The hidden states of a frozen model for rows of tokens, each computed once while memory allows."""

    def __init__(self, params: Tree, config: ModelConfig, rows: Rows):
        self.params, self.config, self.rows = params, config, rows
        self.kept: dict[int, np.ndarray] = {}

    def batch(self, rows: np.ndarray) -> dict[str, Any]:
        """The batch of some rows, with `hidden`."""
        batch = self.rows.batch(rows)
        if all(int(row) in self.kept for row in rows):
            return {**batch, "hidden": np.stack([self.kept[int(row)] for row in rows])}
        x = np.asarray(_hidden(self.params, batch, self.config))
        if (len(self.kept) + len(rows)) * x[0].nbytes <= KEPT_BYTES:
            self.kept |= {int(row): one for row, one in zip(rows, x, strict=True)}
        return {**batch, "hidden": x}


@functools.partial(jax.jit, static_argnames="config")
def _hidden(params: Tree, batch: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
    mask, positions = mask_of(batch), batch["positions"]
    return models.hidden(params, batch["tokens"], config, positions=positions, mask=mask)[0].astype(jnp.float32)


_correct = jax.jit(correct, static_argnames=("c", "ranks"))


def _accuracy(heads: MedusaHeads, states: _States, rows: np.ndarray, batch: int) -> np.ndarray:
    ranks = min(RANKS, heads.config.choices or heads.config.vocab)
    right, count = np.zeros((heads.config.heads, ranks)), np.zeros(heads.config.heads)
    for i in range(0, len(rows), batch):
        part = states.batch(rows[i : i + batch])
        hits, all_ = _correct(heads.params, part["hidden"], part, c=heads.config, tokens=heads.tokens, ranks=ranks)
        right, count = right + np.asarray(hits), count + np.asarray(all_)
    return right / np.maximum(count, 1)[:, None]
