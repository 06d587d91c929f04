"""LLaMA 1, 2 and 3 and their kin: pre-norm blocks with RMSNorm, rotary positions, grouped queries and a gated MLP.

Mistral adds a sliding window; Qwen 2 biases of query, key and value; Baichuan 13B takes ALiBi for the rotation, and
Baichuan 2 normalises the rows of the output head.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, L layers. Sources: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Llama team 2024 (2407.21783);
meta-llama/llama-models models/llama3/model.py; Jiang et al. 2023 (2310.06825), Yang et al. 2024 (2407.10671), Yang et
al. 2023 (2309.10305), modeling_baichuan.py of the Baichuan checkpoints. Weights are in the Hugging Face order
(rotation pairs entry i of a head with i + C/2), not Meta's interleaved one.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core.config import check_flags, check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import Layout
from garrulax.core.spec import ParamSpec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import INF, Mask
from garrulax.layers import rope
from garrulax.layers.attention import alibi_slopes, attend, default_positions, within
from garrulax.layers.cache import Cache, admit, whole_length
from garrulax.layers.mlp import check_activation, gated_mlp, linear
from garrulax.layers.norms import rms_norm, unit_norm
from garrulax.layers.rope import Rope
from garrulax.layers.stack import run
from garrulax.models import llama_hf

HEAD_EPS = 1e-12  # least length by which a row of the head is divided (modeling_baichuan.py, NormHead)


@dataclasses.dataclass(frozen=True)
class Config:
    """LLaMA and its kin. Defaults are LLaMA 7B.

    vocab, context: tokens (the context is advice: rotary positions go on). width, layers, heads, kv_heads,
    head_dim, mlp_width: sizes; head_dim 0 stands for width / heads. activation: of the gate. norm_eps: of the norms.
    positions: "rope" or "alibi". rope: rotary settings. window: how many tokens back one sees, itself included; 0 for
    all. window_from: the first layer with the window. attention_dropout: used where forward is given a key. qkv_bias,
    out_bias, mlp_bias: whether these linear layers have biases. tied: the output is the token embedding.
    normalized_head: the rows of the output head are divided by their length when they are used. init_std: of the
    initial weights. bos, eos: token ids; eos may be several. dialect: the format of its checkpoints, "llama",
    "mistral", "qwen2" or "baichuan"; what their config.json cannot say is refused.
    """

    vocab: int = 32000
    context: int = 2048
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 0
    mlp_width: int = 11008
    activation: str = "silu"
    norm_eps: float = 1e-6
    positions: str = "rope"
    rope: Rope = Rope()
    window: int = 0
    window_from: int = 0
    attention_dropout: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    normalized_head: bool = False
    init_std: float = 0.02
    bos: int | None = 1
    eos: int | tuple[int, ...] | None = 2
    dialect: str = "llama"

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads", "kv_heads", "mlp_width")
        if self.head_dim == 0:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        check_sizes(self, "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        check_sizes(self, "window", "window_from", least=0)
        if self.window_from and not self.window:
            raise ValueError(f"window_from={self.window_from} does nothing without a window")
        if self.window_from >= self.layers:
            raise ValueError(f"window_from={self.window_from} leaves none of {self.layers} layers with the window")
        check_activation(self.activation)
        check_rates(self, "attention_dropout")
        check_positive(self, "norm_eps", "init_std")
        check_flags(self, "qkv_bias", "out_bias", "mlp_bias", "tied", "normalized_head")
        check_ids(self, "bos", "eos", several=("eos",))
        self._check_positions()
        if self.normalized_head and self.tied:
            raise ValueError("normalized_head and tied: a normalised head cannot be the token embedding")
        llama_hf.check_dialect(self)

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: the context, or more where the rotary positions are stretched."""
        return self.rope.max_length(self.context)

    def _check_positions(self):
        if self.positions not in ("rope", "alibi"):
            raise ValueError(f"unknown positions {self.positions!r}: choose from rope, alibi")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        if self.positions == "alibi" and self.rope != Rope():
            raise ValueError(f"positions 'alibi' turn nothing: {self.rope} would do nothing")


