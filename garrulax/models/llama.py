"""LLaMA 1, 2 and 3: pre-norm blocks with RMSNorm, rotary positions, grouped queries and a gated MLP.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, C head width, F feed-forward width,
V vocabulary, L layers. Sources: Touvron et al. 2023 (arXiv 2302.13971, 2307.09288), Llama team 2024 (2407.21783);
meta-llama/llama-models models/llama3/model.py. Weights are in the Hugging Face order (rotation pairs entry i of a
head with i + C/2), not Meta's interleaved one.
"""

import dataclasses
import math
from typing import Any

import jax

from garrulax.core.config import check_flags, check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import HFConfig, Layout
from garrulax.core.spec import Spec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import Mask
from garrulax.layers import rope
from garrulax.layers.attention import attend, default_positions
from garrulax.layers.cache import Cache, admit
from garrulax.layers.mlp import check_activation, gated_mlp, linear
from garrulax.layers.norms import rms_norm
from garrulax.layers.rope import Rope
from garrulax.layers.rope_hf import rope_from_hf, rope_to_hf
from garrulax.layers.stack import run


@dataclasses.dataclass(frozen=True)
class Config:
    """LLaMA. Defaults are LLaMA 7B.

    vocab, context: tokens (the context is advice: rotary positions go on). width, layers, heads, kv_heads,
    head_dim, mlp_width: sizes; head_dim 0 stands for width / heads. activation: of the gate. norm_eps: of the norms.
    rope: rotary settings. attention_dropout: used where forward is given a key. attention_bias, mlp_bias: whether
    the linear layers have biases. tied: the output is the token embedding. init_std: of the initial weights.
    bos, eos: token ids; eos may be several.
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
    rope: Rope = Rope()
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    init_std: float = 0.02
    bos: int | None = 1
    eos: int | tuple[int, ...] | None = 2

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads", "kv_heads", "mlp_width")
        if self.head_dim == 0:
            if self.width % self.heads:
                raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}; give head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        check_sizes(self, "head_dim")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        check_activation(self.activation)
        check_rates(self, "attention_dropout")
        check_positive(self, "norm_eps", "init_std")
        check_flags(self, "attention_bias", "mlp_bias", "tied")
        check_ids(self, "bos", "eos")


def parameters(c: Config) -> Tree:
    """The Spec tree."""
    D, H, K, C, F = c.width, c.heads, c.kv_heads, c.head_dim, c.mlp_width
    weight = normal(c.init_std)
    h = "model.layers.{}."

    def norm(name):
        return {"scale": Spec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector")}

    def heads(name, count, axis):  # stored [count * C, D]
        stored = Stored(h + f"self_attn.{name}.weight", (count, C, D), (2, 0, 1))
        return Spec((D, count, C), ("embed", axis, "head"), weight, stored, (count * C, D))

    def dense(name, rows, columns, axes):  # stored [columns, rows]
        stored = Stored(h + f"mlp.{name}.weight", (columns, rows), (1, 0))
        return Spec((rows, columns), axes, weight, stored, (columns, rows))

    def bias(name, shape, axes):
        return Spec(shape, axes, zeros, Stored(h + f"{name}.bias"), (math.prod(shape),), role="vector")

    def table(name):
        return Spec((c.vocab, D), ("vocab", "embed"), weight, Stored(name), role="embedding")

    attention = {
        "query": heads("q_proj", H, "heads"),
        "key": heads("k_proj", K, "kv_heads"),
        "value": heads("v_proj", K, "kv_heads"),
        "out": Spec(
            (H, C, D), ("heads", "head", "embed"), weight,
            Stored(h + "self_attn.o_proj.weight", (D, H, C), (1, 2, 0)), (D, H * C), inputs=2,
        ),
    }  # fmt: skip
    if c.attention_bias:
        attention |= {
            "query_bias": bias("self_attn.q_proj", (H, C), ("heads", "head")),
            "key_bias": bias("self_attn.k_proj", (K, C), ("kv_heads", "head")),
            "value_bias": bias("self_attn.v_proj", (K, C), ("kv_heads", "head")),
            "out_bias": bias("self_attn.o_proj", (D,), ("embed",)),
        }
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
    length = positions.max(axis=1) + 1 if cache is None else cache.planned
    turn = rope.table(c.rope, positions, c.head_dim, length, x.dtype)

    def block(x, p, kv, layer, key):
        y, kv = attention(rms_norm(x, **p["attention_norm"], eps=c.norm_eps), p["attention"], kv, layer, key)
        x = x + y
        return x + gated_mlp(rms_norm(x, **p["mlp_norm"], eps=c.norm_eps), p["mlp"], c.activation), kv

    def attention(x, p, kv, layer, key):
        q = rope.rotate_halves(linear("BTD,DHC->BTHC", x, p, "query"), *turn)
        k = rope.rotate_halves(linear("BTD,DKC->BTKC", x, p, "key"), *turn)
        v = linear("BTD,DKC->BTKC", x, p, "value")
        y, kv = attend(q, k, v, view, kv, layer, dropout=c.attention_dropout, dropout_key=key)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    x, cache = run(block, x, params["blocks"], cache=cache, key=key, remat=remat, unroll=unroll)
    return rms_norm(x, **params["norm"], eps=c.norm_eps), cache


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens" if c.tied else "head"])


HF = HFConfig(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields={
        "vocab": "vocab_size",
        "context": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "mlp_width": "intermediate_size",
        "activation": "hidden_act",
        "norm_eps": "rms_norm_eps",
        "attention_dropout": "attention_dropout",
        "attention_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
        "tied": "tie_word_embeddings",
        "init_std": "initializer_range",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
    },
    defaults={
        "context": 2048,
        "kv_heads": None,
        "head_dim": 0,
        "activation": "silu",
        "norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tied": False,
        "init_std": 0.02,
        "bos": 1,
        "eos": 2,
    },
    optional=frozenset({"bos", "eos"}),
    ignored=frozenset(
        {
            "max_sequence_length",  # beside max_position_embeddings in early conversions of LLaMA-1
            "rope_theta",
            "rope_scaling",
            "rope_parameters",  # read by `rope_from_hf`
        }
    ),
)

DIALECTS = (HF,)


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json with model_type llama, in the old or the new dialect of RoPE settings.

    Raises ValueError as `core.hf.HFConfig.read` and `layers.rope_hf.rope_from_hf` do.
    """
    fields = HF.read(raw)
    if fields["kv_heads"] is None:
        fields["kv_heads"] = fields["heads"]
    return Config(**fields, rope=rope_from_hf(raw, fields["context"]))


def to_hf(c: Config) -> dict:
    """The config.json of `c`, with the RoPE settings in both dialects."""
    return HF.write(c) | rope_to_hf(c.rope, c.context)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the Spec tree's."""
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


_13B = {"width": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "mlp_width": 13824}
_70B = {"width": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "mlp_width": 28672}

#: All but the last as published; llama-tiny trains on a laptop in minutes.
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
    "llama3.1-405b": _sized(_LLAMA31, width=16384, layers=126, heads=128, kv_heads=8, mlp_width=53248),
    "llama3.2-1b": _sized(_LLAMA32, width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192),
    "llama3.2-3b": _sized(_LLAMA32, width=3072, layers=28, heads=24, kv_heads=8, mlp_width=8192),
    "llama3.3-70b": _sized(_LLAMA31, **_70B),
    "llama-tiny": Config(
        vocab=4096, context=128, width=128, layers=4, heads=4, kv_heads=2, mlp_width=352, tied=True, bos=None, eos=0
    ),
}
