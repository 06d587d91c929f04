"""OPT: decoders with learned positions that begin at row 2 of their table; the 350M has its norms after the sums.

Letters: B batch, T tokens, D model width, E width of the token embedding, H heads, C head width, F feed-forward width,
V vocabulary, P rows of the position table.
Sources: Zhang et al. 2022 (arXiv 2205.01068), section 2.1 and table 1; facebookresearch/metaseq; transformers 5.23.0,
configuration_opt.py and modeling_opt.py.
"""

import dataclasses
from typing import Any

import jax

from garrulax.core import config as fields
from garrulax.core.config import Flag, OptionalSize, OptionalTokenId, Positive, Rate, Size, TokenIds
from garrulax.core.einsum import lookup
from garrulax.core.hf import HFConfig, TensorNames, find_format, key
from garrulax.core.hf_keys import is_width_over_heads
from garrulax.core.leaf import Leaf
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.layers.attention import cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp
from garrulax.layers.stack import scan_layers
from garrulax.models import contract
from garrulax.models.contract import norm

#: Rows of the position table before that of position 0; no position reads them.
OFFSET = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """An OPT. Defaults are OPT-125M."""

    vocab: Size = 50272
    context: Size = 2048  # positions that the table has, besides `OFFSET`
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    mlp_width: Size = 3072
    embedding_width: OptionalSize = None  # of the token embedding, if projections lead to the width and back
    activation: str = "relu"
    pre_norm: Flag = True  # norms before attention and MLP and one at the end; otherwise after the residual sums
    remove_final_norm: Flag = False  # none at the end of a `pre_norm` model either (fine-tuned by old code)
    bias: Flag = True  # linear layers have biases
    attention_dropout: Rate = 0.0
    residual_dropout: Rate = 0.1
    tied: Flag = True  # the output head is the token embedding
    init_std: Positive = 0.02  # of the initial weights
    bos: OptionalTokenId = 2
    eos: TokenIds = 2

    max_length = fields.context_as_max_length
    head_dim = fields.width_over_heads
    kv_heads = fields.heads_as_kv_heads
    norm_eps = property(lambda config: 1e-5, doc="Epsilon of the norms, a constant.")

    def __post_init__(self):
        fields.check_fields(self)
        fields.check_heads(self.width, self.heads)
        check_activation(self.activation)
        if self.embedding_width == self.width:  # one Config for one model
            object.__setattr__(self, "embedding_width", None)