def parameters(c: Config) -> Tree:
    """The ParamSpec tree."""
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width
    weight = normal(c.init_std)
    h = "model.layers.{}."

    def norm(name):
        return {"scale": ParamSpec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector")}

    def heads(name, count, axis):  # stored [count * C, D], or as one of three parts of Baichuan's W_pack
        if c.dialect == "baichuan":
            part = ("q_proj", "k_proj", "v_proj").index(name)
            stored, rows = Stored(h + "self_attn.W_pack.weight", (3, count, C, D), (2, 0, 1), (part,)), 3 * count * C
        else:
            stored, rows = Stored(h + f"self_attn.{name}.weight", (count, C, D), (2, 0, 1)), count * C
        return ParamSpec((D, count, C), ("embed", axis, "head"), weight, stored, (rows, D))

    def dense(name, rows, columns, axes):  # stored [columns, rows]
        stored = Stored(h + f"mlp.{name}.weight", (columns, rows), (1, 0))
        return ParamSpec((rows, columns), axes, weight, stored, (columns, rows))

    def bias(name, shape, axes):
        return ParamSpec(shape, axes, zeros, Stored(h + f"{name}.bias"), (math.prod(shape),), role="vector")

    def table(name):
        return ParamSpec((c.vocab, D), ("vocab", "embed"), weight, Stored(name), role="embedding")

    attention = {
        "query": heads("q_proj", H, "heads"),
        "key": heads("k_proj", K, "kv_heads"),
        "value": heads("v_proj", K, "kv_heads"),
        "out": ParamSpec(
            (H, C, D), ("heads", "head", "embed"), weight,
            Stored(h + "self_attn.o_proj.weight", (D, H, C), (1, 2, 0)), (D, H * C), inputs=2,
        ),
    }  # fmt: skip
    if c.qkv_bias:
        attention |= {
            "query_bias": bias("self_attn.q_proj", (H, C), ("heads", "head")),
            "key_bias": bias("self_attn.k_proj", (K, C), ("kv_heads", "head")),
            "value_bias": bias("self_attn.v_proj", (K, C), ("kv_heads", "head")),
        }
    if c.out_bias:
        attention["out_bias"] = bias("self_attn.o_proj", (D,), ("embed",))
    mlp = {
        "gate": dense("gate_proj", D, F, ("embed", "mlp")),
        "up": dense("up_proj", D, F, ("embed", "mlp")),
        "down": dense("down_proj", F, D, ("mlp", "embed")),
    }
    if c.mlp_bias:
        mlp |= {
            "gate_bias": bias("mlp.gate_proj", (F,), ("mlp",)),
            "up_bias": bias("mlp.up_proj", (F,), ("mlp",)),
            "down_bias": bias("mlp.down_proj", (D,), ("embed",)),
        }
    tree = {
        "tokens": table("model.embed_tokens.weight"),
        "blocks": stacked(
            c.layers,
            {
                "attention_norm": norm(h + "input_layernorm"),
                "attention": attention,
                "mlp_norm": norm(h + "post_attention_layernorm"),
                "mlp": mlp,
            },
        ),
        "norm": norm("model.norm"),
    }
    if not c.tied:
        tree["head"] = table("lm_head.weight")
    return tree


def hidden(
    params: Tree,
    tokens: jax.Array,
    c: Config,
    *,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] after the last norm, and the cache. Arguments as in `garrulax.forward`."""
    positions = default_positions(tokens, cache) if positions is None else positions
    view, cache = admit(tokens, positions, mask, cache)
    x = lookup(params["tokens"], tokens)
    turn, slopes = _positions(c, positions, cache, x.dtype)

    def block(x, p, kv, layer, key):
        y, kv = attention(rms_norm(x, **p["attention_norm"], eps=c.norm_eps), p["attention"], kv, layer, key)
        x = x + y
        return x + gated_mlp(rms_norm(x, **p["mlp_norm"], eps=c.norm_eps), p["mlp"], c.activation), kv

    def attention(x, p, kv, layer, key):
        q = turn(linear("BTD,DHC->BTHC", x, p, "query"))
        k = turn(linear("BTD,DKC->BTKC", x, p, "key"))
        v = linear("BTD,DKC->BTKC", x, p, "value")
        y, kv = attend(q, k, v, seen(layer), kv, layer, alibi=slopes, dropout=c.attention_dropout, dropout_key=key)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    def seen(layer):
        if not c.window_from:  # the same in all layers: a scan computes the mask once
            return within(view, c.window) if c.window else view
        return within(view, jnp.where(layer >= c.window_from, c.window, INF))

    x, cache = run(block, x, params["blocks"], cache=cache, key=key, remat=remat, unroll=unroll)
    return rms_norm(x, **params["norm"], eps=c.norm_eps), cache


def _positions(c: Config, positions: jax.Array, cache: Cache | None, dtype: Any) -> tuple[Callable, Any]:
    """How queries and keys are turned, and the slopes of ALiBi or None."""
    if c.positions == "alibi":
        return lambda x: x, alibi_slopes(c.heads)
    cosine, sine = rope.table(c.rope, positions, c.head_dim, whole_length(positions, cache), dtype)
    return lambda x: rope.rotate_halves(x, cosine, sine), None


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    head = params["tokens" if c.tied else "head"]
    return einsum("BTD,VD->BTV", x, unit_norm(head, HEAD_EPS) if c.normalized_head else head)


def fold_head(params: Tree, c: Config) -> tuple[Tree, Config]:
    """(params, config) whose head holds the normalised rows themselves: for decoding, which then need not normalise
    them in every step, and for the other dialects (`dataclasses.replace(config, dialect="llama")`), which cannot."""
    if not c.normalized_head:
        return params, c
    head = unit_norm(params["head"], HEAD_EPS)
    return {**params, "head": head}, dataclasses.replace(c, normalized_head=False)


DIALECTS = llama_hf.DIALECTS


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json in any of the dialects. Raises ValueError as `llama_hf.read` does."""
    return Config(**llama_hf.read(raw))


def to_hf(c: Config) -> dict:
    """The config.json of `c` in its dialect."""
    return llama_hf.write(c)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the ParamSpec tree's."""
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if c.tied else {}
    return Layout(prefix="model.", tied=tied, buffers=(".rotary_emb.inv_freq",))


_LLAMA2 = Config(context=4096, norm_eps=1e-5)
_LLAMA3 = Config(
    vocab=128256, context=8192, kv_heads=8, mlp_width=14336, norm_eps=1e-5, rope=Rope(theta=500_000.0),
    bos=128000, eos=128001,
)  # fmt: skip
_LLAMA31 = dataclasses.replace(
    _LLAMA3, context=131072, rope=Rope(theta=500_000.0, kind="llama3", factor=8.0, original_context=8192)
)
_LLAMA32 = dataclasses.replace(_LLAMA31, rope=dataclasses.replace(_LLAMA31.rope, factor=32.0), tied=True)


def _sized(base: Config, **sizes: Any) -> Config:
    """`base` with other sizes; head_dim follows from them unless given."""
    return dataclasses.replace(base, **{"head_dim": 0, **sizes})


_405B = _sized(_LLAMA31, width=16384, layers=126, heads=128, kv_heads=8, mlp_width=53248)
_13B = {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "mlp_width": 13824}
_70B = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "mlp_width": 28672}
_MISTRAL = Config(
    context=32768, kv_heads=8, mlp_width=14336, norm_eps=1e-5, rope=Rope(theta=1_000_000.0), dialect="mistral"
)
_QWEN2 = Config(
    vocab=152064, context=131072, rope=Rope(theta=1_000_000.0), qkv_bias=True, bos=151643, eos=151643, dialect="qwen2"
)
_SMALL_QWEN2 = dataclasses.replace(_QWEN2, vocab=151936, tied=True)
_BAICHUAN = Config(vocab=64000, context=4096, dialect="baichuan")
_BAICHUAN_13B = _sized(_BAICHUAN, **{**_13B, "mlp_width": 13696}, positions="alibi")
_BAICHUAN2: dict[str, Any] = {"vocab": llama_hf.BAICHUAN2_VOCAB, "normalized_head": True}

