"""GPT-2: a decoder of pre-norm blocks with learned positions and a tied output.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Source: Radford et al. 2019, section 2.3; openai/gpt-2 src/model.py. The initial 1/sqrt(2L) of the residual
projections is the paper's; the released code leaves it out.
"""

import dataclasses

import jax

from garrulax.core.config import check_flags, check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import HFConfig, Layout
from garrulax.core.spec import Spec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import Mask
from garrulax.layers.attention import attend, default_positions
from garrulax.layers.cache import Cache, admit
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import check_activation, linear, mlp
from garrulax.layers.norms import layer_norm
from garrulax.layers.stack import run


@dataclasses.dataclass(frozen=True)
class Config:
    """GPT-2. Defaults are the smallest published model.

    vocab, context: tokens. width, layers, heads, mlp_width: sizes. activation: a name in `layers.mlp.ACTIVATIONS`.
    norm_eps: epsilon of the norms. *_dropout: rates, used where forward is given a key. tied: the output is the
    token embedding. scale_attention: divide scores by sqrt(C); scale_by_layer: and by the layer's number from 1.
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
        check_flags(self, "tied", "scale_attention", "scale_by_layer")
        check_ids(self, "bos", "eos")

    @property
    def head_dim(self) -> int:
        """C: width of a head."""
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads that the cache keeps."""
        return self.heads


def parameters(c: Config) -> Tree:
    """The Spec tree: query, key and value fused as [D, 3, H, C]."""
    D, H, C, F = c.width, c.heads, c.head_dim, c.mlp_width or 4 * c.width
    weight, residual = normal(c.init_std), normal(c.init_std / (2 * c.layers) ** 0.5)
    h = "transformer.h.{}."

    def norm(name):
        return {
            "scale": Spec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector"),
            "bias": Spec((D,), ("embed",), zeros, Stored(f"{name}.bias"), role="vector"),
        }

    def bias(shape, axes, name, stored_shape=None):
        return Spec(shape, axes, zeros, Stored(name), stored_shape, role="vector")

    def table(rows, axis, name):
        return Spec((rows, D), (axis, "embed"), weight, Stored(name), role="embedding")

    tree = {
        "tokens": table(c.vocab, "vocab", "transformer.wte.weight"),
        "positions": table(c.context, "position", "transformer.wpe.weight"),
        "blocks": stacked(
            c.layers,
            {
                "attention_norm": norm(h + "ln_1"),
                "attention": {
                    "qkv": Spec(
                        (D, 3, H, C), ("embed", None, "heads", "head"), weight,
                        Stored(h + "attn.c_attn.weight"), (D, 3 * D),
                    ),
                    "qkv_bias": bias((3, H, C), (None, "heads", "head"), h + "attn.c_attn.bias", (3 * D,)),
                    "out": Spec(
                        (H, C, D), ("heads", "head", "embed"), residual,
                        Stored(h + "attn.c_proj.weight"), (D, D), inputs=2,
                    ),
                    "out_bias": bias((D,), ("embed",), h + "attn.c_proj.bias"),
                },
                "mlp_norm": norm(h + "ln_2"),
                "mlp": {
                    "up": Spec((D, F), ("embed", "mlp"), weight, Stored(h + "mlp.c_fc.weight")),
                    "up_bias": bias((F,), ("mlp",), h + "mlp.c_fc.bias"),
                    "down": Spec((F, D), ("mlp", "embed"), residual, Stored(h + "mlp.c_proj.weight")),
                    "down_bias": bias((D,), ("embed",), h + "mlp.c_proj.bias"),
                },
            },
        ),
        "norm": norm("transformer.ln_f"),
    }  # fmt: skip
    if not c.tied:
        tree["head"] = table(c.vocab, "vocab", "lm_head.weight")
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
    embedding_key, layers_key = split(key, 2)
    x = lookup(params["tokens"], tokens) + lookup(params["positions"], positions)
    x = dropout(x, c.embedding_dropout, embedding_key)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(layer_norm(x, **p["attention_norm"], eps=c.norm_eps), p["attention"], kv, layer, keys[0])
        x = x + dropout(y, c.residual_dropout, keys[1])
        y = mlp(layer_norm(x, **p["mlp_norm"], eps=c.norm_eps), p["mlp"], c.activation)
        return x + dropout(y, c.residual_dropout, keys[2]), kv

    def attention(x, p, kv, layer, key):
        qkv = linear("BTD,DnHC->BTnHC", x, p, "qkv")
        scale = c.head_dim**-0.5 if c.scale_attention else 1.0
        scale = scale / (layer + 1) if c.scale_by_layer else scale
        y, kv = attend(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], view, kv, layer,
            scale=scale, dropout=c.attention_dropout, dropout_key=key,
        )  # fmt: skip
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    x, cache = run(block, x, params["blocks"], cache=cache, key=layers_key, remat=remat, unroll=unroll)
    return layer_norm(x, **params["norm"], eps=c.norm_eps), cache


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens" if c.tied else "head"])


HF = HFConfig(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab": "vocab_size",
        "context": ("n_positions", "max_position_embeddings"),
        "width": ("n_embd", "hidden_size"),
        "layers": ("n_layer", "num_hidden_layers"),
        "heads": ("n_head", "num_attention_heads"),
        "mlp_width": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "embedding_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
        "residual_dropout": "resid_pdrop",
        "tied": "tie_word_embeddings",
        "scale_attention": "scale_attn_weights",
        "scale_by_layer": "scale_attn_by_inverse_layer_idx",
        "init_std": "initializer_range",
        "bos": "bos_token_id",
        "eos": "eos_token_id",
    },
    defaults={
        "mlp_width": None,
        "activation": "gelu_new",
        "norm_eps": 1e-5,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "tied": True,
        "scale_attention": True,
        "scale_by_layer": False,
        "init_std": 0.02,
        "bos": 50256,
        "eos": 50256,
    },
    optional=frozenset({"bos", "eos"}),
    fixed={"add_cross_attention": False},
    ignored=frozenset({
        "n_ctx", "n_special", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout",
        "summary_proj_to_labels", "summary_type", "summary_use_proj",
    }),
)  # fmt: skip

DIALECTS = (HF,)


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json with model_type gpt2; errors as in `core.hf.HFConfig.read`."""
    return Config(**HF.read(raw))


def to_hf(c: Config) -> dict:
    """The config.json of `c`."""
    return HF.write(c)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the Spec tree's."""
    return Layout(
        prefix="transformer.",
        tied={"lm_head.weight": "transformer.wte.weight"} if c.tied else {},
        buffers=(".attn.bias", ".attn.masked_bias"),
    )


#: The first four as published; gpt2-tiny trains on a laptop in minutes.
PRESETS = {
    "gpt2": Config(),
    "gpt2-medium": Config(width=1024, layers=24, heads=16),
    "gpt2-large": Config(width=1280, layers=36, heads=20),
    "gpt2-xl": Config(width=1600, layers=48, heads=25),
    "gpt2-tiny": Config(vocab=4096, context=128, width=128, layers=4, heads=4, bos=None, eos=0),
}
