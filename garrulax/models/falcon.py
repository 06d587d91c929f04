"""Falcon: blocks whose attention and MLP run side by side, few key/value heads, rotary positions or ALiBi.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, G query heads to each of them (H = K·G), C head
width, F feed-forward width, V vocabulary, L layers. Sources: Almazrouei et al. 2023 (arXiv 2311.16867), Penedo et al.
2023 (2306.01116); transformers' modeling_falcon.py.

Queries are [D, K, G, C], as they lie in a checkpoint: tensor parallelism splits the key/value heads, each with its
queries, and does not split the attention of Falcon-7B, which has one key/value head.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes

from garrulax.core import config as fields
from garrulax.core.config import Flag, OptionalSize, OptionalTokenId, Positive, Rate, Size, TokenIds
from garrulax.core.dtypes import at_least_float32
from garrulax.core.einsum import lookup
from garrulax.core.hf import HFConfig, TensorNames, find_format, key
from garrulax.core.hf_keys import is_width_over_heads
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.kernels.mask import Mask
from garrulax.layers import rope
from garrulax.layers.attention import alibi_slopes, cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp
from garrulax.layers.rope import Rope, rope_max_length
from garrulax.layers.rope_hf import base_in, rope_from_hf, rope_to_hf
from garrulax.layers.stack import scan_layers
from garrulax.models.contract import norm


@dataclasses.dataclass(frozen=True)
class Config:
    """Falcon. Defaults are Falcon-7B."""

    vocab: Size = 65024  # token ids
    context: Size = 2048  # tokens that it was trained on; positions go on
    width: Size = 4544
    layers: Size = 32
    heads: Size = 71
    kv_heads: Size = 1
    mlp_width: OptionalSize = None  # None stands for 4 width
    activation: str = "gelu"
    norm_eps: Positive = 1e-5
    parallel: Flag = True  # attention and MLP both read the block's input; otherwise one follows the other
    norms: Size = 1  # 2 where the MLP has a norm of its own (always, where it follows), 1 where it shares attention's
    alibi: Flag = False  # biases by distance in place of rotary positions
    rope: Rope = Rope()
    attention_dropout: Rate = 0.0
    residual_dropout: Rate = 0.0  # transformers drops a sequential block's attention output at the rate before
    bias: Flag = False  # linear layers have biases
    tied: Flag = True  # the output head is the token embedding
    init_std: Positive = 0.02  # of the initial weights
    bos: OptionalTokenId = 11
    eos: TokenIds = 11

    max_length = rope_max_length
    head_dim = fields.width_over_heads

    def __post_init__(self):
        fields.check_fields(self)
        fields.check_heads(self.width, self.heads)
        fields.check_groups(self.heads, self.kv_heads)
        check_activation(self.activation)
        if self.norms > 2 or (self.norms == 1 and not self.parallel):
            raise ValueError(f"norms={self.norms}: a block has 2, or 1 where attention and MLP are parallel")
        if not self.parallel and 1 < self.kv_heads < self.heads:
            raise ValueError(f"kv_heads={self.kv_heads}: config.json cannot say groups of queries without parallel")
        if self.alibi and self.rope != Rope():
            raise ValueError("alibi takes the place of rotary positions: give no rope")
        if not self.alibi and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions rotate pairs")


def parameters(c: Config) -> Tree:
    """The ParamSpec tree. Checkpoints fuse query, key and value as [K, N, C, D], N = G + 2: G queries, key, value."""
    F, G = c.mlp_width or 4 * c.width, c.heads // c.kv_heads
    declare = Declare(normal(c.init_std), D=c.width, K=c.kv_heads, G=G, N=G + 2, C=c.head_dim, F=F, V=c.vocab)
    h, fused = "transformer.h.{}.", "transformer.h.{}.self_attention.query_key_value"
    first, second = ("ln_attn", "ln_mlp") if c.parallel else ("input_layernorm", "post_attention_layernorm")
    layer = {
        "attention_norm": declare.layer_norm(h + (first if c.norms == 2 else "input_layernorm")),
        "attention": {
            **declare.linear("query", fused, "(K N C) D -> D K G C", bias=c.bias, N=slice(0, G)),
            **declare.linear("key", fused, "(K N C) D -> D K C", bias=c.bias, N=G),
            **declare.linear("value", fused, "(K N C) D -> D K C", bias=c.bias, N=G + 1),
            **declare.linear("out", h + "self_attention.dense", "D (K G C) -> K G C D", bias=c.bias),
        },
        "mlp": {
            **declare.linear("up", h + "mlp.dense_h_to_4h", "F D -> D F", bias=c.bias),
            **declare.linear("down", h + "mlp.dense_4h_to_h", "D F -> F D", bias=c.bias),
        },
        **({"mlp_norm": declare.layer_norm(h + second)} if c.norms == 2 else {}),
    }
    return {
        "tokens": declare.embedding("transformer.word_embeddings.weight"),
        "blocks": stacked(c.layers, layer),
        "norm": declare.layer_norm("transformer.ln_f"),
        **({} if c.tied else {"head": declare.embedding("lm_head.weight")}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, and the cache."""
    x = lookup(params["tokens"], call.tokens)  # [B, T, D]
    options: dict[str, Any] = {"dropout": c.attention_dropout}
    if c.alibi:
        options["bias"] = lambda mask: alibi(mask, c, x.dtype)
    else:
        options["rotary"] = rope.rotary(c.rope, call, c.head_dim, x.dtype)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y = norm(x, p["attention_norm"], c)
        z, kv = attention(y, p["attention"], kv, layer, keys[0])
        if not c.parallel:
            x, z = x + dropout(z, c.residual_dropout, keys[1]), 0
        y = norm(x, p["mlp_norm"], c) if c.norms == 2 else y
        return x + dropout(mlp(y, p["mlp"], c.activation) + z, c.residual_dropout, keys[2]), kv

    def attention(x, p, kv, layer, key):
        q = linear("BTD,DKGC->BTKGC", x, p, "query").reshape(*x.shape[:2], c.heads, c.head_dim)  # [B, T, H, C]
        k = linear("BTD,DKC->BTKC", x, p, "key")
        v = linear("BTD,DKC->BTKC", x, p, "value")
        y, kv = cached_attention(q, k, v, call, kv, layer, dropout_key=key, **options)
        y = y.reshape(*x.shape[:2], c.kv_heads, -1, c.head_dim)  # [B, T, K, G, C]
        return linear("BTKGC,KGCD->BTD", y, p, "out"), kv

    return scan_layers(block, x, params["blocks"], call, call.key)


