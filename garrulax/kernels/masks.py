"""The masks of the literature by name. Each function returns a `Mask`: streams [B, T] and a rule over them.

Most take `segment`, int32 [B, T]: the document of each token of a packed row, PAD (-1) for padding. The tokens of a
document are contiguous, and blocks and positions count from its first token. A token attends only within its document;
padding attends to nothing and is attended to by nothing.

Sizes are static, arrays are data: other arrays of the same shape compile nothing anew. No array made here is larger
than the streams.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.kernels.mask import CAUSAL, INF, PAD, SAME_SEGMENT, Band, Bits, KRange, Mask, Rule, Streams, Within

BITS_PER_WORD = 30  # nodes of a tree per int32 stream: bit 30 is for the committed text, the sign bit stays clear
MAX_WORDS = 3
COMMITTED, EMPTY = -1, -2  # contents of a cache slot that holds no node of a tree


def causal(batch: int, length: int) -> Mask:
    """Every token attends to itself and to all tokens before it."""
    rank = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Mask({"rank": rank, "segment": jnp.zeros_like(rank)}, causal=True)


def causal_from(tokens: jax.Array, start: jax.Array | int = 0) -> Mask:
    """Causal for tokens [B, T] that follow `start` earlier ones; its streams are sharded like the tokens."""
    rank = _index(tokens) + start
    return Mask({"rank": rank, "segment": jnp.zeros_like(rank)}, causal=isinstance(start, int) and start == 0)


def padded(valid: jax.Array) -> Mask:
    """Causal among the tokens where `valid` (bool or int [B, T]) is true; the others, left or right, are padding."""
    return packed(jnp.where(valid.astype(bool), 0, jnp.int32(PAD)))


def packed(segment: jax.Array) -> Mask:
    """Causal within each document of a packed row."""
    return Mask(_ranked(segment))


def bidirectional(segment: jax.Array) -> Mask:
    """For encoders: every token attends to all tokens of its document."""
    return Mask({"segment": segment.astype(jnp.int32)}, rule=SAME_SEGMENT)


def prefix(context: jax.Array, length: int) -> Mask:
    """Prefix-LM, and GLM's blank infilling (Du et al. 2022, section 2.1).

    The first `context[b]` tokens (part A) attend to one another. Each later token attends to part A and to the later
    tokens up to itself.

    Args:
        context: int32 [B], the length of part A.
        length: T.
    """
    index = jnp.arange(length, dtype=jnp.int32)[None]
    rank = jnp.where(index < context[:, None], 0, index + 1)
    return Mask({"rank": rank, "segment": jnp.zeros_like(rank)})


def infilling(segment: jax.Array, context: jax.Array) -> Mask:
    """`prefix` for each document of a packed row.

    Tokens of a document's part A attend to one another; a token of its part B attends to part A and to part B up to
    itself. The ranks are those of `train.infill`, counted from the first token of the document.

    Args:
        segment: int32 [B, T], the document of each token.
        context: bool or int [B, T], true in part A.
    """
    index = _index(segment)
    rank = jnp.where(context.astype(bool), index - _position(segment), index + 1)
    return Mask({"rank": rank, "segment": segment.astype(jnp.int32)})


def choices(choice: jax.Array) -> Mask:
    """A text followed by several answers that do not attend to one another (THUDM/GLM-130B evaluation/dataset.py).

    Within the text and an answer it is `prefix`.

    Args:
        choice: int32 [B, T], 0 in the text, 1, 2, ... in the answers, PAD for padding.
    """
    choice = choice.astype(jnp.int32)
    rank = jnp.where(choice == 0, 0, _index(choice) + 1)
    segment = jnp.where(choice < 0, PAD, 0).astype(jnp.int32)
    text_or_same_answer = KRange("choice", 0, 0) | Band("choice", 0, 0)
    return Mask({"rank": rank, "segment": segment, "choice": choice}, rule=CAUSAL & SAME_SEGMENT & text_or_same_answer)


def window(segment: jax.Array, width: int) -> Mask:
    """A token attends to itself and the `width` - 1 tokens before it.

    Sources: Mistral, Jiang et al. 2023, arXiv 2310.06825, section 2; the banded layers of GPT-3.
    Raises ValueError for a width below 1.
    """
    _check(width=width)
    return Mask(_ranked(segment), rule=Band("rank", 0, width - 1) & SAME_SEGMENT)


def strided(segment: jax.Array, width: int, stride: int) -> Mask:
    """`window`, and every earlier token at a distance that is a multiple of `stride`.

    Source: Sparse Transformer, strided: Child et al. 2019, arXiv 1904.10509, section 4.3, both patterns in one head.
    Raises ValueError for sizes below 1.
    """
    _check(width=width, stride=stride)
    streams = _ranked(segment)
    near = Band("rank", 0, width - 1) | Band("phase", 0, 0)
    return Mask({**streams, "phase": streams["rank"] % stride}, rule=CAUSAL & SAME_SEGMENT & near)


def within(mask: Mask, reach: jax.Array | int, stride: int = 0) -> Mask:
    """Narrows a mask to a window: of the keys that it allows, a token keeps itself and the `reach` - 1 before it.

    GPT-3 alternates dense and banded layers: in a scan over the layers each has its own `reach`.

    Args:
        mask: A mask with the stream `position` of queries and keys.
        reach: Width of the window: an int, or an int32 scalar that may be traced; `kernels.mask.INF` is no window.
        stride: If not 0, the token also keeps keys at a distance that is a multiple of `stride`, as in `strided`.
    """
    key = mask.key_streams()
    rule: Rule = Within()
    query = {**mask.query, "reach": jnp.zeros_like(mask.query["position"]) + jnp.int32(reach)}
    if stride:
        rule = rule | Band("phase", 0, 0)
        query["phase"], key = query["position"] % stride, {**key, "phase": key["position"] % stride}
    return Mask(query, key, mask.rule & rule)


def fixed(segment: jax.Array, block: int, summary: int) -> Mask:
    """A token attends to its own block up to itself, and to the last `summary` tokens of every earlier block.

    Source: Sparse Transformer, fixed: Child et al. 2019, arXiv 1904.10509, section 4.3, with l = block and c = summary,
    both patterns in one head. Raises ValueError for sizes below 1 and for a summary longer than the block.
    """
    _check(block=block, summary=summary)
    if summary > block:
        raise ValueError(f"a summary of {summary} tokens is longer than a block of {block}")
    position = _position(segment)
    streams = {**_ranked(segment), "block": position // block, "rest": block - 1 - position % block}
    return Mask(streams, rule=CAUSAL & SAME_SEGMENT & (Band("block", 0, 0) | KRange("rest", 0, summary - 1)))


def sinks_and_window(segment: jax.Array, sinks: int, width: int) -> Mask:
    """`window`, and the first `sinks` tokens of the document.

    Source: StreamingLLM, Xiao et al. 2023, arXiv 2309.17453, section 3.2. Raises ValueError for sizes below 1.
    """
    _check(sinks=sinks, width=width)
    near = Band("rank", 0, width - 1) | KRange("position", 0, sinks - 1)
    return Mask({**_ranked(segment), "position": _position(segment)}, rule=CAUSAL & SAME_SEGMENT & near)


def bigbird(segment: jax.Array, key: jax.Array, *, block: int, first: int = 1, near: int = 1, random: int = 3) -> Mask:
    """Block-sparse attention for encoders (BigBird: Zaheer et al. 2020, arXiv 2007.14062, section 2, internal form).

    A token attends to the first blocks of its document, its own block, the blocks near it, and random ones. The first
    blocks attend to the whole document.

    Args:
        segment: int32 [B, T], the document of each token.
        key: Random key; the same key and segments give the same random blocks.
        block: Tokens of a block, at least 1.
        first: Number of first blocks, at least 1.
        near: Number of blocks on either side of the own one, at least 0.
        random: Number of random blocks, drawn once for each block, without repetition, from the blocks that are neither
            first nor near. A short document takes as many as there are.

    Raises:
        ValueError: For a size below its least value.
    """
    _check(block=block, first=first, near=near + 1, random=random + 1)
    index, position = _index(segment), _position(segment)
    own = position // block
    count = -(-(jnp.flip(_position(jnp.flip(segment, 1)), 1) + position + 1) // block)  # blocks of the document
    # Near blocks are low..high - 1. Random ones are drawn from first..low - 1 and high..count - 1.
    low = jnp.maximum(own - near, first)
    high = jnp.clip(own + near + 1, low, count)
    left = count - first - (high - low)
    draws = jax.random.uniform(key, (random, *segment.shape), jnp.float32)
    chosen: list[jax.Array] = []
    for i in range(random):
        draw = jnp.take_along_axis(draws[i], index - position % block, axis=1)  # one per block
        pick = jnp.minimum((draw * (left - i).astype(jnp.float32)).astype(jnp.int32), left - i - 1)
        for earlier in chosen:  # ascending: skipping each block drawn before makes the draw one without repetition
            pick += (pick >= earlier).astype(jnp.int32)
        chosen = _ascending([*chosen, jnp.where(i < left, pick, INF)])
    names = [f"random{i}" for i in range(random)]
    picks = {}
    for name, pick in zip(names, chosen, strict=True):
        at = first + pick
        picks[name] = jnp.where(pick == INF, -1, at + jnp.where(at >= low, high - low, 0))
    # `Bits` is true where the key is in a first block (bit 0, set in every query) or the query is (bit 1, set in every
    # key).
    is_first = (own < first).astype(jnp.int32)
    streams = {"segment": segment.astype(jnp.int32), "block": own, "first": 1 + 2 * is_first}
    keys = Mask(streams).key_streams() | {"first": 2 + is_first}
    rule: Rule = Bits("first") | Band("block", -near, near)
    for name in names:
        rule = rule | Band(name, 0, 0, of="block")
    return Mask(streams | picks, keys, SAME_SEGMENT & rule)


def shifted(segment: jax.Array, group: int) -> tuple[Mask, Mask]:
    """LongLoRA's shifted sparse attention: two masks, for `attention(mask=...)`.

    The first half of the heads is causal within groups of `group` tokens, the second half within groups shifted by half
    a group (Chen et al. 2023, arXiv 2309.12307, section 3.2).

    In the second half of the heads the first and the last half group are groups of half the size, as in the authors'
    FlashAttention code (dvlab-research/LongLoRA llama_attn_replace.py, forward_flashattn). The authors' other code
    rolls the tokens instead, which joins the two: there the first tokens of a text attend to its last ones.

    Raises ValueError for a group below 2.
    """
    if group < 2:
        raise ValueError(f"group of a mask must be at least 2, not {group}")
    streams, position = _ranked(segment), _position(segment)
    rule = CAUSAL & SAME_SEGMENT & Band("group", 0, 0)
    plain, later = (Mask({**streams, "group": (position + s) // group}, rule=rule) for s in (0, group - group // 2))
    return plain, later


def tree(parents: Sequence[int] | np.ndarray | jax.Array, slots: jax.Array) -> Mask:
    """A tree of draft tokens over a cache: a node attends to the committed text, its ancestors and itself.

    Sources: tree attention of Medusa, Cai et al. 2024, arXiv 2401.10774, and EAGLE, Li et al. 2024, arXiv 2401.15077.

    Each of the N nodes has a bit, thirty to a stream: `bits0`, `bits1`, `bits2`. A query has the bits of its ancestors
    and itself, a key has its own bit. One more bit of `bits0` is set in every query and in the committed text.

    Args:
        parents: int [N] or [B, N]: the number of each node's parent, -1 for nodes that follow the text.
        slots: int32 [B, S], contents of each slot of the cache: the number of a node, COMMITTED (-1) or EMPTY (-2).

    Returns:
        A mask of N queries and S keys.

    Raises:
        ValueError: For no node or more than 90, and (unless parents is traced) for a parent not before its node.
    """
    if not isinstance(parents, jax.core.Tracer):
        given = np.asarray(parents)
        if (given >= np.arange(given.shape[-1])).any() or (given < -1).any():
            raise ValueError(f"the parent of a node must be a node before it, or -1: {given.tolist()}")
    up = jnp.asarray(parents, jnp.int32)
    nodes = up.shape[-1]
    up = jnp.broadcast_to(up, (slots.shape[0], nodes))
    most = BITS_PER_WORD * MAX_WORDS
    if not 0 < nodes <= most:
        raise ValueError(f"a tree of {nodes} nodes: 1 to {most} fit into {MAX_WORDS} words of {BITS_PER_WORD} bits")
    words = range(-(-nodes // BITS_PER_WORD))
    ancestors = [_bit(_index(up), word) for word in words]  # so far the node itself
    for _ in range((nodes - 1).bit_length()):  # pointer doubling: `up` is the ancestor 1, 2, 4, ... generations back
        has, place = up >= 0, jnp.maximum(up, 0)
        ancestors = [bits | jnp.where(has, jnp.take_along_axis(bits, place, 1), 0) for bits in ancestors]
        up = jnp.where(has, jnp.take_along_axis(up, place, 1), -1)
    query = {f"bits{word}": bits for word, bits in zip(words, ancestors, strict=True)}
    key = {f"bits{word}": _bit(slots, word) for word in words}
    query["bits0"] |= 1 << BITS_PER_WORD
    key["bits0"] = jnp.where(slots == COMMITTED, 1 << BITS_PER_WORD, key["bits0"])
    rule: Rule = Bits("bits0")
    for word in words[1:]:
        rule = rule | Bits(f"bits{word}")
    return Mask(query, key, rule)


def _bit(node: jax.Array, word: int) -> jax.Array:
    """The bit of a node in one word, int32; 0 where the node belongs to another word."""
    place = node - BITS_PER_WORD * word
    return jnp.where((place >= 0) & (place < BITS_PER_WORD), 1 << jnp.clip(place, 0, BITS_PER_WORD - 1), 0).astype(
        jnp.int32
    )


def _index(like: jax.Array) -> jax.Array:
    """0, 1, 2, ... in every row of [B, T], int32; sharded like the argument."""
    return jnp.zeros_like(like, jnp.int32) + jnp.arange(like.shape[1], dtype=jnp.int32)[None]


def _position(segment: jax.Array) -> jax.Array:
    """Place of each token in its document, int32 [B, T]."""
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
