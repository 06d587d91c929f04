"""Medusa heads: small networks on the last hidden state of a model that guess several further tokens at once.

Letters: B rows, T tokens, D width of the model, V vocabulary, N tokens that heads choose from, k number of heads.
Source: Cai et al. 2024, arXiv 2401.10774, section 2.1; FasterDecoding/Medusa, medusa/model/medusa_model.py.

Head i reads the hidden state of token t after the model's last norm, x [D]. The model itself predicts token t + 1 from
it, head i (counted from 0) token t + i + 2. A head is n residual blocks x + silu(W x + b) and an output matrix [N, D].

In the paper N = V. In a small model with a large vocabulary such heads would cost as much as the model. Heads can
therefore choose from a list of frequent tokens only, as in FR-Spec (Zhao et al. 2025, arXiv 2502.14856): their guesses
are verified anyway.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import spec
from garrulax.core.config import Count, ModelConfig, OptionalSize, Size, check_fields
from garrulax.core.einsum import einsum
from garrulax.core.leaf import dtype_of
from garrulax.core.spec import Declare, Tree
from garrulax.layers.mlp import linear
from garrulax.models.unpack import ModelLike, unpack_model


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of the heads of one model.

    Attributes:
        width: D, of the model.
        vocab: V, of the model.
        heads: k, number of heads.
        layers: Residual blocks of a head.
        choices: N, number of tokens that the heads choose from; None is all of the vocabulary.
        base: Name of the model, for the reader.
    """

    width: Size
    vocab: Size
    heads: Size = 4
    layers: Count = 1
    choices: OptionalSize = None
    base: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.choices is not None and self.choices > self.vocab:
            raise ValueError(f"heads cannot choose from {self.choices} tokens of a vocabulary of {self.vocab}")


@dataclasses.dataclass(frozen=True)
class MedusaHeads:
    """Medusa heads.

    Attributes:
        config: Their settings.
        params: Their parameters: a dict with one dict a head, under "0", "1", ...
        tokens: int32 [N], the ids of the tokens that they choose from; None is all of the vocabulary.
        accuracy: float64 [k, r], the share of held-out tokens that each head's guess of each rank predicted right; None
            if it is not known.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.models import medusa
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> heads = medusa.init(model, heads=2)  # a gx.MedusaHeads
        >>> heads.params["0"]["head"].shape, heads.params["1"]["block0"].shape
        ((96, 32), (32, 32))
    """

    config: Config
    params: Tree
    tokens: jax.Array | None = None
    accuracy: np.ndarray | None = None


def parameters(c: Config) -> Tree:
    """The ParamSpec tree of heads. The names are those in the file of heads of FasterDecoding/Medusa."""
    # A new head repeats the model's own prediction: its blocks add silu(0) = 0. The matrix is copied by `init`.
    declare = Declare(spec.zeros, D=c.width, E=c.width, V=c.choices or c.vocab)

    def head(i: int) -> Tree:
        tree: dict[str, Any] = {"head": declare.embedding(f"{i}.{c.layers}.weight")}
        for n in range(c.layers):
            tree |= declare.linear(f"block{n}", f"{i}.{n}.linear", "E D -> D E", bias=True)
        return tree

    return {str(i): head(i) for i in range(c.heads)}


def init(
    model: ModelLike, heads: int = 4, layers: int = 1, tokens: Sequence[int] | None = None, base: str = ""
) -> MedusaHeads:
    """New heads for a model, all of which predict what the model itself predicts.

    Args:
        model: From `gx.load`, or (params, config).
        heads: k, number of heads.
        layers: Residual blocks of a head.
        tokens: Ids of the tokens that the heads choose from; None is all of the vocabulary.
        base: Name of the model, which is saved with the heads.

    Raises:
        ValueError: The model fills blanks, or `tokens` are no ids or not different ones.
    """
    params, config, _ = unpack_model(model)
    check_family(config)
    ids = None if tokens is None else jnp.asarray(np.sort(np.asarray(tokens, np.int32)))
    settings = Config(config.width, config.vocab, heads, layers, None if ids is None else len(ids), base)
    check_tokens(ids, settings)
    own = _output_matrix(params, config)
    own = own if ids is None else own[ids]
    tree = spec.init(parameters(settings), jax.random.key(0), own.dtype)
    return MedusaHeads(settings, {i: {**head, "head": jnp.array(own)} for i, head in tree.items()}, ids)


def _output_matrix(params: Tree, config: ModelConfig) -> jax.Array:
    """The model's output head [V, D], whatever its family makes of it: its logits are W x, so those of unit vectors."""
    units = jnp.eye(config.width, dtype=dtype_of(params["blocks"]))[None]
    return models.family(config).logits(params, units, config)[0].T


def logits(params: Tree, x: jax.Array, c: Config) -> list[jax.Array]:
    """Logits of all heads.

    Args:
        params: Of the heads.
        x: Hidden states [B, T, D] of the model, after its last norm (`models.hidden`).
        c: Of the heads.

    Returns:
        k arrays [B, T, N]; those of head i at token t are for token t + i + 2.
    """

    def head(p: Tree) -> jax.Array:
        y = x
        for n in range(c.layers):
            y = y + jax.nn.silu(linear("BTD,DE->BTE", y, p, f"block{n}"))
        return einsum("BTD,VD->BTV", y, p["head"])

    return [head(params[str(i)]) for i in range(c.heads)]


def check_family(config: ModelConfig) -> None:
    """Raises ValueError for a model that fills blanks: its next token does not follow the one before in the text."""
    if models.blanks(config) is not None:
        name = models.family(config).__name__.rsplit(".", 1)[-1]
        raise ValueError(f"Medusa heads guess how a text goes on; a model of the family {name} fills blanks")


def check_tokens(tokens: Any, c: Config) -> None:
    """Raises ValueError unless `tokens` are as many ids as the heads choose from, each once."""
    if (tokens is None) != (c.choices is None):
        raise ValueError("heads that choose from some tokens need the ids of these, and other heads must not have any")
    if tokens is None:
        return
    ids = np.asarray(tokens)
    if ids.shape != (c.choices,) or len(set(ids.tolist())) != len(ids):
        raise ValueError(f"the tokens that the heads choose from must be {c.choices} different ids")
    if ids.min() < 0 or ids.max() >= c.vocab:
        raise ValueError(f"the tokens that the heads choose from must be ids from 0 to {c.vocab - 1}")


def check_heads(heads: Any, config: ModelConfig) -> None:
    """Checks that heads belong to a model like this one.

    Raises:
        TypeError: They are something else than `MedusaHeads`.
        ValueError: Their width, vocabulary or parameters differ, or the model's family cannot have heads.
    """
    if not isinstance(heads, MedusaHeads):
        raise TypeError(f"heads are what gx.train_medusa or gx.load_medusa returns, not {type(heads).__name__}")
    check_family(config)
    for name, what in (("width", "width"), ("vocab", "vocabulary")):
        ours, theirs = getattr(heads.config, name), getattr(config, name)
        if ours != theirs:
            raise ValueError(f"the heads are for a {what} of {ours}, the model has {theirs}: use the model's own heads")
    spec.check_params(parameters(heads.config), heads.params)
    check_tokens(heads.tokens, heads.config)
