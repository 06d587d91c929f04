"""LLaMA and Falcon in float64, token by token over an explicit list of keys: the reference for caches. O(T²)."""

import math

import jax
import ml_dtypes
import numpy as np

from garrulax.layers.attention import alibi_slopes


def logits(params, c, tokens, chosen, counted):
    """Logits [T, V] of a text.

    Args:
        params: Stacked parameters of LLaMA or Falcon.
        c: Its Config.
        tokens: The text, a list of T ids.
        chosen: (number of the query, queries of a key/value head [T, G, C], its keys [T, C]), before the rotary
            embedding -> numbers of the tokens that the query attends to, in the order of the text.
        counted: Whether the position of a key is its place in that list, and not its place in the text.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    falcon = hasattr(c, "parallel")
    alibi = c.alibi if falcon else c.positions == "alibi"
    x = params["tokens"][np.array(tokens)]  # [T, D]
    for i in range(c.layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        a, y = p["attention"], _norm(x, p["attention_norm"], c)
        query = "td,dkgc->tkgc" if falcon else "td,dhc->thc"
        q = np.einsum(query, y, a["query"]).reshape(len(x), c.kv_heads, -1, c.head_dim)
        k, v = (np.einsum("td,dkc->tkc", y, a[name]) for name in ("key", "value"))
        z = _attention(q, k, v, c, chosen, counted, alibi, falcon)  # [T, K, G, C]
        out = a["out"].reshape(-1, c.width)
        z = z.reshape(len(x), -1) @ out
        if falcon:
            up = y @ p["mlp"]["up"]
            gelu = 0.5 * up * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
            x = x + z + gelu @ p["mlp"]["down"]
        else:
            x = x + z
            y, m = _norm(x, p["mlp_norm"], c), p["mlp"]
            gate = y @ m["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ m["up"])) @ m["down"]
    return _norm(x, params["norm"], c) @ params["tokens"].T


def _norm(x, p, c):
    if "bias" in p:
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + c.norm_eps) * p["scale"] + p["bias"]
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + c.norm_eps) * p["scale"]


def _attention(q, k, v, c, chosen, counted, alibi, falcon):
    T, K, G, C = q.shape
    out = np.zeros((T, K, G, C))
    slopes = alibi_slopes(c.heads).reshape(K, G)
    for i in range(T):
        for h in range(K):
            keys = np.array(chosen(i, q[:, h], k[:, h]))
            assert keys[-1] == i
            place = np.arange(len(keys)) if counted else keys
            mine, theirs = q[i, h], k[keys, h]
            if not alibi:
                mine, theirs = _rotated(mine, place[-1:], c), _rotated(theirs, place, c)
            scores = mine @ theirs.T / math.sqrt(C)  # [G, n]
            if alibi and falcon:  # slope, position and their product in bfloat16, then divided with the scores
                short = [y.astype(ml_dtypes.bfloat16).astype(np.float64) for y in (slopes[h][:, None], place[None])]
                scores += (short[0] * short[1]).astype(ml_dtypes.bfloat16).astype(np.float64) / math.sqrt(C)
            elif alibi:
                scores += slopes[h][:, None] * (place - place[-1])
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[i, h] = weights / weights.sum(axis=-1, keepdims=True) @ v[keys, h]
    return out


def _rotated(x, place, c):
    """x [n, C] rotated by positions [n] or [1], entry i with i + C/2."""
    half = c.head_dim // 2
    angle = place[:, None] * c.rope.theta ** (-np.arange(half) / half)
    a, b, cos, sin = x[:, :half], x[:, half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def window(size):
    """`chosen` of a window."""
    return lambda i, q, k: list(range(max(0, i - size + 1), i + 1))


def sinks(first, size):
    """`chosen` of StreamingLLM: the first tokens and the last ones."""
    return lambda i, q, k: [t for t in range(i + 1) if t < first or t > i - size]


def blocks(kind):
    """`chosen` of InfLLM."""

    def chosen(i, q, k):
        start = lambda b: kind.first + b * kind.size  # noqa: E731
        outside = max(0, (i + 1 - kind.local - kind.first) // kind.size)
        relevance = []
        for b in range(outside):
            inside = np.arange(start(b), start(b + 1))
            following = q[start(b + 1) : start(b + 1) + kind.local].sum(axis=(0, 1))
            best = inside[np.argsort(-(k[inside] @ following), kind="stable")[: kind.representatives]]
            relevance.append((q[i] @ k[best].T).max())
        top = sorted(np.argsort(-np.array(relevance), kind="stable")[: kind.top]) if relevance else []
        middle = [t for b in top for t in range(start(b), start(b + 1))]
        return [*range(min(kind.first, i + 1)), *middle, *range(start(outside), i + 1)]

    return chosen