def alibi(mask: Mask, c: Config, dtype: jnp.dtype) -> jax.Array:
    """Bias [B, H, 1, S] of the scores: slope x position of the key / sqrt(C).

    As Falcon was trained, slope, position and their product are rounded to bfloat16, and the product is divided with
    the scores (build_alibi_tensor).
    """
    dtype = at_least_float32(dtype)

    def rounded(x):  # to bfloat16; XLA would remove a cast there and back
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slopes = alibi_slopes(c.heads).astype(ml_dtypes.bfloat16).astype(dtype)
    position = rounded(mask.key_streams()["position"].astype(dtype))
    return rounded(slopes[None, :, None, None] * position[:, None, None, :]) * c.head_dim**-0.5


RELATIVE_POSITIONS = True
HF = HFConfig(
    model_type="falcon",
    architecture="FalconForCausalLM",
    fields={
        "vocab": key("vocab_size"),
        "context": key("max_position_embeddings", default=2048),
        "width": key("hidden_size", "n_embed"),
        "layers": key("num_hidden_layers", "n_layer"),
        "heads": key("num_attention_heads", "n_head"),
        "kv_heads": key("num_kv_heads", "n_head_kv", default=None),
        "mlp_width": key("ffn_hidden_size", default=None),
        "activation": key("activation", default="gelu"),
        "norm_eps": key("layer_norm_epsilon", default=1e-5),
        "parallel": key("parallel_attn", default=True),
        "norms": key("num_ln_in_parallel_attn", default=None),
        "alibi": key("alibi", default=False),
        "attention_dropout": key("attention_dropout", default=0.0),
        "residual_dropout": key("hidden_dropout", default=0.0),
        "bias": key("bias", default=False),
        "tied": key("tie_word_embeddings", default=True),
        "init_std": key("initializer_range", default=0.02),
        "bos": key("bos_token_id", default=11, null=True),
        "eos": key("eos_token_id", default=11, null=True),
        "new_decoder_architecture": key("new_decoder_architecture", default=False),
        "multi_query": key("multi_query", default=True),
    },
    fixed={"apply_residual_connection_post_layernorm": False},
    ignored=frozenset({
        "ff_factor",  # of Falcon-11B, beside ffn_hidden_size
        "rope_parameters", "rope_scaling", "rope_theta",  # read by `rope_from_hf`
    }),
    pinned={
        "head_dim": is_width_over_heads,
        "rotary": lambda value, c, raw: value == (not c["alibi"]),
        "rotary_emb_base": lambda value, c, raw: value == base_in(raw),
    },
)  # fmt: skip