#: All but the last as published (Qwen 2: the base models); llama-tiny trains on a laptop in minutes.
PRESETS = {
    "llama-7b": Config(),
    "llama-13b": _sized(Config(), **_13B),
    "llama-33b": _sized(Config(), width=6656, layers=60, heads=52, kv_heads=52, mlp_width=17920),
    "llama-65b": _sized(Config(), width=8192, layers=80, heads=64, kv_heads=64, mlp_width=22016),
    "llama2-7b": _LLAMA2,
    "llama2-13b": _sized(_LLAMA2, **_13B),
    "llama2-70b": _sized(_LLAMA2, **_70B),
    "llama3-8b": _LLAMA3,
    "llama3-70b": _sized(_LLAMA3, **_70B),
    "llama3.1-8b": _LLAMA31,
    "llama3.1-70b": _sized(_LLAMA31, **_70B),
    "llama3.1-405b": _405B,
    "llama3-405b": _405B,  # there is no other
    "llama3.2-1b": _sized(_LLAMA32, width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192),
    "llama3.2-3b": _sized(_LLAMA32, width=3072, layers=28, heads=24, kv_heads=8, mlp_width=8192),
    "llama3.3-70b": _sized(_LLAMA31, **_70B),
    "mistral-7b": dataclasses.replace(_MISTRAL, window=4096, rope=Rope()),
    "mistral-7b-v0.2": _MISTRAL,
    "mistral-7b-v0.3": dataclasses.replace(_MISTRAL, vocab=32768),
    "qwen2-0.5b": _sized(_SMALL_QWEN2, width=896, layers=24, heads=14, kv_heads=2, mlp_width=4864),
    "qwen2-1.5b": _sized(_SMALL_QWEN2, width=1536, layers=28, heads=12, kv_heads=2, mlp_width=8960),
    "qwen2-7b": _sized(_QWEN2, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944),
    "qwen2-72b": _sized(_QWEN2, **{**_70B, "mlp_width": 29568}, norm_eps=1e-5),
    "baichuan-7b": _BAICHUAN,
    "baichuan-13b": _BAICHUAN_13B,
    "baichuan2-7b": dataclasses.replace(_BAICHUAN, **_BAICHUAN2),
    "baichuan2-13b": dataclasses.replace(_BAICHUAN_13B, **_BAICHUAN2),
    "llama-tiny": Config(
        vocab=4096, context=128, width=128, layers=4, heads=4, kv_heads=2, mlp_width=352, tied=True, bos=None, eos=0
    ),
}
