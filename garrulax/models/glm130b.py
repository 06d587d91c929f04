"""GLM-130B and ChatGLM-6B: GLMs with DeepNorm blocks and rotary positions.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Sources: Zeng et al. 2023 (arXiv 2210.02414), section 2; THUDM/GLM-130B generate.py, THUDM/SwissArmyTransformer
sat/model/official/glm130B_model.py; THUDM/chatglm-6b modeling_chatglm.py.

A block adds to its *normalised* input, x = alpha LN(x) + f(LN(x)): DeepNorm, with each norm at the start of the next
sub-layer. As in the original GLM what stands before <sop> sees itself both ways (`kernels.masks.prefix`), and answers
stand behind it. Their positions: one row in GLM-130B, two in ChatGLM-6B (`blanks`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core.blanks import Blanks, masks
from garrulax.core.config import check_flags, check_ids, check_positive, check_sizes
from garrulax.core.einsum import einsum, lookup
from garrulax.core.hf import HFConfig, Layout, claimant
from garrulax.core.spec import ParamSpec, Stored, Tree, normal, ones, stacked, zeros
from garrulax.kernels.mask import Mask
from garrulax.layers import rope
from garrulax.layers.attention import attend, default_positions
from garrulax.layers.cache import Cache, admit
from garrulax.layers.mlp import gated_mlp, linear, mlp
from garrulax.layers.norms import layer_norm
from garrulax.layers.rope import Rope
from garrulax.layers.stack import run

#: What the code of ChatGLM-6B has hard-wired: its config.json cannot say otherwise.
_CHATGLM: dict[str, Any] = {
    "gated": False,
    "half_frequencies": True,
    "alpha_layers": 28,
    "sentence_mask": None,
    "eos": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """GLM-130B and ChatGLM-6B. Defaults are ChatGLM-6B (the release of April 2023).

    vocab, context: tokens (the context is advice: rotary positions go on). width, layers, heads, mlp_width: sizes.
    gated: GEGLU (exact GELU) in place of a plain MLP (tanh GELU). positions_2d: the first half of a head turns by the
    place in the text, the second by the place in the answer; otherwise the whole head by one position.
    half_frequencies: the rotary frequencies are rounded to float16, as ChatGLM-6B's code does. alpha_layers: residuals
    are scaled by alpha = sqrt(2 alpha_layers); ChatGLM-6B's code takes 28 whatever the depth. norm_eps: of the norms.
    tied: the output is the token embedding. mask, sentence_mask, generation_mask: ids of the blanks; None where [MASK]
    serves. sop, eop: ids that begin and end an answer. eos: id that ends a text, None where texts have no such end.
    pad: id for padding. dialect: config.json format of the checkpoints, "chatglm" (which says nothing of gated,
    half_frequencies, alpha_layers, sentence_mask and eos) or "glm-130b" (ours: GLM-130B itself has none).
    """

    vocab: int = 130528
    context: int = 2048
    width: int = 4096
    layers: int = 28
    heads: int = 32
    mlp_width: int = 16384
    gated: bool = False
    positions_2d: bool = True
    half_frequencies: bool = True
    alpha_layers: int = 28
    norm_eps: float = 1e-5
    tied: bool = True
    mask: int = 130000
    sentence_mask: int | None = None
    generation_mask: int | None = 130001
    sop: int = 130004
    eop: int = 130005
    eos: int | None = None
    pad: int = 3
    dialect: str = "chatglm"

    def __post_init__(self):
        check_sizes(self, "vocab", "context", "width", "layers", "heads", "mlp_width", "alpha_layers")
        check_flags(self, "gated", "positions_2d", "half_frequencies", "tied")
        check_positive(self, "norm_eps")
        check_ids(self, "mask", "sentence_mask", "generation_mask", "sop", "eop", "eos", "pad")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        pairs = 4 if self.positions_2d else 2
        if self.head_dim % pairs:
            raise ValueError(f"head width {self.head_dim} must be a multiple of {pairs}: rotary positions turn pairs")
        if self.dialect not in _FORMATS:
            raise ValueError(f"dialect={self.dialect!r} must be one of {', '.join(_FORMATS)}")
        for name, value in _CHATGLM.items():
            if self.dialect == "chatglm" and getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: the code of ChatGLM-6B has {value!r}, whatever its config.json "
                    "says; set dialect='glm-130b'"
                )

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

    @property
    def alpha(self) -> float:
        """What multiplies the residuals."""
        return (2 * self.alpha_layers) ** 0.5


def parameters(c: Config) -> Tree:
    """The ParamSpec tree.

    Initial values: Xavier normal, with gain 1 / alpha for values, outputs and feed-forward layers (DeepNorm as section
    2.3 of the GLM-130B paper describes it; its initialisation code is not public, so this is unverified).
    """
    D, H, C, F = c.width, c.heads, c.head_dim, c.mlp_width
    h = "transformer.layers.{}."

    def xavier(inputs, outputs, gain=1.0):
        return normal(gain * (2 / (inputs + outputs)) ** 0.5)

    def norm(name):
        return {
            "scale": ParamSpec((D,), ("embed",), ones, Stored(f"{name}.weight"), role="vector"),
            "bias": ParamSpec((D,), ("embed",), zeros, Stored(f"{name}.bias"), role="vector"),
        }

    def heads(name, part, gain=1.0):  # stored [H * 3 * C, D]: query, key and value of a head side by side
        stored, of_head = h + "attention.query_key_value.", (None, part, None)
        return {
            name: ParamSpec(
                (D, H, C), ("embed", "heads", "head"), xavier(D, D, gain),
                Stored(f"{stored}weight", (H, 3, C, D), (2, 0, 1), (*of_head, None)), (3 * D, D),
            ),
            f"{name}_bias": ParamSpec(
                (H, C), ("heads", "head"), zeros, Stored(f"{stored}bias", (H, 3, C), None, of_head), (3 * D,),
                role="vector",
            ),
        }  # fmt: skip

    def up(name, part, parts):  # stored [parts * F, D]
        stored = h + "mlp.dense_h_to_4h."
        return {
            name: ParamSpec(
                (D, F), ("embed", "mlp"), xavier(D, F, 1 / c.alpha),
                Stored(f"{stored}weight", (parts, F, D), (1, 0), (part, None, None)), (parts * F, D),
            ),
            f"{name}_bias": ParamSpec(
                (F,), ("mlp",), zeros, Stored(f"{stored}bias", (parts, F), None, (part, None)), (parts * F,),
                role="vector",
            ),
        }  # fmt: skip

    def bias(name):
        return ParamSpec((D,), ("embed",), zeros, Stored(f"{h}{name}.bias"), role="vector")

    def table(name):
        return ParamSpec((c.vocab, D), ("vocab", "embed"), normal(0.02), Stored(name), role="embedding")

    tree = {
        "tokens": table("transformer.word_embeddings.weight"),
        "blocks": stacked(
            c.layers,
            {
                "attention_norm": norm(h + "input_layernorm"),
                "attention": {
                    **heads("query", 0),
                    **heads("key", 1),
                    **heads("value", 2, 1 / c.alpha),
                    "out": ParamSpec(
                        (H, C, D), ("heads", "head", "embed"), xavier(D, D, 1 / c.alpha),
                        Stored(h + "attention.dense.weight", (D, H, C), (1, 2, 0)), (D, D), inputs=2,
                    ),
                    "out_bias": bias("attention.dense"),
                },
                "mlp_norm": norm(h + "post_attention_layernorm"),
                "mlp": {
                    **(up("up", 0, 2) | up("gate", 1, 2) if c.gated else up("up", 0, 1)),
                    "down": ParamSpec(
                        (F, D), ("mlp", "embed"), xavier(F, D, 1 / c.alpha),
                        Stored(h + "mlp.dense_4h_to_h.weight", (D, F), (1, 0)), (D, F),
                    ),
                    "down_bias": bias("mlp.dense_4h_to_h"),
                },
            },
        ),
        "norm": norm("transformer.final_layernorm"),
    }  # fmt: skip
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
    """Hidden states [B, T, D] after the last norm, and the cache. Arguments as in `garrulax.forward`.

    positions: int32 [B, T], with `positions_2d` [B, 2, T] (place in the text, place in the answer); the default is
    those of a text without blanks. There is no dropout.
    """
    rows = (2,) if c.positions_2d else ()
    if positions is None:
        first = default_positions(tokens, cache)
        positions = jnp.stack([first, jnp.zeros_like(first)], axis=1) if c.positions_2d else first
    if positions.shape != (tokens.shape[0], *rows, tokens.shape[1]):
        wanted = "[batch, 2, length]" if c.positions_2d else "[batch, length]"
        raise ValueError(f"positions must be {wanted}, not {positions.shape} for tokens {tokens.shape}")
    places = [positions[:, row] for row in range(2)] if c.positions_2d else [positions]
    view, cache = admit(tokens, places[0], mask, cache)
    x = lookup(params["tokens"], tokens)
    angles = [rope.turns(_frequencies(c), place, x.dtype) for place in places]

    def block(x, p, kv, layer, key):
        x = layer_norm(x, **p["attention_norm"], eps=c.norm_eps)
        y, kv = attention(x, p["attention"], kv, layer)
        x = layer_norm(c.alpha * x + y, **p["mlp_norm"], eps=c.norm_eps)
        y = gated_mlp(x, p["mlp"], "gelu") if c.gated else mlp(x, p["mlp"], "gelu_new")
        return c.alpha * x + y, kv

    def attention(x, p, kv, layer):
        q, k = (_turned(linear("BTD,DHC->BTHC", x, p, name), angles) for name in ("query", "key"))
        y, kv = attend(q, k, linear("BTD,DHC->BTHC", x, p, "value"), view, kv, layer)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    x, cache = run(block, x, params["blocks"], cache=cache, key=key, remat=remat, unroll=unroll)
    return layer_norm(x, **params["norm"], eps=c.norm_eps), cache


def _frequencies(c: Config) -> np.ndarray:
    """Of each pair of entries that turn together, half a head's or a whole one's."""
    exact = rope.frequencies(Rope(), c.head_dim // 2 if c.positions_2d else c.head_dim)
    return np.asarray(exact, np.float16 if c.half_frequencies else np.float64)


def _turned(x: jax.Array, angles: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """x [B, T, H, C] in as many parts along C as there are angles, each turned by its own."""
    parts = zip(jnp.split(x, len(angles), axis=-1), angles, strict=True)
    return jnp.concatenate([rope.rotate_halves(part, *angle) for part, angle in parts], axis=-1)


def logits(params: Tree, x: jax.Array, c: Config) -> jax.Array:
    """Logits [B, T, V] of hidden states [B, T, D]."""
    return einsum("BTD,VD->BTV", x, params["tokens" if c.tied else "head"])


def blanks(c: Config) -> Blanks:
    """How the family reads blanks: masks anywhere in the text, <sop> and the answer behind it.

    With two rows of positions an answer stands at its mask, whatever the kind, and counts in the second row. With one,
    the answer to [gMASK] counts on from the text, and all of any other is at its mask. (chatglm-6b `get_position_ids`;
    GLM-130B generate.py. Until 31 March 2023 the code of ChatGLM-6B placed the <sop> of a [gMASK], but no token
    after it, behind its mask; we follow what it became, for the vocabulary of then as well.)
    """
    counting = () if c.positions_2d or c.generation_mask is None else (c.generation_mask,)
    return Blanks(
        masks=masks(c.mask, c.sentence_mask, c.generation_mask),
        sop=c.sop,
        end_tokens=(c.eop,) if c.eos is None else (c.eop, c.eos),
        after=() if c.eos is None else (c.eos,),
        open_ended=("", "s", "g"),
        rows=2 if c.positions_2d else 1,
        masks_answered_at_end=frozenset(counting),
    )


_FIELDS = {
    "vocab": "vocab_size",
    "context": "max_sequence_length",
    "width": "hidden_size",
    "layers": "num_layers",
    "heads": "num_attention_heads",
    "mlp_width": "inner_hidden_size",
    "positions_2d": "position_encoding_2d",
    "norm_eps": "layernorm_epsilon",
    "tied": "tie_word_embeddings",
    "mask": "mask_token_id",
    "generation_mask": "gmask_token_id",
    "sop": "bos_token_id",
    "pad": "pad_token_id",
}

_FORMATS = {
    "chatglm": HFConfig(
        model_type="chatglm",
        architecture="ChatGLMModel",
        fields={**_FIELDS, "eop": "eos_token_id"},
        defaults={  # of the class; the first release's files leave the masks out
            "context": 2048, "positions_2d": True, "norm_eps": 1e-5, "tied": True, "mask": 150000,
            "generation_mask": 150001, "sop": 150004, "eop": 150005, "pad": 0,
        },
        optional=frozenset({"generation_mask"}),
        fixed={"quantization_bit": 0, "pre_seq_len": None, "add_cross_attention": False},
        ignored=frozenset({"prefix_projection", "cross_attention_hidden_size", "tie_encoder_decoder"}),
        marker="inner_hidden_size",  # ChatGLM2 and 3 say model_type chatglm as well
    ),
    "glm-130b": HFConfig(
        model_type="glm-130b",
        architecture="GLM130B",
        fields={
            **_FIELDS,
            "gated": "glu",
            "half_frequencies": "half_frequencies",
            "alpha_layers": "alpha_layers",
            "sentence_mask": "smask_token_id",
            "eop": "eop_token_id",
            "eos": "eos_token_id",
        },
        optional=frozenset({"sentence_mask", "generation_mask", "eos"}),
    ),
}  # fmt: skip

DIALECTS = tuple(_FORMATS.values())


def from_hf(raw: dict) -> Config:
    """The Config of a parsed config.json of ChatGLM-6B, or in our own format.

    Raises ValueError as `core.hf.HFConfig.read` does: among others for quantized (quantization_bit) and P-tuned
    (pre_seq_len) checkpoints.
    """
    hf = claimant(DIALECTS, raw)
    hard_wired = _CHATGLM if hf.model_type == "chatglm" else {}
    return Config(**hf.read(raw), **hard_wired, dialect=hf.model_type)


def to_hf(c: Config) -> dict:
    """The config.json of `c`, in its dialect."""
    return _FORMATS[c.dialect].write(c)


def layout(c: Config) -> Layout:
    """Names in a checkpoint beyond the ParamSpec tree's."""
    tied = {"lm_head.weight": "transformer.word_embeddings.weight"} if c.tied else {}
    return Layout(prefix="transformer.", tied=tied, buffers=("rotary_emb.inv_freq",))


_FIRST_IDS: dict[str, Any] = {"vocab": 150528, "mask": 150000, "generation_mask": 150001, "sop": 150004, "eop": 150005}

#: As published; chatglm-6b-v0 is the release of March 2023, whose vocabulary begins with 20,000 image tokens.
PRESETS = {
    "glm-130b": Config(
        **_FIRST_IDS, width=12288, layers=70, heads=96, mlp_width=32768, gated=True, positions_2d=False,
        half_frequencies=False, alpha_layers=70, sentence_mask=150002, eos=20002, pad=0, dialect="glm-130b",
    ),
    "chatglm-6b": Config(),
    "chatglm-6b-v0": Config(**_FIRST_IDS, pad=20003),
}  # fmt: skip
