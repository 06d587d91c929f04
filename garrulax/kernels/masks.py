"""The masks of the literature by name: each builder makes the streams of tokens [B, T] and the rule over them.

segment, an argument of most: int32 [B, T], the document of every token of a packed row, PAD (-1) for padding; the
tokens of a document stand together, and its blocks are counted from its first. Every token sees tokens of its own
document only, and padding neither sees nor is seen.

Sizes are static, arrays are data: with other arrays of the same shape a program is not compiled again. Nothing here
is larger than the streams themselves.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels.mask import CAUSAL, INF, PAD, SAME_SEGMENT, Band, Bits, KRange, Mask, Rule, Streams, Within

WORD = 30  # nodes of a tree in one stream; the sign bit stays clear
WORDS = 3
COMMITTED, EMPTY = -1, -2  # slots of a cache that hold no node of a tree


def causal(batch: int, length: int) -> Mask:
    """Every token sees itself and those before it."""
    rank = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Mask({"rank": rank, "segment": jnp.zeros_like(rank)}, causal=True)


def causal_from(tokens: jax.Array, start: jax.Array | int = 0) -> Mask:
    """Causal for tokens [B, T] that follow `start` earlier ones; sharded as the tokens are."""
    rank = _index(tokens) + start
    return Mask({"rank": rank, "segment": jnp.zeros_like(rank)}, causal=isinstance(start, int) and start == 0)


def padded(valid: jax.Array) -> Mask:
    """Causal among the tokens where `valid` (bool or int [B, T]) holds; the rest, on either side, is padding."""
    return packed(jnp.where(valid.astype(bool), 0, PAD))


def packed(segment: jax.Array) -> Mask:
    """Causal within each document of a packed row."""
    return Mask(_ranked(segment))


def bidirectional(segment: jax.Array) -> Mask:
    """An encoder's: every token sees all of its document."""
    return Mask({"segment": segment.astype(jnp.int32)}, rule=SAME_SEGMENT)


def prefix(context: jax.Array, length: int) -> Mask:
    """Prefix-LM, and GLM's blank infilling: the first `context[b]` tokens see one another and nothing else, every
    later token sees all of them and the later ones up to itself (Du et al. 2022, section 2.1).

    context: int32 [B], the length of part A. length: T.
    """
    index = jnp.arange(length, dtype=jnp.int32)
    rank = jnp.where(index < context[:, None], 0, index + 1)
    return Mask({"rank": rank, "segment": jnp.zeros_like(rank)})


def infilling(segment: jax.Array, context: jax.Array) -> Mask:
    """`prefix` for documents of a packed row: tokens of a document's part A see one another, those of its part B also
    themselves and the part B before them. The ranks are `train.infill`'s, counted from where the document begins.

    context: bool or int [B, T], True in part A.
    """
    index = _index(segment)
    rank = jnp.where(context.astype(bool), index - _position(segment), index + 1)
    return Mask({"rank": rank, "segment": segment.astype(jnp.int32)})


def choices(choice: jax.Array) -> Mask:
    """A text and several answers behind it: as `prefix`, but an answer sees no other (THUDM/GLM-130B
    evaluation/dataset.py). choice: int32 [B, T], 0 in the text, 1, 2, ... in the answers, PAD for padding."""
    choice = choice.astype(jnp.int32)
    rank = jnp.where(choice == 0, 0, _index(choice) + 1)
    segment = jnp.where(choice < 0, PAD, 0).astype(jnp.int32)
    of_text_or_own = KRange("choice", 0, 0) | Band("choice", 0, 0)
    return Mask({"rank": rank, "segment": segment, "choice": choice}, rule=CAUSAL & SAME_SEGMENT & of_text_or_own)


def window(segment: jax.Array, width: int) -> Mask:
    """A token sees itself and the `width` - 1 before it (Mistral: Jiang et al. 2023, arXiv 2310.06825, section 2; the
    banded layers of GPT-3). Raises ValueError for a width below 1."""
    _check(width=width)
    return Mask(_ranked(segment), rule=Band("rank", 0, width - 1) & SAME_SEGMENT)


def strided(segment: jax.Array, width: int, stride: int) -> Mask:
    """`window`, and every token a multiple of `stride` back (Sparse Transformer, strided: Child et al. 2019, arXiv
    1904.10509, section 4.3; both of its patterns in one head). Raises ValueError for sizes below 1."""
    _check(width=width, stride=stride)
    streams = _ranked(segment)
    near = Band("rank", 0, width - 1) | Band("phase", 0, 0)
    return Mask({**streams, "phase": streams["rank"] % stride}, rule=CAUSAL & SAME_SEGMENT & near)


