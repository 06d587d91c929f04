"""GPT-NeoX and Pythia: blocks whose attention and MLP run side by side, rotary positions in a part of each head.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Sources: Black et al. 2022 (arXiv 2204.06745), section 2.1; Biderman et al. 2023 (2304.01373), table 1 and appendix B;
EleutherAI/gpt-neox; transformers 5.23.0, configuration_gpt_neox.py and modeling_gpt_neox.py.
"""

import dataclasses
import reprlib
from typing import Any

import jax

from garrulax.core import config as fields
from garrulax.core.config import Flag, OptionalTokenId, Positive, Rate, Size, TokenIds
from garrulax.core.einsum import lookup
from garrulax.core.hf import HFConfig, TensorNames, find_format, key
from garrulax.core.hf_keys import is_width_over_heads
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.layers import rope
from garrulax.layers.attention import cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp
from garrulax.layers.rope import Rope, check_rotary, rope_max_length, rotated_entries
from garrulax.layers.rope_hf import partial_rope_from_hf, rope_to_hf
from garrulax.layers.stack import scan_layers
from garrulax.models.contract import norm


@dataclasses.dataclass(frozen=True)
class Config:
    """GPT-NeoX. Defaults are GPT-NeoX-20B."""

    vocab: Size = 50432  # rows of the embedding, padded; the tokenizer has 50277 ids
    context: Size = 2048  # tokens that it was trained on; rotary positions go on
    width: Size = 6144
    layers: Size = 44
    heads: Size = 64
    mlp_width: Size = 24576
    activation: str = "gelu_fast"
    norm_eps: Positive = 1e-5
    parallel: Flag = True  # attention and MLP both read the block's input; otherwise one follows the other
    rope: Rope = Rope()
    rotary: Positive = 0.25  # share of a head's entries that are rotated
    attention_dropout: Rate = 0.0
    residual_dropout: Rate = 0.0
    attention_bias: Flag = True  # biases of query, key, value and output; the MLP always has some
    tied: Flag = False  # the output head is the token embedding
    init_std: Positive = 0.02  # of the initial weights
    bos: OptionalTokenId = 0
    eos: TokenIds = 0

    max_length = rope_max_length
    rotary_width = rotated_entries
    head_dim = fields.width_over_heads
    kv_heads = fields.heads_as_kv_heads

    def __post_init__(self):
        fields.check_fields(self)
        fields.check_heads(self.width, self.heads)
        check_activation(self.activation)
        check_rotary(self)


