"""GPT-1, GPT-2, GPT-3 and GPT-Neo: decoders with learned positions and a tied output.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Sources: Radford et al. 2018 (openai/finetune-transformer-lm train.py) and 2019, section 2.3 (openai/gpt-2
src/model.py); Brown et al. 2020 (arXiv 2005.14165), section 2.1; EleutherAI/gpt-neo. The initial 1/sqrt(2L) of the
residual projections is the GPT-2 paper's; its released code leaves it out, and so does GPT-1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from garrulax.core import config as fields
from garrulax.core.config import Count, Flag, OptionalSize, OptionalTokenId, Positive, Rate, Size, TokenIds
from garrulax.core.einsum import lookup
from garrulax.core.hf import TensorNames
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.kernels import masks
from garrulax.kernels.mask import INF
from garrulax.layers.attention import cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp, split_heads
from garrulax.layers.stack import scan_layers
from garrulax.models import gpt_hf
from garrulax.models.contract import norm


@dataclasses.dataclass(frozen=True)
class Config:
    """A GPT. Defaults are the smallest GPT-2."""

    vocab: Size = 50257  # token ids
    context: Size = 1024  # rows of the position table
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    mlp_width: OptionalSize = None  # None stands for 4 width
    activation: str = "gelu_new"
    norm_eps: Positive = 1e-5
    embedding_dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    residual_dropout: Rate = 0.1
    tied: Flag = True  # the output head is the token embedding
    scale_attention: Flag = True  # scores are divided by sqrt(C)
    scale_by_layer: Flag = False  # and by the number of the layer, from 1
    post_norm: Flag = False  # norms after the residual sums and none at the end (GPT-1)
    qkv_bias: Flag = True  # biases of query, key and value; GPT-Neo has none
    band: Count = 0  # tokens that a token attends to in a banded layer, itself included; 0 where no layer is banded
    band_stride: Count = 0  # unless 0, also every token a multiple of this back (Child et al. 2019, arXiv 1904.10509)
    band_parity: int = 1  # which layers are banded: 0, 2, ... (0) or 1, 3, ... (1)
    init_std: Positive = 0.02  # of the initial weights
    bos: OptionalTokenId = 50256
    eos: TokenIds = 50256

    max_length = fields.context_as_max_length
    head_dim = fields.width_over_heads
    kv_heads = fields.heads_as_kv_heads

    def __post_init__(self):
        fields.check_fields(self)
        fields.check_heads(self.width, self.heads)
        check_activation(self.activation)
        if self.band_parity not in (0, 1) or isinstance(self.band_parity, bool):
            raise ValueError(f"band_parity={self.band_parity!r} must be 0 or 1")
        if not self.band and (self.band_stride or not self.band_parity):
            raise ValueError("band_stride and band_parity describe banded layers: give their band")
        gpt_hf.check_dialect(self)

    @property
    def dialect(self) -> str:
        """model_type of the checkpoints that can say this config. A GPT-3 of dense layers alone is a gpt2."""
        if self.post_norm:
            return "openai-gpt"
        if not self.qkv_bias:
            return "gpt_neo"
        return "gpt3" if self.band else "gpt2"


def parameters(c: Config) -> Tree:
    """The ParamSpec tree: query, key and value fused as [D, 3, H, C], or without biases three of [D, H, C]."""
    F = c.mlp_width or 4 * c.width
    declare = Declare(normal(c.init_std), D=c.width, H=c.heads, C=c.head_dim, F=F, V=c.vocab, P=c.context)
    residual = normal(c.init_std if c.post_norm else c.init_std / (2 * c.layers) ** 0.5)
    h = "transformer.h.{}."
    tokens, positions = ("tokens_embed", "positions_embed") if c.post_norm else ("wte", "wpe")

    def linear(key, name, inputs, outputs, **options):  # stored [inputs, outputs], by GPT-Neo the other way round
        stored = f"({outputs}) ({inputs})" if c.dialect == "gpt_neo" else f"({inputs}) ({outputs})"
        return declare.linear(key, h + name, f"{stored} -> {inputs} {outputs}", **options)

    if c.qkv_bias:
        out = "attn.c_proj"
        projections = linear("qkv", "attn.c_attn", "D", "three H C", bias=True)
    else:
        out = "attn.attention.out_proj"
        keys = ("query", "key", "value")
        projections = {
            k: w for key in keys for k, w in linear(key, f"attn.attention.{key[0]}_proj", "D", "H C").items()
        }
    layer = {
        "attention_norm": declare.layer_norm(h + "ln_1"),
        "attention": projections | linear("out", out, "H C", "D", bias=True, init=residual),
        "mlp_norm": declare.layer_norm(h + "ln_2"),
        "mlp": {
            **linear("up", "mlp.c_fc", "D", "F", bias=True),
            **linear("down", "mlp.c_proj", "F", "D", bias=True, init=residual),
        },
    }
    return {
        "tokens": declare.embedding(f"transformer.{tokens}.weight"),
        "positions": declare.embedding(f"transformer.{positions}.weight", "P D -> P D"),
        "blocks": stacked(c.layers, layer),
        **({} if c.post_norm else {"norm": declare.layer_norm("transformer.ln_f")}),
        **({} if c.tied else {"head": declare.embedding("lm_head.weight")}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, which GPT-1 does not have, and the cache."""
    embedding_key, layers_key = split(call.key, 2)
    x = lookup(params["tokens"], call.tokens) + lookup(params["positions"], call.positions)  # [B, T, D]
    x = dropout(x, c.embedding_dropout, embedding_key)

    def before(x, p):
        return x if c.post_norm else norm(x, p, c)

    def after(x, p):
        return norm(x, p, c) if c.post_norm else x

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(before(x, p["attention_norm"]), p["attention"], kv, layer, keys[0])
        x = after(x + dropout(y, c.residual_dropout, keys[1]), p["attention_norm"])
        y = mlp(before(x, p["mlp_norm"]), p["mlp"], c.activation)
        return after(x + dropout(y, c.residual_dropout, keys[2]), p["mlp_norm"]), kv

    def attention(x, p, kv, layer, key):
        if c.qkv_bias:
            q, k, v = split_heads("BTD,DnHC->BTnHC", x, p, "qkv")  # [B, T, H, C] each
        else:
            q, k, v = (linear("BTD,DHC->BTHC", x, p, name) for name in ("query", "key", "value"))
        scale = c.head_dim**-0.5 if c.scale_attention else 1.0
        scale = scale / (layer + 1).astype(jnp.float32) if c.scale_by_layer else scale
        options = {"mask": mask(layer), "scale": scale, "dropout": c.attention_dropout, "dropout_key": key}
        y, kv = cached_attention(q, k, v, call, kv, layer, **options)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    def mask(layer):
        if not c.band:
            return call.mask
        return masks.within(call.mask, jnp.where(layer % 2 == c.band_parity, c.band, INF), c.band_stride)

    return scan_layers(block, x, params["blocks"], call, layers_key)


