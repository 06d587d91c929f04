"""GPT-1, GPT-2, GPT-3 and GPT-Neo: decoders with learned positions and a tied output.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Sources: Radford et al. 2018 (openai/finetune-transformer-lm train.py) and 2019, section 2.3 (openai/gpt-2
src/model.py); Brown et al. 2020 (arXiv 2005.14165), section 2.1; EleutherAI/gpt-neo. The initial 1/sqrt(2L) of the
residual projections is the GPT-2 paper's; its released code leaves it out, and so does GPT-1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from garrulax.core.config import check_flags, check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import Layout
from garrulax.core.spec import ParamSpec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import INF, Mask
from garrulax.layers.attention import attend, default_positions, within
from garrulax.layers.cache import Cache, admit
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp
from garrulax.layers.norms import layer_norm
from garrulax.layers.stack import run
from garrulax.models import gpt_hf

DIALECTS = gpt_hf.DIALECTS


@dataclasses.dataclass(frozen=True)
class Config:
    """A GPT. Defaults are the smallest GPT-2.

    vocab, context: tokens. width, layers, heads, mlp_width: sizes. activation: a name in `layers.mlp.ACTIVATIONS`.
    norm_eps: epsilon of the norms. *_dropout: rates, used where forward is given a key. tied: the output is the
    token embedding. scale_attention: divide scores by sqrt(C); scale_by_layer: and by the layer's number from 1.
    post_norm: GPT-1's blocks, with the norms after the residual sums and none at the end. qkv_bias: biases of query,
    key and value; GPT-Neo has none. band: tokens that a banded layer sees, itself included, 0 where all layers are
    dense; band_stride: unless 0, it also sees every token a multiple of this back (Child et al. 2019, arXiv
    1904.10509); band_parity: layers 0, 2, ... (0) or 1, 3, ... (1) are the banded ones.
    init_std: of the initial weights. bos, eos: token ids, None where the tokenizer has none; eos may be several.
    """

    vocab: int = 50257
    context: int = 1024
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int | None = None  # 4 width
    activation: str = "gelu_new"
    norm_eps: float = 1e-5
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    tied: bool = True
    scale_attention: bool = True
    scale_by_layer: bool = False
    post_norm: bool = False
    qkv_bias: bool = True
    band: int = 0
    band_stride: int = 0
    band_parity: int = 1
    init_std: float = 0.02
    bos: int | None = 50256
    eos: int | tuple[int, ...] | None = 50256

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads")
        if self.mlp_width is not None:
            check_sizes(self, "mlp_width")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        check_activation(self.activation)
        check_rates(self, "embedding_dropout", "attention_dropout", "residual_dropout")
        check_positive(self, "norm_eps", "init_std")
        check_flags(self, "tied", "scale_attention", "scale_by_layer", "post_norm", "qkv_bias")
        check_ids(self, "bos", "eos", several=("eos",))
        self._check_band()
        gpt_hf.check_dialect(self)

    def _check_band(self):
        check_sizes(self, "band", "band_stride", least=0)
        if self.band_parity not in (0, 1) or isinstance(self.band_parity, bool):
            raise ValueError(f"band_parity={self.band_parity!r} must be 0 or 1")
        if not self.band and (self.band_stride or not self.band_parity):
            raise ValueError("band_stride and band_parity describe banded layers: give their band")

    @property
    def dialect(self) -> str:
        """model_type of the checkpoints that can say this config. A GPT-3 of dense layers alone is a gpt2."""
        if self.post_norm:
            return "openai-gpt"
        if not self.qkv_bias:
            return "gpt_neo"
        return "gpt3" if self.band else "gpt2"

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return self.context

    @property
    def head_dim(self) -> int:
        """C: width of a head."""
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads that the cache keeps."""
        return self.heads


