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
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core import config as fields
from garrulax.core.config import Count, Flag, OptionalTokenId, Positive, Rate, Size, TokenIds
from garrulax.core.einsum import lookup
from garrulax.core.hf import TensorNames
from garrulax.core.leaf import Leaf
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.kernels import masks
from garrulax.kernels.mask import INF
from garrulax.layers import rope
from garrulax.layers.attention import alibi_slopes, cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.mlp import check_activation, gated_mlp, linear
from garrulax.layers.norms import unit_norm
from garrulax.layers.rope import Rope, rope_max_length
from garrulax.layers.stack import scan_layers
from garrulax.models import contract, llama_hf
from garrulax.models.contract import norm

HEAD_EPS = 1e-12  # least length by which a row of the head is divided (modeling_baichuan.py, NormHead)


@dataclasses.dataclass(frozen=True)
class Config:
    """LLaMA and its kin. Defaults are LLaMA 7B."""

    vocab: Size = 32000  # token ids
    context: Size = 2048  # tokens that it was trained on; rotary positions go on
    width: Size = 4096
    layers: Size = 32
    heads: Size = 32
    kv_heads: Size = 32
    head_dim: Count = 0  # 0 stands for width / heads
    mlp_width: Size = 11008
    activation: str = "silu"  # of the gate
    norm_eps: Positive = 1e-6
    positions: str = "rope"  # or "alibi"
    rope: Rope = Rope()
    window: Count = 0  # tokens that a token attends to, itself included; 0 for all
    window_from: Count = 0  # first layer with the window
    attention_dropout: Rate = 0.0
    qkv_bias: Flag = False
    out_bias: Flag = False  # of the output projection of attention
    mlp_bias: Flag = False
    tied: Flag = False  # the output head is the token embedding
    normalized_head: Flag = False  # the rows of the output head are divided by their length when used (Baichuan 2)
    init_std: Positive = 0.02  # of the initial weights
    bos: OptionalTokenId = 1
    eos: TokenIds = 2
    dialect: str = "llama"  # format of checkpoints: llama, mistral, qwen2 or baichuan

    max_length = rope_max_length

    def __post_init__(self):
        fields.check_fields(self)
        fields.fill_head_dim(self)
        fields.check_groups(self.heads, self.kv_heads)
        if self.window_from and not self.window:
            raise ValueError(f"window_from={self.window_from} does nothing without a window")
        if self.window_from >= self.layers:
            raise ValueError(f"window_from={self.window_from} leaves none of {self.layers} layers with the window")
        check_activation(self.activation)
        if self.positions not in ("rope", "alibi"):
            raise ValueError(f"unknown positions {self.positions!r}: choose from rope, alibi")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions rotate pairs")
        if self.positions == "alibi" and self.rope != Rope():
            raise ValueError(f"with positions='alibi' there are no rotary positions: {self.rope} would do nothing")
        if self.normalized_head and self.tied:
            raise ValueError("normalized_head and tied: a normalised head cannot be the token embedding")
        llama_hf.check_dialect(self)


