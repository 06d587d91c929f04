"""ChatGLM2, ChatGLM3 and GLM-4: pre-norm blocks with RMSNorm, grouped queries, a gated MLP, and rotary positions that
turn half of each head in neighbouring pairs.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, L layers. config.json and tensor names are in chatglm_hf.py. Sources: Team GLM 2024 (arXiv 2406.12793);
modeling_chatglm.py of THUDM/chatglm2-6b, chatglm3-6b and glm-4-9b; transformers' Glm and Glm4.
"""

import dataclasses
from typing import Any

import jax

from garrulax.core import config as fields
from garrulax.core.config import Count, Flag, OptionalTokenId, Positive, Rate, Size, TokenIds
from garrulax.core.einsum import lookup
from garrulax.core.hf import TensorNames
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.layers import rope
from garrulax.layers.attention import cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, gated_mlp, linear
from garrulax.layers.rope import Rope, check_rotary, rope_max_length, rotated_entries
from garrulax.layers.stack import scan_layers
from garrulax.models import chatglm_hf
from garrulax.models.contract import norm


@dataclasses.dataclass(frozen=True)
class Config:
    """ChatGLM2 and after. Defaults are ChatGLM2-6B.

    The parameters do not depend on the dialect, so that replacing it exports a model in another format.
    """

    vocab: Size = 65024  # token ids
    context: Size = 32768  # tokens that it was trained on; rotary positions go on
    width: Size = 4096
    layers: Size = 28
    heads: Size = 32
    kv_heads: Size = 2
    head_dim: Count = 0  # 0 stands for width / heads
    mlp_width: Size = 13696
    activation: str = "silu"  # of the gate
    norm_eps: Positive = 1e-5
    rope: Rope = Rope()
    rotary: Positive = 0.5  # share of a head's entries that are rotated
    attention_dropout: Rate = 0.0
    residual_dropout: Rate = 0.0
    qkv_bias: Flag = True
    output_norms: Flag = False  # the outputs of attention and MLP are normalised too
    residual_after_norm: Flag = False  # they are added to their normalised input, not to the input
    tied: Flag = False  # the output head is the token embedding
    init_std: Positive = 0.02  # of the initial weights
    bos: OptionalTokenId = None
    eos: TokenIds = 2
    pad: OptionalTokenId = 0
    dialect: str = "chatglm"  # format of checkpoints: of the remote code, or transformers' "glm" and "glm4"

    max_length = rope_max_length
    rotary_width = rotated_entries

    def __post_init__(self):
        fields.check_fields(self)
        fields.fill_head_dim(self)
        fields.check_groups(self.heads, self.kv_heads)
        check_activation(self.activation)
        check_rotary(self)
        chatglm_hf.check_dialect(self)


def parameters(c: Config) -> Tree:
    """The ParamSpec tree: the same in all dialects, whatever their tensors fuse."""
    sizes = {"D": c.width, "H": c.heads, "K": c.kv_heads, "C": c.head_dim, "F": c.mlp_width, "V": c.vocab}
    declare = Declare(normal(c.init_std), N=c.heads + 2 * c.kv_heads, **sizes)
    names = chatglm_hf.NAMES[c.dialect]
    h = names["layer"]
    projections = [
        declare.linear(key, h + name, pattern, bias=c.qkv_bias, **parts)
        for key, (name, pattern, parts) in chatglm_hf.projections(c).items()
    ]
    layer = {
        "attention_norm": declare.rms_norm(h + "input_layernorm"),
        "attention": {
            **{key: weight for projection in projections for key, weight in projection.items()},
            **declare.linear("out", h + names["out"], "D (H C) -> H C D"),
        },
        "mlp_norm": declare.rms_norm(h + "post_attention_layernorm"),
        "mlp": {
            **declare.linear("gate", h + names["gate_up"], "(two F) D -> D F", two=0),
            **declare.linear("up", h + names["gate_up"], "(two F) D -> D F", two=1),
            **declare.linear("down", h + names["down"], "D F -> F D"),
        },
    }
    if c.output_norms:
        layer["attention_output_norm"] = declare.rms_norm(h + "post_self_attn_layernorm")
        layer["mlp_output_norm"] = declare.rms_norm(h + "post_mlp_layernorm")
    return {
        "tokens": declare.embedding(names["tokens"]),
        "blocks": stacked(c.layers, layer),
        "norm": declare.rms_norm(names["norm"]),
        **({} if c.tied else {"head": declare.embedding(names["head"])}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, and the cache."""
    x = lookup(params["tokens"], call.tokens)  # [B, T, D]
    rotary = rope.rotary(c.rope, call, c.rotary_width, x.dtype, rope.rotate_pairs)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y = norm(x, p["attention_norm"], c)
        z, kv = attention(y, p["attention"], kv, layer, keys[0])
        x = add(x, y, z, p.get("attention_output_norm"), keys[1])
        y = norm(x, p["mlp_norm"], c)
        return add(x, y, gated_mlp(y, p["mlp"], c.activation), p.get("mlp_output_norm"), keys[2]), kv

    def attention(x, p, kv, layer, key):
        q = linear("BTD,DHC->BTHC", x, p, "query")
        k, v = (linear("BTD,DKC->BTKC", x, p, name) for name in ("key", "value"))
        options = {"rotary": rotary, "dropout": c.attention_dropout, "dropout_key": key}
        y, kv = cached_attention(q, k, v, call, kv, layer, **options)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    def add(x, normed, y, output_norm, key):
        y = y if output_norm is None else norm(y, output_norm, c)
        return (normed if c.residual_after_norm else x) + dropout(y, c.residual_dropout, key)

    return scan_layers(block, x, params["blocks"], call, call.key)


DIALECTS = chatglm_hf.DIALECTS
RELATIVE_POSITIONS = True


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json with model_type chatglm (ChatGLM2 and after), glm or glm4.

    Raises ValueError as `models.chatglm_hf.read` does.
    """
    return Config(**chatglm_hf.read(raw))


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config, in its dialect."""
    return chatglm_hf.write(c)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    names = chatglm_hf.NAMES[c.dialect]
    buffers = ("rotary_pos_emb.inv_freq", ".rotary_emb.inv_freq")
    return TensorNames(prefix=names["prefix"], heads=(names["head"],), buffers=buffers)


_CHATGLM3 = Config(context=8192, eos=chatglm_hf.CHATGLM3_EOS)
_GLM4 = Config(vocab=151552, context=8192, layers=40, norm_eps=1.5625e-7, eos=(151329, 151336, 151338), pad=151329)

#: As published, in the dialect that was published first. Sources: config.json of THUDM/chatglm2-6b, chatglm3-6b,
#: glm-4-9b and glm-4-9b-chat; for chatglm2-6b-32k (rope ratio 16) and GLM-4-9B-0414 (attention_bias true, where the
#: 32B says false) what other projects say of them. A copy of chatglm3-6b-32k's file says seq_length 16384, its model
#: card 32K.
PRESETS = {
    "chatglm2-6b": Config(),
    "chatglm2-6b-32k": Config(rope=Rope(kind="linear", factor=16.0)),
    "chatglm3-6b": _CHATGLM3,
    "chatglm3-6b-32k": dataclasses.replace(_CHATGLM3, context=32768, rope=Rope(theta=500_000.0)),
    "glm-4-9b": _GLM4,
    "glm-4-9b-chat": dataclasses.replace(_GLM4, context=131072, rope=Rope(theta=5_000_000.0)),
    "glm-4-9b-0414": dataclasses.replace(_GLM4, context=32768, norm_eps=1e-5, output_norms=True, dialect="glm4"),
}