def parameters(c: Config) -> Tree:
    """The ParamSpec tree: query, key and value fused as [D, 3, H, C], or without biases three of [D, H, C]."""
    D, H, C, F = c.width, c.heads, c.head_dim, c.mlp_width or 4 * c.width
    normals = normal(c.init_std)
    residual = normals if c.post_norm else normal(c.init_std / (2 * c.layers) ** 0.5)
    h = "transformer.h.{}."
    tokens, positions = _tables(c)

    def weight(name, shape, axes, init=normals, inputs=1):  # stored [inputs, outputs], by GPT-Neo the other way round
        ins, outs = shape[:inputs], shape[inputs:]
        if c.dialect != "gpt_neo":
            return ParamSpec(shape, axes, init, Stored(name), (math.prod(ins), math.prod(outs)), inputs=inputs)
        order = (*range(len(outs), len(shape)), *range(len(outs)))
        return ParamSpec(
            shape, axes, init, Stored(name, outs + ins, order), (math.prod(outs), math.prod(ins)), inputs=inputs
        )

    def vector(name, shape, axes, init=zeros):
        return ParamSpec(shape, axes, init, Stored(name), (math.prod(shape),), role="vector")

    def norm(name):
        return {
            "scale": vector(f"{name}.weight", (D,), ("embed",), ones),
            "bias": vector(f"{name}.bias", (D,), ("embed",)),
        }

    def table(name, rows, axis):
        return ParamSpec((rows, D), (axis, "embed"), normals, Stored(name), role="embedding")

    heads = ("heads", "head")
    if c.qkv_bias:
        out = h + "attn.c_proj"
        projections = {
            "qkv": weight(h + "attn.c_attn.weight", (D, 3, H, C), ("embed", None, *heads)),
            "qkv_bias": vector(h + "attn.c_attn.bias", (3, H, C), (None, *heads)),
        }
    else:
        out = h + "attn.attention.out_proj"
        projections = {
            name: weight(h + f"attn.attention.{name[0]}_proj.weight", (D, H, C), ("embed", *heads))
            for name in ("query", "key", "value")
        }
    tree = {
        "tokens": table(f"transformer.{tokens}.weight", c.vocab, "vocab"),
        "positions": table(f"transformer.{positions}.weight", c.context, "position"),
        "blocks": stacked(
            c.layers,
            {
                "attention_norm": norm(h + "ln_1"),
                "attention": projections | {
                    "out": weight(f"{out}.weight", (H, C, D), (*heads, "embed"), residual, inputs=2),
                    "out_bias": vector(f"{out}.bias", (D,), ("embed",)),
                },
                "mlp_norm": norm(h + "ln_2"),
                "mlp": {
                    "up": weight(h + "mlp.c_fc.weight", (D, F), ("embed", "mlp")),
                    "up_bias": vector(h + "mlp.c_fc.bias", (F,), ("mlp",)),
                    "down": weight(h + "mlp.c_proj.weight", (F, D), ("mlp", "embed"), residual),
                    "down_bias": vector(h + "mlp.c_proj.bias", (D,), ("embed",)),
                },
            },
        ),
    }  # fmt: skip
    if not c.post_norm:
        tree["norm"] = norm("transformer.ln_f")
    if not c.tied:
        tree["head"] = table("lm_head.weight", c.vocab, "vocab")
    return tree


def _tables(c: Config) -> tuple[str, str]:
    return ("tokens_embed", "positions_embed") if c.post_norm else ("wte", "wpe")


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
    """Hidden states [B, T, D] that give the logits, and the cache. Arguments as in `garrulax.forward`."""
    positions = default_positions(tokens, cache) if positions is None else positions
    view, cache = admit(tokens, positions, mask, cache)
    embedding_key, layers_key = split(key, 2)
    x = lookup(params["tokens"], tokens) + lookup(params["positions"], positions)
    x = dropout(x, c.embedding_dropout, embedding_key)

    def norm(x, p):
        return layer_norm(x, **p, eps=c.norm_eps)

    def same(x, p):
        return x

    before, after = (same, norm) if c.post_norm else (norm, same)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(before(x, p["attention_norm"]), p["attention"], kv, layer, keys[0])
        x = after(x + dropout(y, c.residual_dropout, keys[1]), p["attention_norm"])
        y = mlp(before(x, p["mlp_norm"]), p["mlp"], c.activation)
        return after(x + dropout(y, c.residual_dropout, keys[2]), p["mlp_norm"]), kv

    def attention(x, p, kv, layer, key):
        if c.qkv_bias:
            qkv = linear("BTD,DnHC->BTnHC", x, p, "qkv")
            q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        else:
            q, k, v = (linear("BTD,DHC->BTHC", x, p, name) for name in ("query", "key", "value"))
        scale = c.head_dim**-0.5 if c.scale_attention else 1.0
        scale = scale / (layer + 1) if c.scale_by_layer else scale
        y, kv = attend(q, k, v, seen(layer), kv, layer, scale=scale, dropout=c.attention_dropout, dropout_key=key)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    def seen(layer):
        if not c.band:
            return view
        return within(view, jnp.where(layer % 2 == c.band_parity, c.band, INF), c.band_stride)

    x, cache = run(block, x, params["blocks"], cache=cache, key=layers_key, remat=remat, unroll=unroll)
    return x if c.post_norm else norm(x, params["norm"]), cache


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens" if c.tied else "head"])


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json of one of `DIALECTS`; raises ValueError as `models.gpt_hf.read` does."""
    return Config(**gpt_hf.read(raw))


def to_hf(c: Config) -> dict:
    """The config.json of `c`, in its dialect."""
    return gpt_hf.write(c)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the ParamSpec tree's."""
    return Layout(
        prefix="transformer.",
        tied={"lm_head.weight": f"transformer.{_tables(c)[0]}.weight"} if c.tied else {},
        buffers=(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "position_ids"),
    )


#: Layers, width and heads. 13B is 5140 wide in the paper, which 40 heads do not divide; 1.3B has 24 heads there, which
#: do not give its size.
_GPT3 = {
    "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 16), "1.3b": (24, 2048, 16),
    "2.7b": (32, 2560, 32), "6.7b": (32, 4096, 32), "13b": (40, 5120, 40), "175b": (96, 12288, 96),
}  # fmt: skip

#: All but the last as published. GPT-3's band, which of its layers are banded and its dropout are not: they are
#: GPT-Neo's (dense first, then 256 tokens; none).
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