def keys_attended(c: Config, layer: int, length: int) -> int:
    """The band and, with a stride, every so many tokens before it, in banded layers."""
    if not c.band or layer % 2 != c.band_parity:
        return length
    near = min(c.band, length)
    return near + ((length - near) // c.band_stride if c.band_stride else 0)


DIALECTS = gpt_hf.DIALECTS


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json of one of `DIALECTS`; raises ValueError as `models.gpt_hf.read` does."""
    return Config(**gpt_hf.read(raw))


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config, in its dialect."""
    return gpt_hf.write(c)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    buffers = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "position_ids")
    return TensorNames(prefix="transformer.", heads=("lm_head.weight",), buffers=buffers)


#: Layers, width and heads. 13B is 5140 wide in the paper, which 40 heads do not divide; 1.3B has 24 heads there, which
#: do not give its size.
_GPT3 = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 16), "1.3b": (24, 2048, 16),
    "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32), "13b": (40, 5120, 40), "175b": (96, 12288, 96),
}  # fmt: skip

#: All but the last as published. Sources: config.json of openai-community/openai-gpt, gpt2, gpt2-medium, gpt2-large and
#: gpt2-xl; table 2.1 of the GPT-3 paper (arXiv 2005.14165). Not published are GPT-3's band, which of its layers are
#: banded, and its dropout: they are GPT-Neo's (dense first, then 256 tokens; none).
PRESETS = {
    "gpt1": Config(vocab=40478, context=512, post_norm=True, bos=None, eos=None),
    "gpt2": Config(),
    "gpt2-medium": Config(width=1024, layers=24, heads=16),
    "gpt2-large": Config(width=1280, layers=36, heads=20),
    "gpt2-xl": Config(width=1600, layers=48, heads=25),
    **{
        f"gpt3-{name}": Config(
            context=2048, layers=layers, width=width, heads=heads, band=256,
            embedding_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0,
        ) for name, (layers, width, heads) in _GPT3.items()
    },
    "gpt2-tiny": Config(vocab=4096, context=128, width=128, layers=4, heads=4, bos=None, eos=0),
}  # fmt: skip
