"""Speculation with Medusa heads: they guess from the hidden state of the last token that the model has read.

Source: Cai et al. 2024, arXiv 2401.10774. Letters: see `interface`; k heads.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import half
from garrulax.core.config import Check, ModelConfig, check_value
from garrulax.models import medusa as heads_
from garrulax.models.medusa import MedusaHeads
from garrulax.sampling.requests import Weights
from garrulax.sampling.speculate.accept import exact
from garrulax.sampling.speculate.interface import Accept, Bound, Outcome, Proposal, Proposer, Speculation, check_parents
from garrulax.sampling.speculate.loop import narrow_width, room
from garrulax.sampling.speculate.medusa_trees import PATHS_63, DraftTree, Path, best_paths, number_of_paths, tree_of
from garrulax.sampling.speculate.typical import EPSILON, typical
from garrulax.sampling.state import Requests, State
from garrulax.sampling.transforms import Transform

ACCEPT = ("exact", "typical")
#: Drafts of the default tree. On a CPU a pass over more tokens takes longer, on other devices hardly.
CPU_DRAFTS, DRAFTS = 7, 63
#: Time of one more token in a pass of a CPU, in passes over two tokens.
CPU_PRICE = 0.06
_SHARE = Check(
    lambda x: isinstance(x, int | float | np.floating) and bool(0 < x <= 1), "a number above 0 and at most 1"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Medusa(Speculation):
    """The argument `speculate` that `medusa` makes.

    Attributes:
        heads: The heads.
        tree: The drafts.
        accept: How they are accepted.
        chosen: Whether the tree was listed by the caller; it is then read in every pass.
    """

    heads: MedusaHeads
    tree: DraftTree
    accept: Accept
    chosen: bool

    def bind(self, weights: Weights, config: ModelConfig, transform: Transform, requests: Requests, size: int) -> Bound:
        """See `Speculation.bind`."""
        heads_.check_heads(self.heads, config)
        most = int(np.max(np.asarray(requests.limit), initial=0))
        if self.chosen and self.tree.depth >= most > 0:
            raise ValueError(
                f"a tree of {self.tree.depth} tokens in depth is deeper than the room left, max_new_tokens={most}: "
                "list shorter paths, or leave the tree out"
            )
        own = {"heads": half.as_bits(self.heads.params)}
        own |= {} if self.heads.tokens is None else {"tokens": self.heads.tokens}
        dtype = jax.tree.leaves(self.heads.params)[0].dtype

        def begin(state: State) -> dict[str, jax.Array]:
            rows = len(state.done)
            return {"hidden": jnp.zeros((rows, config.width), dtype), "known": jnp.zeros((rows,), bool)}

        always = self.chosen or jax.default_backend() != "cpu"
        return Bound(_proposer(self.tree, self.heads.config, self.accept, always), own, begin)


def medusa(
    heads: MedusaHeads,
    *,
    tree: int | Sequence[Sequence[int]] | None = None,
    accept: str = "exact",
    epsilon: float = EPSILON,
    delta: float | None = None,
) -> Medusa:
    """Speculation with Medusa heads (Cai et al. 2024): no second model is needed, but heads trained for the model.

    With accept="exact" the completion is that without speculation, greedy or sampled. With "typical" it is another, and
    not a sample of the model's distribution: a draft is accepted if its probability p, after all transforms, is greater
    than min(epsilon, delta * exp(-H)), where H is the entropy of the distribution. Of the drafts accepted the longest
    path is taken, of several equally long ones the most probable. Greedy texts are the same with both.

    Args:
        heads: From `gx.train_medusa` or `gx.load_medusa`.
        tree: The drafts: how many, or a list of paths. The path (0, 1) is the likeliest token of the first head and
            after it the second likeliest of the second head. A number takes the best paths for what is known about the
            heads' accuracy, else those of the paper. None is 7 drafts on CPUs and 63 elsewhere. On a CPU, where a
            pass over more tokens takes longer, a pass reads them all only if the heads are sure enough that it pays. A
            list is read in every pass.
        accept: "exact" or "typical".
        epsilon: With "typical", the probability that is always enough.
        delta: With "typical", the factor of exp(-H); None is the square root of epsilon.

    Raises:
        TypeError: `heads` are something else.
        ValueError: The tree is deeper than there are heads or no tree, or another argument is out of range.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.models import medusa
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = gx.init(config, jax.random.key(0)), config
        >>> heads = medusa.init(model, heads=2)  # untrained
        >>> speculate = gx.medusa(heads, tree=[(0,), (1,), (0, 0)])
        >>> one = gx.generate(model, [5, 17, 3], max_new_tokens=12, temperature=0, speculate=speculate)
        >>> one.tokens == gx.generate(model, [5, 17, 3], max_new_tokens=12, temperature=0).tokens
        True
    """
    if not isinstance(heads, MedusaHeads):
        raise TypeError(f"heads are what gx.train_medusa or gx.load_medusa returns, not {type(heads).__name__}")
    if accept not in ACCEPT:
        raise ValueError(f"accept={accept!r}: choose from {', '.join(ACCEPT)}")
    check_value("epsilon", epsilon, _SHARE)
    delta = float(epsilon) ** 0.5 if delta is None else delta
    check_value("delta", delta, _SHARE)
    listed = not (tree is None or isinstance(tree, int))
    found = tree_of(tree if listed else _paths(heads, tree))  # type: ignore[arg-type]
    check_parents(found.parents)
    c = heads.config
    if found.depth > c.heads:
        raise ValueError(f"a tree of {found.depth} tokens in depth needs as many heads, and there are {c.heads}")
    if max(found.rank) >= (c.choices or c.vocab):
        raise ValueError(f"a tree with rank {max(found.rank)} needs heads that choose from more tokens")
    rule = exact if accept == "exact" else typical(float(epsilon), float(delta))
    return Medusa(heads, found, rule, listed)


def _paths(heads: MedusaHeads, drafts: int | None) -> list[Path]:
    """The best paths for heads."""
    if isinstance(drafts, bool) or (drafts is not None and drafts < 1):
        raise ValueError(f"tree={drafts} must be a whole number of at least 1 draft, or a list of paths")
    wanted = drafts or (CPU_DRAFTS if jax.default_backend() == "cpu" else DRAFTS)
    if heads.accuracy is not None:
        possible = number_of_paths(*heads.accuracy.shape)
        return best_paths(heads.accuracy, wanted if drafts else min(wanted, possible))
    ranks = heads.config.choices or heads.config.vocab
    known = [path for path in PATHS_63 if len(path) <= heads.config.heads and max(path) < ranks]
    if drafts is not None and drafts > len(known):
        raise ValueError(f"tree={drafts}: {len(known)} paths are known for {heads.config.heads} heads; list your own")
    return known[:wanted]


@functools.cache  # jit compares proposers by identity
def _proposer(tree: DraftTree, c: heads_.Config, accept: Accept, always: bool) -> Proposer:
    def propose(own: Any, memory: dict[str, jax.Array], state: State) -> tuple[Proposal, dict[str, jax.Array]]:
        found = heads_.logits(own["heads"], memory["hidden"][:, None], c)
        guesses = [likeliest(found[i][:, 0], tree.guesses(i)) for i in range(tree.depth)]
        columns = list(zip(tree.head, tree.rank, strict=True))
        tokens = jnp.stack([guesses[head][0][:, rank] for head, rank in columns], axis=1)  # [B, N]
        tokens = own["tokens"][tokens] if "tokens" in own else tokens
        known = memory["known"]
        chance = [jnp.where(known, guesses[head][1][:, rank], 0) for head, rank in columns]
        worth = jnp.broadcast_to(pays(proposer, chance, ~state.done), known.shape)
        return Proposal(tokens, jnp.broadcast_to(known[:, None], tokens.shape), worth), memory

    def observe(own: Any, memory: dict[str, jax.Array], outcome: Outcome) -> dict[str, jax.Array]:
        active = ~outcome.before.done
        hidden = jnp.where(active[:, None], outcome.hidden.astype(memory["hidden"].dtype), memory["hidden"])
        return {"hidden": hidden, "known": memory["known"] | active}

    proposer = Proposer(tree.parents, propose, observe, accept, always)
    return proposer


def likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` greatest entries of each row of [B, N], greatest first.

    Returns:
        Their indices int32 [B, count], and their probabilities float32 [B, count].
    """
    top, index = jax.lax.top_k(logits.astype(jnp.float32), count)
    total = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    return index.astype(jnp.int32), jnp.exp(top - total)


def pays(proposer: Proposer, chance: list[jax.Array], active: jax.Array) -> jax.Array:
    """Whether a CPU is expected to write more tokens a second by passes over all drafts than by the narrowest ones.

    A pass over n tokens, of all rows together, takes about 1 + CPU_PRICE * (n - 2) of the time of one over two.

    Args:
        proposer: Its `parents` are read.
        chance: For each draft, float32 [B], its probability after its parent.
        active: bool [B], rows that are not done.

    Returns:
        bool scalar.
    """
    rows, one = len(active), active.astype(jnp.float32)
    expected: list[jax.Array] = []  # of each draft, that it is accepted
    for parent, own in zip(proposer.parents, chance, strict=True):
        expected.append(own * (one if parent < 0 else expected[parent]))
    narrow = narrow_width(proposer, rows)
    wide = jnp.sum(jnp.stack([one, *expected]))
    few = jnp.sum(jnp.stack([one, *expected[: narrow - 1]]))
    return wide >= few * (_price(rows * room(proposer)) / _price(rows * narrow))


def _price(tokens: int) -> float:
    return 1 + CPU_PRICE * max(tokens - 2, 0)
