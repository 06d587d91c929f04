"""GLM with blank infilling: one stack that reads a text with blanks both ways and writes the blanks left to right.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Source: Du et al. 2022 (arXiv 2103.10360), section 2; THUDM/GLM model/modeling_glm.py, mpu/transformer.py.

Part A is the text with [MASK] for every blank; part B is [sop] and the answer of each blank. A token has two
positions, each with a learned table: where it stands in part A (for part B: where its [MASK] stands), and where in
its span (0 in part A, 1, 2, ... in a span). `kernels.masks.prefix` is the mask.
"""

import dataclasses

import jax
import jax.numpy as jnp

from garrulax.core.blanks import Blanks, masks
from garrulax.core.config import check_ids, check_positive, check_rates, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import HFConfig, Layout
from garrulax.core.spec import ParamSpec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import Mask
from garrulax.layers.attention import attend, default_positions
from garrulax.layers.cache import Cache, admit
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import linear, mlp
from garrulax.layers.norms import layer_norm
from garrulax.layers.stack import run


@dataclasses.dataclass(frozen=True)
class Config:
    """GLM. Defaults are GLM-base.

    vocab: rows of the embedding, padded to a multiple of 128 in the published models. context: greatest position;
    both position tables have one row more. width, layers, heads: sizes. norm_eps: of the norms. *_dropout: rates,
    used where forward is given a key. init_std: of the initial weights. eos, pad, cls, mask, sentence_mask,
    generation_mask, sop, eop: ids of the control tokens; the two masks are None where [MASK] serves for all.
    """

    vocab: int = 30592
    context: int = 512
    width: int = 768
    layers: int = 12
    heads: int = 12
    norm_eps: float = 1e-5
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    init_std: float = 0.02
    eos: int = 0
    pad: int = 0
    cls: int = 101
    mask: int = 103
    sentence_mask: int | None = None
    generation_mask: int | None = None
    sop: int = 30522
    eop: int = 30523

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads")
        check_rates(self, "embedding_dropout", "attention_dropout", "residual_dropout")
        check_positive(self, "norm_eps", "init_std")
        check_ids(self, *_IDS)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return self.context

    @property
    def tied(self) -> bool:
        """The token embedding is the output head."""
        return True

    @property
    def head_dim(self) -> int:
        """C: width of a head."""
        return self.width // self.heads

    @property
    def kv_heads(self) -> int:
        """Heads that the cache keeps."""
        return self.heads