def parameters(c: Config) -> Tree:
    """The ParamSpec tree."""
    sizes = {"D": c.width, "E": c.embedding_width or c.width, "H": c.heads, "C": c.head_dim, "F": c.mlp_width}
    declare = Declare(normal(c.init_std), **sizes, V=c.vocab, P=c.context + OFFSET)
    m, h = "model.decoder.", "model.decoder.layers.{}."
    layer = {
        "attention_norm": declare.layer_norm(h + "self_attn_layer_norm"),
        "attention": {
            **declare.linear("query", h + "self_attn.q_proj", "(H C) D -> D H C", bias=c.bias),
            **declare.linear("key", h + "self_attn.k_proj", "(H C) D -> D H C", bias=c.bias),
            **declare.linear("value", h + "self_attn.v_proj", "(H C) D -> D H C", bias=c.bias),
            **declare.linear("out", h + "self_attn.out_proj", "D (H C) -> H C D", bias=c.bias),
        },
        "mlp_norm": declare.layer_norm(h + "final_layer_norm"),
        "mlp": {
            **declare.linear("up", h + "fc1", "F D -> D F", bias=c.bias),
            **declare.linear("down", h + "fc2", "D F -> F D", bias=c.bias),
        },
    }
    projections = {
        **declare.linear("project_in", m + "project_in", "D E -> E D"),
        **declare.linear("project_out", m + "project_out", "E D -> D E"),
    }
    table = "V D -> V D" if c.embedding_width is None else "V E -> V E"
    return {
        "tokens": declare.embedding(m + "embed_tokens.weight", table),
        "positions": declare.embedding(m + "embed_positions.weight", "P D -> P D"),
        **({} if c.embedding_width is None else projections),
        "blocks": stacked(c.layers, layer),
        **({"norm": declare.layer_norm(m + "final_layer_norm")} if c.pre_norm and not c.remove_final_norm else {}),
        **({} if c.tied else {"head": declare.embedding("lm_head.weight", table)}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, which some models do not have, and the cache."""
    x = lookup(params["tokens"], call.tokens)  # [B, T, D] or [B, T, E]
    if c.embedding_width is not None:
        x = linear("BTE,ED->BTD", x, params, "project_in")
    x = x + lookup(params["positions"], call.positions + OFFSET)

    def before(x, p):
        return norm(x, p, c) if c.pre_norm else x

    def after(x, p):
        return x if c.pre_norm else norm(x, p, c)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(before(x, p["attention_norm"]), p["attention"], kv, layer, keys[0])
        x = after(x + dropout(y, c.residual_dropout, keys[1]), p["attention_norm"])
        y = mlp(before(x, p["mlp_norm"]), p["mlp"], c.activation)
        return after(x + dropout(y, c.residual_dropout, keys[2]), p["mlp_norm"]), kv

    def attention(x, p, kv, layer, key):
        q, k, v = (linear("BTD,DHC->BTHC", x, p, name) for name in ("query", "key", "value"))
        y, kv = cached_attention(q, k, v, call, kv, layer, dropout=c.attention_dropout, dropout_key=key)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    return scan_layers(block, x, params["blocks"], call, call.key)


def logit_factors(params: Tree, x: jax.Array, c: Config) -> tuple[jax.Array, jax.Array | Leaf]:
    """The head, and hidden states that are projected to the width of the embedding if it has another."""
    if c.embedding_width is not None:
        x = linear("BTD,DE->BTE", x, params, "project_out")
    return contract.logit_factors(params, x, c)


HF = HFConfig(
    model_type="opt",
    architecture="OPTForCausalLM",
    fields={
        "vocab": key("vocab_size", default=50272),
        "context": key("max_position_embeddings", default=2048),
        "width": key("hidden_size", default=768),
        "layers": key("num_hidden_layers", default=12),
        "heads": key("num_attention_heads", default=12),
        "mlp_width": key("ffn_dim", default=3072),
        "embedding_width": key("word_embed_proj_dim", default=None),
        "activation": key("activation_function", default="relu"),
        "pre_norm": key("do_layer_norm_before", default=True),
        "remove_final_norm": key("_remove_final_layer_norm", default=False),
        "bias": key("enable_bias", default=True),
        "attention_dropout": key("attention_dropout", default=0.0),
        "residual_dropout": key("dropout", default=0.1),
        "tied": key("tie_word_embeddings", default=True),
        "init_std": key("init_std", default=0.02),
        "bos": key("bos_token_id", default=2, null=True),
        "eos": key("eos_token_id", default=2, null=True),
    },
    fixed={"layer_norm_elementwise_affine": True, "layerdrop": 0.0},
    pinned={"head_dim": is_width_over_heads},
)
DIALECTS = (HF,)


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json. Raises ValueError as `HFConfig.read` does."""
    return Config(**find_format(DIALECTS, raw).read(raw))


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config."""
    return HF.write(c, embedding_width=c.embedding_width or c.width)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    return TensorNames(prefix="model.", heads=("lm_head.weight",))


def _opt(layers: int, width: int, heads: int, **more: Any) -> Config:
    return Config(layers=layers, width=width, heads=heads, mlp_width=4 * width, **more)


#: As published. Sources: config.json of facebook/opt-*; the 175B has no public one.
PRESETS = {
    "opt-125m": Config(),
    "opt-350m": _opt(24, 1024, 16, embedding_width=512, pre_norm=False),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
}