def _first_release(model_type: str, **defaults: bool) -> HFConfig:
    """The format of the first releases, which is read only."""
    fields = {name: dataclasses.replace(HF.fields[name], default=default) for name, default in defaults.items()}
    named = dataclasses.replace(HF, model_type=model_type, architecture="RWForCausalLM", remote=True)
    return dataclasses.replace(named, fields={**HF.fields, **fields})


DIALECTS = (
    HF,
    _first_release("RefinedWebModel", parallel=False, multi_query=False),  # 7B and RW
    _first_release("RefinedWeb", new_decoder_architecture=True),  # 40B, whose code knows no other
)


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json with model_type falcon, RefinedWeb or RefinedWebModel.

    Raises ValueError as `core.hf.HFConfig.read` and `layers.rope_hf.rope_from_hf` do, and for combinations of the
    architecture's flags with which the reference code cannot run.
    """
    values = find_format(DIALECTS, raw).read(raw)
    new, single = values.pop("new_decoder_architecture"), values.pop("multi_query")
    fields.check_value("new_decoder_architecture", new, Flag)
    fields.check_value("multi_query", single, Flag)
    kv_heads, norms, heads = values["kv_heads"], values["norms"], values["heads"]
    if new and not values["parallel"]:
        raise ValueError("config.json: new_decoder_architecture with parallel_attn=False is not implemented")
    if not new and values["parallel"] and norms not in (None, 1):
        raise ValueError(f"config.json: num_ln_in_parallel_attn={norms} needs new_decoder_architecture")
    if not new and not single and kv_heads not in (None, heads):
        raise ValueError(f"config.json: num_kv_heads={kv_heads} needs new_decoder_architecture")
    if new:
        values |= {"kv_heads": heads if kv_heads is None else kv_heads, "norms": 2 if norms is None else norms}
    else:
        values |= {"kv_heads": 1 if single else heads, "norms": 1 if values["parallel"] else 2}
    return Config(**values, rope=rope_from_hf(raw, values["context"]))


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config, of model_type falcon, with the RoPE settings in both notations."""
    new = c.parallel and (c.norms == 2 or 1 < c.kv_heads < c.heads)
    flags = {"new_decoder_architecture": new, "multi_query": c.kv_heads == 1, "norms": c.norms if new else None}
    return HF.write(c, **flags) | rope_to_hf(c.rope, c.context)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    buffers = (".rotary_emb.inv_freq", ".maybe_rotary.inv_freq")
    return TensorNames(prefix="transformer.", heads=("lm_head.weight",), buffers=buffers)


#: As published. Sources: config.json of tiiuae/falcon-7b, falcon-40b, falcon-11B and falcon-rw-1b. That of falcon-180B
#: is not public: its sizes are the paper's (arXiv 2311.16867), and it is taken to be tied as 7B and 40B are.
PRESETS = {
    "falcon-7b": Config(),
    "falcon-40b": Config(width=8192, layers=60, heads=128, kv_heads=8, norms=2),
    "falcon-180b": Config(width=14848, layers=80, heads=232, kv_heads=8, norms=2),
    "falcon-11b": Config(
        context=8192, width=4096, layers=60, heads=32, kv_heads=8, rope=Rope(theta=500_042.0), tied=False
    ),
    "falcon-rw-1b": Config(
        vocab=50304, width=2048, layers=24, heads=32, kv_heads=32, parallel=False, norms=2, alibi=True, bias=True,
        bos=1, eos=2,
    ),
}  # fmt: skip