def parameters(c: Config) -> Tree:
    """The ParamSpec tree: query, key and value fused as [D, 3, H, C]; the output is the token embedding."""
    D, H, C, F = c.width, c.heads, c.head_dim, 4 * c.width
    weight, residual = normal(c.init_std), normal(c.init_std / (2 * c.layers) ** 0.5)
    h = "transformer.layers.{}."

    def norm(name):
        return {
            "scale": ParamSpec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector"),
            "bias": ParamSpec((D,), ("embed",), zeros, Stored(f"{name}.bias"), role="vector"),
        }

    def bias(shape, axes, name, stored_shape=None):
        return ParamSpec(shape, axes, zeros, Stored(name), stored_shape, role="vector")

    def dense(rows, columns, axes, init, name):  # stored [columns, rows]
        return ParamSpec((rows, columns), axes, init, Stored(name, (columns, rows), (1, 0)), (columns, rows))

    def table(rows, axis, name):
        return ParamSpec((rows, D), (axis, "embed"), weight, Stored(name), role="embedding")

    return {
        "tokens": table(c.vocab, "vocab", "word_embeddings.weight"),
        "positions": table(c.context + 1, "position", "transformer.position_embeddings.weight"),
        "span_positions": table(c.context + 1, "position", "transformer.block_position_embeddings.weight"),
        "blocks": stacked(
            c.layers,
            {
                "attention_norm": norm(h + "input_layernorm"),
                "attention": {
                    "qkv": ParamSpec(
                        (D, 3, H, C), ("embed", None, "heads", "head"), weight,
                        Stored(h + "attention.query_key_value.weight", (3, H, C, D), (3, 0, 1, 2)), (3 * D, D),
                    ),
                    "qkv_bias": bias(
                        (3, H, C), (None, "heads", "head"), h + "attention.query_key_value.bias", (3 * D,)
                    ),
                    "out": ParamSpec(
                        (H, C, D), ("heads", "head", "embed"), residual,
                        Stored(h + "attention.dense.weight", (D, H, C), (1, 2, 0)), (D, D), inputs=2,
                    ),
                    "out_bias": bias((D,), ("embed",), h + "attention.dense.bias"),
                },
                "mlp_norm": norm(h + "post_attention_layernorm"),
                "mlp": {
                    "up": dense(D, F, ("embed", "mlp"), weight, h + "mlp.dense_h_to_4h.weight"),
                    "up_bias": bias((F,), ("mlp",), h + "mlp.dense_h_to_4h.bias"),
                    "down": dense(F, D, ("mlp", "embed"), residual, h + "mlp.dense_4h_to_h.weight"),
                    "down_bias": bias((D,), ("embed",), h + "mlp.dense_4h_to_h.bias"),
                },
            },
        ),
        "norm": norm("transformer.final_layernorm"),
    }  # fmt: skip


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
    """Hidden states [B, T, D] after the last norm, and the cache. Arguments as in `garrulax.forward`.

    positions: int32 [B, 2, T]; the default is those of a text without blanks.
    """
    if positions is None:
        first = default_positions(tokens, cache)
        positions = jnp.stack([first, jnp.zeros_like(first)], axis=1)
    if positions.shape != (tokens.shape[0], 2, tokens.shape[1]):
        raise ValueError(f"GLM positions must be [batch, 2, length], not {positions.shape} for tokens {tokens.shape}")
    view, cache = admit(tokens, positions[:, 0], mask, cache)
    embedding_key, layers_key = split(key, 2)
    x = lookup(params["tokens"], tokens)
    x = x + lookup(params["positions"], positions[:, 0]) + lookup(params["span_positions"], positions[:, 1])
    x = dropout(x, c.embedding_dropout, embedding_key)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(layer_norm(x, **p["attention_norm"], eps=c.norm_eps), p["attention"], kv, layer, keys[0])
        x = x + dropout(y, c.residual_dropout, keys[1])
        y = mlp(layer_norm(x, **p["mlp_norm"], eps=c.norm_eps), p["mlp"], "gelu_new")
        return x + dropout(y, c.residual_dropout, keys[2]), kv

    def attention(x, p, kv, layer, key):
        qkv = linear("BTD,DnHC->BTnHC", x, p, "qkv")
        y, kv = attend(
            qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], view, kv, layer, dropout=c.attention_dropout, dropout_key=key
        )
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    x, cache = run(block, x, params["blocks"], cache=cache, key=layers_key, remat=remat, unroll=unroll)
    return layer_norm(x, **params["norm"], eps=c.norm_eps), cache


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens"])


def blanks(c: Config) -> Blanks:
    """How the family reads blanks: [CLS] and end of text around it; the answers stand behind, in the order of their
    masks (THUDM/GLM generate_samples.py)."""
    return Blanks(
        masks=masks(c.mask, c.sentence_mask, c.generation_mask),
        sop=c.sop,
        end_tokens=(c.eop, c.eos),
        before=(c.cls,),
        after=(c.eos,),
        open_ended=("g",),  # which is the rest of the text, its end included
        insert_answers=False,
        causal=True,
    )


_IDS = {
    "eos": "eos_token_id",
    "pad": "pad_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
    "sentence_mask": "smask_token_id",
    "generation_mask": "gmask_token_id",
    "sop": "sop_token_id",
    "eop": "eop_token_id",
}