def within(mask: Mask, reach: jax.Array | int, stride: int = 0) -> Mask:
    """The mask, which has the stream `position` on both sides, narrowed to a window: a token sees itself and the
    `reach` - 1 before it of what it saw.

    GPT-3 alternates dense layers and banded ones: in a scan over the layers `reach` differs between them.

    reach: an int, or an int32 scalar of traced data (`kernels.mask.INF` for all).
    stride: where not 0, also every token a multiple of `stride` back, as in `strided`.
    """
    key = mask.key_streams()
    rule: Rule = Within()
    query = {**mask.query, "reach": jnp.zeros_like(mask.query["position"]) + jnp.int32(reach)}
    if stride:
        rule = rule | Band("phase", 0, 0)
        query["phase"], key = query["position"] % stride, {**key, "phase": key["position"] % stride}
    return Mask(query, key, mask.rule & rule)


def fixed(segment: jax.Array, block: int, summary: int) -> Mask:
    """A token sees its own block up to itself and the last `summary` tokens of every earlier block (Sparse Transformer,
    fixed: Child et al. 2019, arXiv 1904.10509, section 4.3, l = block, c = summary; both of its patterns in one head).

    Raises ValueError for sizes below 1 and a summary longer than the block.
    """
    _check(block=block, summary=summary)
    if summary > block:
        raise ValueError(f"the last {summary} tokens of a block of {block} are more than it has")
    position = _position(segment)
    streams = {**_ranked(segment), "block": position // block, "rest": block - 1 - position % block}
    return Mask(streams, rule=CAUSAL & SAME_SEGMENT & (Band("block", 0, 0) | KRange("rest", 0, summary - 1)))


def sinks_and_window(segment: jax.Array, sinks: int, width: int) -> Mask:
    """`window`, and the first `sinks` tokens of the document (StreamingLLM: Xiao et al. 2023, arXiv 2309.17453,
    section 3.2). Raises ValueError for sizes below 1."""
    _check(sinks=sinks, width=width)
    near = Band("rank", 0, width - 1) | KRange("position", 0, sinks - 1)
    return Mask({**_ranked(segment), "position": _position(segment)}, rule=CAUSAL & SAME_SEGMENT & near)


def bigbird(segment: jax.Array, key: jax.Array, *, block: int, first: int = 1, near: int = 1, random: int = 3) -> Mask:
    """An encoder's sparse attention in blocks of `block` tokens: a token sees the `first` blocks of its document, its
    own block, `near` blocks on either side, and `random` others, drawn for its block without repetition from those
    left; the first blocks see everything (BigBird: Zaheer et al. 2020, arXiv 2007.14062, section 2, the internal
    construction). A document too short for that many random blocks has all of them.

    key: the random key; the same key and segments draw the same blocks. Raises ValueError for sizes below 1 (`near`
    and `random`: below 0).
    """
    _check(block=block, first=first, near=near + 1, random=random + 1)
    index, position = _index(segment), _position(segment)
    own = position // block
    count = -(-(jnp.flip(_position(jnp.flip(segment, 1)), 1) + position + 1) // block)  # blocks of the document
    low = jnp.maximum(own - near, first)  # first..low and high..count are the blocks to draw from
    high = jnp.clip(own + near + 1, low, count)
    left = count - first - (high - low)
    draws = jax.random.uniform(key, (random, *segment.shape))
    chosen: list[jax.Array] = []
    for i in range(random):
        draw = jnp.take_along_axis(draws[i], index - position % block, axis=1)  # one for all tokens of a block
        pick = jnp.minimum((draw * (left - i)).astype(jnp.int32), left - i - 1)
        for earlier in chosen:  # ascending
            pick += pick >= earlier
        chosen = _ascending([*chosen, jnp.where(i < left, pick, INF)])
    names = [f"random{i}" for i in range(random)]
    picks = {}
    for name, pick in zip(names, chosen, strict=True):
        at = first + pick
        picks[name] = jnp.where(pick == INF, -1, at + jnp.where(at >= low, high - low, 0))
    # Bit 0 says that the key is of a first block, bit 1 that the query is; the other side has it always.
    is_first = (own < first).astype(jnp.int32)
    streams = {"segment": segment.astype(jnp.int32), "block": own, "first": 1 + 2 * is_first}
    keys = Mask(streams).key_streams() | {"first": 2 + is_first}
    rule: Rule = Bits("first") | Band("block", -near, near)
    for name in names:
        rule = rule | Band(name, 0, 0, of="block")
    return Mask(streams | picks, keys, SAME_SEGMENT & rule)


def shifted(segment: jax.Array, group: int) -> tuple[Mask, Mask]:
    """LongLoRA's shifted sparse attention, for `attention(mask=...)`: the first half of the heads is causal within
    groups of `group` tokens, the second half within groups that begin half a group later (Chen et al. 2023, arXiv
    2309.12307, section 3.2).

    The first and the last half group of the second half of the heads stand alone, as in the authors' FlashAttention
    code (dvlab-research/LongLoRA llama_attn_replace.py, forward_flashattn). Their other code rolls the tokens instead
    and makes one group of the two, whose beginning of the text then sees the end of it.

    Raises ValueError for a group below 2.
    """
    if group < 2:
        raise ValueError(f"half of a group of {group} tokens is none")
    streams, position = _ranked(segment), _position(segment)
    rule = CAUSAL & SAME_SEGMENT & Band("group", 0, 0)
    plain, later = (Mask({**streams, "group": (position + s) // group}, rule=rule) for s in (0, group - group // 2))
    return plain, later


def tree(parents: Sequence[int] | np.ndarray | jax.Array, slots: jax.Array) -> Mask:
    """Drafts as a tree over a cache: a node sees the committed text, its ancestors and itself (tree attention of
    Medusa, Cai et al. 2024, arXiv 2401.10774, and EAGLE, Li et al. 2024, arXiv 2401.15077).

    parents: of N nodes, int [N] or [B, N]: the number of a node's parent, -1 for nodes that follow the text.
    slots: int32 [B, S], what each slot of the cache holds: the number of a node, COMMITTED (-1) or EMPTY (-2).

    The mask is of N queries and S keys, as bits: one for every node, in `bits0`, `bits1`, `bits2` by thirties, and one
    in `bits0` that every query shares with the committed text.

    Raises ValueError for no node or more than 90, and for parents, where they are not traced, that are not before their
    node.
    """
    if not isinstance(parents, jax.core.Tracer):
        given = np.asarray(parents)
        if (given >= np.arange(given.shape[-1])).any() or (given < -1).any():
            raise ValueError(f"the parent of a node is one before it, or -1: {given.tolist()}")
    up = jnp.asarray(parents, jnp.int32)
    nodes = up.shape[-1]
    up = jnp.broadcast_to(up, (slots.shape[0], nodes))
    if not 0 < nodes <= WORD * WORDS:
        raise ValueError(f"a tree of {nodes} nodes: 1 to {WORD * WORDS} fit into {WORDS} words of {WORD} bits")
    words = range(-(-nodes // WORD))
    seen = [_bit(_index(up), word) for word in words]
    for _ in range((nodes - 1).bit_length()):  # ancestors up to 1, 2, 4, ... generations back
        has, place = up >= 0, jnp.maximum(up, 0)
        seen = [bits | jnp.where(has, jnp.take_along_axis(bits, place, 1), 0) for bits in seen]
        up = jnp.where(has, jnp.take_along_axis(up, place, 1), -1)
    query = {f"bits{word}": bits for word, bits in zip(words, seen, strict=True)}
    key = {f"bits{word}": _bit(slots, word) for word in words}
    query["bits0"] |= 1 << WORD
    key["bits0"] = jnp.where(slots == COMMITTED, 1 << WORD, key["bits0"])
    rule: Rule = Bits("bits0")
    for word in words[1:]:
        rule = rule | Bits(f"bits{word}")
    return Mask(query, key, rule)


def _bit(node: jax.Array, word: int) -> jax.Array:
    """The bit of a node in a word of thirty, int32; 0 where it is in another."""
    place = node - WORD * word
    return jnp.where((place >= 0) & (place < WORD), 1 << jnp.clip(place, 0, WORD - 1), 0).astype(jnp.int32)


def _index(like: jax.Array) -> jax.Array:
    """0, 1, 2, ... in every row of [B, T], int32; sharded as the rows are."""
    return jnp.zeros_like(like, jnp.int32) + jnp.arange(like.shape[1], dtype=jnp.int32)


def _position(segment: jax.Array) -> jax.Array:
    """Where each token stands in its document, int32 [B, T]."""
    index = _index(segment)
    begins = jnp.concatenate([jnp.ones_like(segment[:, :1], bool), segment[:, 1:] != segment[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def _ranked(segment: jax.Array) -> Streams:
    return {"rank": _index(segment), "segment": segment.astype(jnp.int32)}


def _ascending(arrays: list[jax.Array]) -> list[jax.Array]:
    return list(jnp.sort(jnp.stack(arrays), axis=0))


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} of a mask is too small: {sizes}")