def parameters(c: Config) -> Tree:
    """The ParamSpec tree."""
    declare = Declare(normal(c.init_std), D=c.width, H=c.heads, K=c.kv_heads, C=c.head_dim, F=c.mlp_width, V=c.vocab)
    h = "model.layers.{}."

    def projection(key: str, part: int, letter: str) -> Tree:
        if c.dialect == "baichuan":  # one tensor with query, key and value one after another
            return declare.linear(key, h + "self_attn.W_pack", f"(three {letter} C) D -> D {letter} C", three=part)
        return declare.linear(key, f"{h}self_attn.{key[0]}_proj", f"({letter} C) D -> D {letter} C", bias=c.qkv_bias)

    layer = {
        "attention_norm": declare.rms_norm(h + "input_layernorm"),
        "attention": {
            **projection("query", 0, "H"),
            **projection("key", 1, "K"),
            **projection("value", 2, "K"),
            **declare.linear("out", h + "self_attn.o_proj", "D (H C) -> H C D", bias=c.out_bias),
        },
        "mlp_norm": declare.rms_norm(h + "post_attention_layernorm"),
        "mlp": {
            **declare.linear("gate", h + "mlp.gate_proj", "F D -> D F", bias=c.mlp_bias),
            **declare.linear("up", h + "mlp.up_proj", "F D -> D F", bias=c.mlp_bias),
            **declare.linear("down", h + "mlp.down_proj", "D F -> F D", bias=c.mlp_bias),
        },
    }
    return {
        "tokens": declare.embedding("model.embed_tokens.weight"),
        "blocks": stacked(c.layers, layer),
        "norm": declare.rms_norm("model.norm"),
        **({} if c.tied else {"head": declare.embedding("lm_head.weight")}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, and the cache."""
    x = lookup(params["tokens"], call.tokens)  # [B, T, D]
    slopes = alibi_slopes(c.heads) if c.positions == "alibi" else None
    rotary = None if slopes is not None else rope.rotary(c.rope, call, c.head_dim, x.dtype)

    def block(x, p, kv, layer, key):
        y, kv = attention(norm(x, p["attention_norm"], c), p["attention"], kv, layer, key)
        x = x + y
        return x + gated_mlp(norm(x, p["mlp_norm"], c), p["mlp"], c.activation), kv

    def attention(x, p, kv, layer, key):
        q = linear("BTD,DHC->BTHC", x, p, "query")
        k, v = (linear("BTD,DKC->BTKC", x, p, name) for name in ("key", "value"))
        options = {
            "mask": mask(layer),
            "rotary": rotary,
            "alibi": slopes,
            "dropout": c.attention_dropout,
            "dropout_key": key,
        }
        y, kv = cached_attention(q, k, v, call, kv, layer, **options)  # [B, T, H, C]
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    def mask(layer):
        if not c.window_from:  # the same in all layers: a scan computes the mask once
            return masks.within(call.mask, c.window) if c.window else call.mask
        return masks.within(call.mask, jnp.where(layer >= c.window_from, c.window, INF))

    return scan_layers(block, x, params["blocks"], call, call.key)


def logit_factors(params: Tree, x: jax.Array, c: Config) -> tuple[jax.Array, jax.Array | Leaf]:
    """The hidden states [B, T, D] and the head [V, D], its rows normalised if the Config says so."""
    if c.normalized_head:
        return x, unit_norm(params["head"], HEAD_EPS)
    return contract.logit_factors(params, x, c)


def fold_head(params: Tree, c: Config) -> tuple[Tree, Config]:
    """Normalises the rows of the output head once.

    Decoding then skips this step, and other dialects (`dataclasses.replace(config, dialect="llama")`), which cannot
    store a head that is normalised when it is used, can store the model.

    Returns:
        The parameters, and the Config with `normalized_head` false.
    """
    if not c.normalized_head:
        return params, c
    head = unit_norm(params["head"], HEAD_EPS)
    return {**params, "head": head}, dataclasses.replace(c, normalized_head=False)


def keys_attended(c: Config, layer: int, length: int) -> int:
    """The window, in layers that have one."""
    return min(c.window, length) if c.window and layer >= c.window_from else length


DIALECTS = llama_hf.DIALECTS
RELATIVE_POSITIONS = True


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json in any of the dialects. Raises ValueError as `llama_hf.read` does."""
    return Config(**llama_hf.read(raw))


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config, in its dialect."""
    return llama_hf.write(c)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    return TensorNames(prefix="model.", heads=("lm_head.weight",), buffers=(".rotary_emb.inv_freq",))


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

#: All but the last as published (Qwen 2: the base models); llama-tiny trains on a laptop in minutes. Sources: for
#: LLaMA-1 Meta's params.json, as its conversions (decapoda-research/llama-*-hf) have them; otherwise config.json of
#: meta-llama/Llama-2-*-hf, Meta-Llama-3-*, Llama-3.1-*, Llama-3.2-* and Llama-3.3-*, mistralai/Mistral-7B-*,
#: Qwen/Qwen2-*, baichuan-inc/Baichuan-* and Baichuan2-*. Where tests/config_files.json has a copy, a test compares.
PRESETS = {
    "llama-7b": Config(),
    "llama-13b": _sized(Config(), **_13B),
    "llama-33b": _sized(Config(), width=6656, layers=60, heads=52, kv_heads=52, mlp_width=17920),
    "llama-65b": _sized(Config(), width=8192, layers=80, heads=64, kv_heads=64, mlp_width=22016, norm_eps=1e-5),
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
