"""Falcon: blocks whose attention and MLP run side by side, few key/value heads, rotary positions or ALiBi.

Letters: B batch, T tokens, D model width, H heads, K key/value heads, G query heads to each of them (H = K·G), C head
width, F feed-forward width, V vocabulary, L layers. Sources: Almazrouei et al. 2023 (arXiv 2311.16867), Penedo et al.
2023 (2306.01116); transformers' modeling_falcon.py.

Queries are [D, K, G, C], as they lie in a checkpoint: tensor parallelism splits the key/value heads, each with its
queries, and leaves Falcon-7B's attention whole (it has one, and 71 query heads).
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_dtypes

from garrulax.core.config import check_flags, check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import HFConfig, Layout, claimant
from garrulax.core.spec import ParamSpec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import Mask
from garrulax.layers import rope
from garrulax.layers.attention import alibi_slopes, attend, default_positions
from garrulax.layers.cache import Cache, View, admit, whole_length
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp
from garrulax.layers.norms import layer_norm
from garrulax.layers.rope import Rope
from garrulax.layers.rope_hf import rope_from_hf, rope_to_hf
from garrulax.layers.stack import run


@dataclasses.dataclass(frozen=True)
class Config:
    """Falcon. Defaults are Falcon-7B.

    vocab, context: tokens (the context is advice: positions go on). width, layers, heads, kv_heads, mlp_width: sizes.
    activation: a name in `layers.mlp.ACTIVATIONS`. norm_eps: of the norms. parallel: attention and MLP both read the
    block's input; otherwise one follows the other. norms: 2 where the MLP has a norm of its own (always, where it
    follows), 1 where it shares that of attention. alibi: biases by distance in place of rotary positions. rope: rotary
    settings. *_dropout: rates of attention's probabilities and of what is added to the residual, used where forward is
    given a key (transformers drops a sequential block's attention output at the former). bias: whether linear layers
    have biases. tied: the output is the token embedding. init_std: of the initial weights. bos, eos: token ids; eos
    may be several.
    """

    vocab: int = 65024
    context: int = 2048
    width: int = 4544
    layers: int = 32
    heads: int = 71
    kv_heads: int = 1
    mlp_width: int | None = None  # 4 width
    activation: str = "gelu"
    norm_eps: float = 1e-5
    parallel: bool = True
    norms: int = 1
    alibi: bool = False
    rope: Rope = Rope()
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    bias: bool = False
    tied: bool = True
    init_std: float = 0.02
    bos: int | None = 11
    eos: int | tuple[int, ...] | None = 11

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads", "kv_heads", "norms")
        if self.mlp_width is not None:
            check_sizes(self, "mlp_width")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        check_activation(self.activation)
        check_rates(self, "attention_dropout", "residual_dropout")
        check_positive(self, "norm_eps", "init_std")
        check_flags(self, "parallel", "alibi", "bias", "tied")
        check_ids(self, "bos", "eos", several=("eos",))
        if self.norms > 2 or (self.norms == 1 and not self.parallel):
            raise ValueError(f"norms={self.norms}: a block has 2, or 1 where attention and MLP are parallel")
        if not self.parallel and 1 < self.kv_heads < self.heads:
            raise ValueError(f"kv_heads={self.kv_heads}: config.json cannot say groups of queries without parallel")
        if self.alibi and self.rope != Rope():
            raise ValueError("alibi takes the place of rotary positions: give no rope")
        if not self.alibi and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary positions turn pairs")

    @property
    def max_length(self) -> int:
        """Tokens that a text may have: the context, or more where the rotary positions are stretched."""
        return self.rope.max_length(self.context)

    @property
    def head_dim(self) -> int:
        """C: width of a head."""
        return self.width // self.heads


def parameters(c: Config) -> Tree:
    """The ParamSpec tree. Checkpoints fuse query, key and value as [K, G + 2, C, D]: for each key its queries first."""
    D, K, C, F = c.width, c.kv_heads, c.head_dim, c.mlp_width or 4 * c.width
    G = c.heads // K
    weight = normal(c.init_std)
    h = "transformer.h.{}."

    def norm(name):
        return {
            "scale": ParamSpec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector"),
            "bias": ParamSpec((D,), ("embed",), zeros, Stored(f"{name}.bias"), role="vector"),
        }

    def table(name):
        return ParamSpec((c.vocab, D), ("vocab", "embed"), weight, Stored(name), role="embedding")

    def bias(shape, axes, name, stored_shape, split=None, take=None):
        return ParamSpec(shape, axes, zeros, Stored(f"{h}{name}.bias", split, None, take), stored_shape, role="vector")

    fused, rows = "self_attention.query_key_value", ((G + 2) * K * C,)
    attention = {
        "out": ParamSpec(
            (K, G, C, D), ("kv_heads", None, "head", "embed"), weight,
            Stored(h + "self_attention.dense.weight", (D, K, G, C), (1, 2, 3, 0)), (D, D), inputs=3,
        ),
    }  # fmt: skip
    feed_forward = {
        "up": ParamSpec(
            (D, F), ("embed", "mlp"), weight, Stored(h + "mlp.dense_h_to_4h.weight", (F, D), (1, 0)), (F, D)
        ),
        "down": ParamSpec(
            (F, D), ("mlp", "embed"), weight, Stored(h + "mlp.dense_4h_to_h.weight", (D, F), (1, 0)), (D, F)
        ),
    }
    parts: dict[str, int | tuple[int, int]] = {"query": (0, G), "key": G, "value": G + 1}
    for name, part in parts.items():
        shape, axes = ((K, G, C), ("kv_heads", None, "head")) if name == "query" else ((K, C), ("kv_heads", "head"))
        order = (len(shape), *range(len(shape)))
        stored = Stored(f"{h}{fused}.weight", (K, G + 2, C, D), order, (None, part))
        attention[name] = ParamSpec((D, *shape), ("embed", *axes), weight, stored, (*rows, D))
        if c.bias:
            attention[f"{name}_bias"] = bias(shape, axes, fused, rows, (K, G + 2, C), (None, part))
    if c.bias:
        attention["out_bias"] = bias((D,), ("embed",), "self_attention.dense", (D,))
        feed_forward["up_bias"] = bias((F,), ("mlp",), "mlp.dense_h_to_4h", (F,))
        feed_forward["down_bias"] = bias((D,), ("embed",), "mlp.dense_4h_to_h", (D,))
    first, second = ("ln_attn", "ln_mlp") if c.parallel else ("input_layernorm", "post_attention_layernorm")
    layer = {
        "attention_norm": norm(h + (first if c.norms == 2 else "input_layernorm")),
        "attention": attention,
        "mlp": feed_forward,
    }
    if c.norms == 2:
        layer["mlp_norm"] = norm(h + second)
    tree = {
        "tokens": table("transformer.word_embeddings.weight"),
        "blocks": stacked(c.layers, layer),
        "norm": norm("transformer.ln_f"),
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
    bias = alibi(view, c, x.dtype) if c.alibi else None
    turn = None if c.alibi else rope.table(c.rope, positions, c.head_dim, whole_length(positions, cache), x.dtype)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y = norm(x, p["attention_norm"])
        z, kv = attention(y, p["attention"], kv, layer, keys[0])
        if not c.parallel:
            x, z = x + dropout(z, c.residual_dropout, keys[1]), 0
        y = norm(x, p["mlp_norm"]) if c.norms == 2 else y
        return x + dropout(mlp(y, p["mlp"], c.activation) + z, c.residual_dropout, keys[2]), kv

    def attention(x, p, kv, layer, key):
        q = linear("BTD,DKGC->BTKGC", x, p, "query").reshape(*x.shape[:2], c.heads, c.head_dim)
        k = linear("BTD,DKC->BTKC", x, p, "key")
        v = linear("BTD,DKC->BTKC", x, p, "value")
        if turn is not None:
            q, k = rope.rotate_halves(q, *turn), rope.rotate_halves(k, *turn)
        y, kv = attend(q, k, v, view, kv, layer, bias=bias, dropout=c.attention_dropout, dropout_key=key)
        y = y.reshape(*x.shape[:2], c.kv_heads, -1, c.head_dim)
        return linear("BTKGC,KGCD->BTD", y, p, "out"), kv

    def norm(x, p):
        return layer_norm(x, **p, eps=c.norm_eps)

    x, cache = run(block, x, params["blocks"], cache=cache, key=key, remat=remat, unroll=unroll)
    return norm(x, params["norm"]), cache


def alibi(view: View, c: Config, dtype: jnp.dtype) -> jax.Array:
    """Bias [B, H, 1, S] of the scores: slope x position of the key / sqrt(C). As Falcon was trained, slope, position
    and their product are rounded to bfloat16, and the product is divided with the scores (build_alibi_tensor)."""
    dtype = jnp.promote_types(dtype, jnp.float32)

    def rounded(x):  # to bfloat16; a mere cast there and back would be optimised away
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slopes = alibi_slopes(c.heads).astype(ml_dtypes.bfloat16).astype(dtype)
    position = rounded(view.mask.key_streams()["position"].astype(dtype))
    return rounded(slopes[:, None, None] * position[:, None, None, :]) * c.head_dim**-0.5


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens" if c.tied else "head"])


HF = HFConfig(
    model_type="falcon",
    architecture="FalconForCausalLM",
    fields={
        "vocab": "vocab_size",
        "context": "max_position_embeddings",
        "width": ("hidden_size", "n_embed"),
        "layers": ("num_hidden_layers", "n_layer"),
        "heads": ("num_attention_heads", "n_head"),
        "kv_heads": ("num_kv_heads", "n_head_kv"),
        "mlp_width": "ffn_hidden_size",
        "activation": "activation",
        "norm_eps": "layer_norm_epsilon",
        "parallel": "parallel_attn",
        "norms": "num_ln_in_parallel_attn",
        "alibi": "alibi",
        "attention_dropout": "attention_dropout",
        "residual_dropout": "hidden_dropout",
        "bias": "bias",
        "tied": "tie_word_embeddings",
        "init_std": "initializer_range",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "new_decoder_architecture": "new_decoder_architecture",
        "multi_query": "multi_query",
    },
    defaults={
        "context": 2048,
        "kv_heads": None,
        "mlp_width": None,
        "activation": "gelu",
        "norm_eps": 1e-5,
        "parallel": True,
        "norms": None,
        "alibi": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "bias": False,
        "tied": True,
        "init_std": 0.02,
        "bos": 11,
        "eos": 11,
        "new_decoder_architecture": False,
        "multi_query": True,
    },
    optional=frozenset({"bos", "eos"}),
    fixed={"apply_residual_connection_post_layernorm": False},
    ignored=frozenset({
        "ff_factor",  # of Falcon-11B, beside ffn_hidden_size
        "rope_parameters", "rope_scaling", "rope_theta",  # read by `rope_from_hf`
    }),
)  # fmt: skip


def _first(model_type: str, **defaults: bool) -> HFConfig:
    """The format of the first releases, read only."""
    return dataclasses.replace(
        HF, model_type=model_type, architecture="RWForCausalLM", defaults={**HF.defaults, **defaults}
    )


DIALECTS = (
    HF,
    _first("RefinedWebModel", parallel=False, multi_query=False),  # 7B and RW
    _first("RefinedWeb", new_decoder_architecture=True),  # 40B, whose code knows no other
)


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json with model_type falcon, RefinedWeb or RefinedWebModel.

    Raises ValueError as `core.hf.HFConfig.read` and `layers.rope_hf.rope_from_hf` do, and for combinations of the
    architecture's flags with which the reference code cannot run.
    """
    fields = claimant(DIALECTS, raw).read(raw)
    new, single = fields.pop("new_decoder_architecture"), fields.pop("multi_query")
    flags = types.SimpleNamespace(new_decoder_architecture=new, multi_query=single)
    check_flags(flags, "new_decoder_architecture", "multi_query")
    kv_heads, norms, heads = fields["kv_heads"], fields["norms"], fields["heads"]
    if new and not fields["parallel"]:
        raise ValueError("config.json: new_decoder_architecture with parallel_attn=False is not implemented")
    if not new and fields["parallel"] and norms not in (None, 1):
        raise ValueError(f"config.json: num_ln_in_parallel_attn={norms} needs new_decoder_architecture")
    if not new and not single and kv_heads not in (None, heads):
        raise ValueError(f"config.json: num_kv_heads={kv_heads} needs new_decoder_architecture")
    if new:
        fields |= {"kv_heads": heads if kv_heads is None else kv_heads, "norms": 2 if norms is None else norms}
    else:
        fields |= {"kv_heads": 1 if single else heads, "norms": 1 if fields["parallel"] else 2}
    return Config(**fields, rope=rope_from_hf(raw, fields["context"]))


def to_hf(c: Config) -> dict:
    """The config.json of `c`, of model_type falcon, with the RoPE settings in both dialects."""
    new = c.parallel and (c.norms == 2 or 1 < c.kv_heads < c.heads)
    flags = {"new_decoder_architecture": new, "multi_query": c.kv_heads == 1, "norms": c.norms if new else None}
    return HF.write(types.SimpleNamespace(**(vars(c) | flags))) | rope_to_hf(c.rope, c.context)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the ParamSpec tree's."""
    tied = {"lm_head.weight": "transformer.word_embeddings.weight"} if c.tied else {}
    return Layout(prefix="transformer.", tied=tied, buffers=(".rotary_emb.inv_freq", ".maybe_rotary.inv_freq"))


#: As published, all with tied embeddings (what 40B and 11B say was not checked against the checkpoints).
PRESETS = {
    "falcon-7b": Config(),
    "falcon-40b": Config(width=8192, layers=60, heads=128, kv_heads=8, norms=2),
    "falcon-180b": Config(width=14848, layers=80, heads=232, kv_heads=8, norms=2),
    "falcon-11b": Config(context=8192, width=4096, layers=60, heads=32, kv_heads=8, rope=Rope(theta=500_042.0)),
    "falcon-rw-1b": Config(
        vocab=50304, width=2048, layers=24, heads=32, kv_heads=32, parallel=False, norms=2, alibi=True, bias=True,
        bos=1, eos=2,
    ),
}  # fmt: skip