HF = HFConfig(
    model_type="glm",
    architecture="GLMForConditionalGeneration",
    fields={
        "vocab": "vocab_size",
        "context": "max_sequence_length",
        "width": "hidden_size",
        "layers": "num_layers",
        "heads": "num_attention_heads",
        "norm_eps": "layernorm_epsilon",
        "embedding_dropout": "embedding_dropout_prob",
        "attention_dropout": "attention_dropout_prob",
        "residual_dropout": "output_dropout_prob",
        "init_std": "initializer_range",
        **_IDS,
    },
    defaults={
        "norm_eps": 1e-5,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "init_std": 0.02,
        **dict.fromkeys(_IDS),
    },
    fixed={"relative_encoding": False, "block_position_encoding": True, "spell_length": None},
    ignored=frozenset({
        "attention_scale",  # divides the queries and multiplies the scores again, against overflow in float16
        "checkpoint_activations", "checkpoint_num_layers", "max_memory_length", "output_predict", "parallel_output",
        "pool_token", "spell_func", "use_scaled_init_for_output_weights",
    }),
    marker="max_sequence_length",  # GLM-4 says model_type glm as well
)  # fmt: skip

DIALECTS = (HF,)

_GPT2_IDS = {"eos": 50256, "pad": 50256, "cls": 50259, "mask": 50260, "sentence_mask": 50264,
             "generation_mask": 50263, "sop": 50257, "eop": 50258}  # fmt: skip
_ROBERTA_IDS = {"eos": 2, "pad": 1, "cls": 0, "mask": 50264, "sop": 50265, "eop": 50266}
_CHINESE_IDS = {"eos": 50000, "pad": 50000, "cls": 50002, "mask": 50003, "sentence_mask": 50008,
                "generation_mask": 50009, "sop": 50006, "eop": 50007}  # fmt: skip

_LARGE = {"width": 1024, "layers": 24, "heads": 16}
_10B = {"context": 1024, "width": 4096, "layers": 48, "heads": 64}

#: All but the last as published; glm-tiny trains on a laptop in minutes.
PRESETS = {
    "glm-base": Config(),
    "glm-large": Config(**_LARGE),
    "glm-410m": Config(width=1024, layers=30, heads=16),
    "glm-515m": Config(width=1152, layers=30, heads=18),
    "glm-roberta": Config(vocab=50304, **_LARGE, **_ROBERTA_IDS),
    "glm-large-chinese": Config(vocab=50048, context=1024, **_LARGE, **_CHINESE_IDS),
    "glm-2b": Config(vocab=50304, context=1024, width=2048, layers=36, heads=32, **_GPT2_IDS),
    "glm-10b": Config(vocab=50304, **_10B, **_GPT2_IDS),
    "glm-10b-chinese": Config(vocab=50048, **_10B, **_CHINESE_IDS),
    "glm-tiny": Config(
        vocab=4096, context=128, width=128, layers=4, heads=4, eos=0, pad=0, cls=1, mask=2, sop=3, eop=4
    ),
}


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json with model_type glm (the original GLM's remote code).

    Published files leave the control tokens to the tokenizer; they are taken from the preset of the same size.
    Raises ValueError as `core.hf.HFConfig.read` does, and where neither the file nor a preset tells the tokens.
    """
    fields = HF.read(raw)
    sizes = {k: fields[k] for k in ("vocab", "context", "width", "layers", "heads")}
    same = [p for p in PRESETS.values() if all(getattr(p, k) == v for k, v in sizes.items())]
    for name, key in _IDS.items():
        if fields[name] is None and same:
            fields[name] = getattr(same[0], name)
        if fields[name] is None and name not in ("sentence_mask", "generation_mask"):
            raise ValueError(f"config.json of a glm of unpublished size must give {key}")
    return Config(**fields)


def to_hf(c: Config) -> dict:
    """The config.json of `c`."""
    return HF.write(c)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the ParamSpec tree's: the Hugging Face class puts `glm.` before all of them."""
    return Layout(extra_prefix="glm.")