def parameters(c: Config) -> Tree:
    """The ParamSpec tree. Checkpoints fuse query, key and value head by head."""
    declare = Declare(normal(c.init_std), D=c.width, H=c.heads, C=c.head_dim, F=c.mlp_width, V=c.vocab)
    h, bias = "gpt_neox.layers.{}.", c.attention_bias
    fused, pattern = h + "attention.query_key_value", "(H three C) D -> D H C"
    layer = {
        "attention_norm": declare.layer_norm(h + "input_layernorm"),
        "attention": {
            **declare.linear("query", fused, pattern, bias=bias, three=0),
            **declare.linear("key", fused, pattern, bias=bias, three=1),
            **declare.linear("value", fused, pattern, bias=bias, three=2),
            **declare.linear("out", h + "attention.dense", "D (H C) -> H C D", bias=bias),
        },
        "mlp_norm": declare.layer_norm(h + "post_attention_layernorm"),
        "mlp": {
            **declare.linear("up", h + "mlp.dense_h_to_4h", "F D -> D F", bias=True),
            **declare.linear("down", h + "mlp.dense_4h_to_h", "D F -> F D", bias=True),
        },
    }
    return {
        "tokens": declare.embedding("gpt_neox.embed_in.weight"),
        "blocks": stacked(c.layers, layer),
        "norm": declare.layer_norm("gpt_neox.final_layer_norm"),
        **({} if c.tied else {"head": declare.embedding("embed_out.weight")}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, and the cache."""
    embedding_key, layers_key = split(call.key, 2)
    x = dropout(lookup(params["tokens"], call.tokens), c.residual_dropout, embedding_key)  # [B, T, D]
    rotary = rope.rotary(c.rope, call, c.rotary_width, x.dtype)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(norm(x, p["attention_norm"], c), p["attention"], kv, layer, keys[0])
        y = dropout(y, c.residual_dropout, keys[1])
        z = mlp(norm(x if c.parallel else x + y, p["mlp_norm"], c), p["mlp"], c.activation)
        return x + y + dropout(z, c.residual_dropout, keys[2]), kv

    def attention(x, p, kv, layer, key):
        q, k, v = (linear("BTD,DHC->BTHC", x, p, name) for name in ("query", "key", "value"))
        options = {"rotary": rotary, "dropout": c.attention_dropout, "dropout_key": key}
        y, kv = cached_attention(q, k, v, call, kv, layer, **options)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    return scan_layers(block, x, params["blocks"], call, layers_key)


RELATIVE_POSITIONS = True
HF = HFConfig(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields={
        "vocab": key("vocab_size"),
        "context": key("max_position_embeddings", default=2048),
        "width": key("hidden_size"),
        "layers": key("num_hidden_layers"),
        "heads": key("num_attention_heads"),
        "mlp_width": key("intermediate_size"),
        "activation": key("hidden_act", default="gelu"),
        "norm_eps": key("layer_norm_eps", default=1e-5),
        "parallel": key("use_parallel_residual", default=True),
        "attention_dropout": key("attention_dropout", default=0.0),
        "residual_dropout": key("hidden_dropout", default=0.0),
        "attention_bias": key("attention_bias", default=True),
        "tied": key("tie_word_embeddings", default=False),
        "init_std": key("initializer_range", default=0.02),
        "bos": key("bos_token_id", default=0, null=True),
        "eos": key("eos_token_id", default=2, null=True),
    },
    ignored=frozenset({"rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct",
                       "partial_rotary_factor"}),  # read by `partial_rope_from_hf`
    pinned={"head_dim": is_width_over_heads},
)  # fmt: skip
DIALECTS = (HF,)


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json. Raises ValueError as `HFConfig.read` and `partial_rope_from_hf` do."""
    values = find_format(DIALECTS, raw).read(raw)
    renamed = {"rope_theta": raw.get("rotary_emb_base"), "partial_rotary_factor": raw.get("rotary_pct")}
    renamed = {name: value for name, value in renamed.items() if value is not None}
    for name, value in renamed.items():
        if raw.get(name) not in (None, value):
            raise ValueError(
                f"config.json gives two values of {name}: {reprlib.repr(raw[name])}, {reprlib.repr(value)}"
            )
    given = {**raw, **renamed}
    settings, rotary = partial_rope_from_hf(given, values["context"], default=0.25)
    return Config(**values, rope=settings, rotary=rotary)


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config, with the names of the rotary settings in transformers 5 and before."""
    settings = rope_to_hf(c.rope, c.context, share=c.rotary)
    return {**HF.write(c), **settings, "rotary_emb_base": c.rope.theta, "rotary_pct": c.rotary}


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    buffers = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")
    return TensorNames(prefix="gpt_neox.", heads=("embed_out.weight", "lm_head.weight"), buffers=buffers)


def _pythia(width: int, layers: int, heads: int, vocab: int = 50304) -> Config:
    return Config(vocab=vocab, width=width, layers=layers, heads=heads, mlp_width=4 * width, activation="gelu")


#: As published. Sources: config.json of EleutherAI/gpt-neox-20b and pythia-*.
PRESETS = {
    "gpt-neox-20b": Config(),
    "pythia-14m": _pythia(128, 6, 4),
    "pythia-31m": _pythia(256, 6, 8),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, vocab=50432),
    "pythia-12b": _pythia(5120, 36, 40, vocab=50688),
}
