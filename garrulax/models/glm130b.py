"""GLM-130B and ChatGLM-6B: GLMs with DeepNorm blocks and rotary positions.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Sources: Zeng et al. 2023 (arXiv 2210.02414), section 2; THUDM/GLM-130B generate.py, THUDM/SwissArmyTransformer
sat/model/official/glm130B_model.py; THUDM/chatglm-6b modeling_chatglm.py.

A block adds to its *normalised* input, x = alpha LN(x) + f(LN(x)): DeepNorm, with each norm at the start of the next
sub-layer. As in the original GLM, the tokens before <sop> attend to one another in both directions
(`kernels.masks.prefix`), and the answers follow them. Tokens have one row of positions in GLM-130B and two in
ChatGLM-6B (`blanks`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import config as fields
from garrulax.core.blanks import Blanks
from garrulax.core.blanks import masks as mask_ids
from garrulax.core.config import Flag, OptionalTokenId, Positive, Size, TokenId
from garrulax.core.einsum import lookup
from garrulax.core.hf import HFConfig, TensorNames, find_format, key
from garrulax.core.spec import Declare, Initializer, Tree, normal, stacked
from garrulax.layers import rope
from garrulax.layers.attention import cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.mlp import gated_mlp, linear, mlp
from garrulax.layers.rope import Rope
from garrulax.layers.stack import scan_layers
from garrulax.models.contract import norm

#: Settings that the code of ChatGLM-6B fixes: its config.json cannot say otherwise.
_CHATGLM: dict[str, Any] = {
    "gated": False,
    "half_frequencies": True,
    "alpha_layers": 28,
    "sentence_mask": None,
    "eos": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """GLM-130B and ChatGLM-6B. Defaults are ChatGLM-6B (the release of April 2023)."""

    vocab: Size = 130528  # token ids
    context: Size = 2048  # tokens that it was trained on; rotary positions go on
    width: Size = 4096
    layers: Size = 28
    heads: Size = 32
    mlp_width: Size = 16384
    gated: Flag = False  # GEGLU (exact GELU) in place of a plain MLP (tanh GELU)
    positions_2d: Flag = True  # half a head is rotated by the place in the text, half by that in the answer
    half_frequencies: Flag = True  # rotary frequencies are rounded to float16, as ChatGLM-6B's code does
    alpha_layers: Size = 28  # residuals are multiplied by sqrt(2 alpha_layers); ChatGLM-6B has 28 whatever the depth
    norm_eps: Positive = 1e-5
    tied: Flag = True  # the output head is the token embedding
    mask: TokenId = 130000  # [MASK], a blank of a few words
    sentence_mask: OptionalTokenId = None  # [sMASK], a blank of sentences; None: [MASK] is used instead
    generation_mask: OptionalTokenId = 130001  # [gMASK], the rest of a text; None: [MASK] is used instead
    sop: TokenId = 130004  # begins an answer
    eop: TokenId = 130005  # ends an answer
    eos: OptionalTokenId = None  # ends a text; None where texts have no such token
    pad: TokenId = 3
    dialect: str = "chatglm"  # format of checkpoints; or "glm-130b", which is ours: GLM-130B itself has none

    max_length = fields.context_as_max_length
    head_dim = fields.width_over_heads
    kv_heads = fields.heads_as_kv_heads

    def __post_init__(self):
        fields.check_fields(self)
        fields.check_heads(self.width, self.heads)
        pairs = 4 if self.positions_2d else 2
        if self.head_dim % pairs:
            raise ValueError(f"head width {self.head_dim} must be a multiple of {pairs}: rotary positions rotate pairs")
        if self.dialect not in _FORMATS:
            raise ValueError(f"dialect={self.dialect!r} must be one of {', '.join(_FORMATS)}")
        for name, value in _CHATGLM.items():
            if self.dialect == "chatglm" and getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: the code of ChatGLM-6B has {value!r}, whatever its config.json "
                    "says; set dialect='glm-130b'"
                )

    @property
    def alpha(self) -> float:
        """Factor of the residuals."""
        return (2 * self.alpha_layers) ** 0.5


def parameters(c: Config) -> Tree:
    """The ParamSpec tree.

    Initial values: Xavier normal, with gain 1 / alpha for values, outputs and feed-forward layers (DeepNorm as section
    2.3 of the GLM-130B paper describes it; its initialisation code is not public, so this is unverified).
    """
    D, F = c.width, c.mlp_width
    declare = Declare(normal(0.02), D=D, H=c.heads, C=c.head_dim, F=F, V=c.vocab)
    h = "transformer.layers.{}."

    def xavier(inputs: int, outputs: int, gain: float = 1 / c.alpha) -> Initializer:
        return normal(gain * (2 / (inputs + outputs)) ** 0.5)

    def projection(key: str, part: int, gain: float) -> Tree:  # query, key and value of a head lie side by side
        name, pattern = h + "attention.query_key_value", "(H three C) D -> D H C"
        return declare.linear(key, name, pattern, bias=True, init=xavier(D, D, gain), three=part)

    def up(key: str, **part: int) -> Tree:
        pattern = "(two F) D -> D F" if part else "F D -> D F"
        return declare.linear(key, h + "mlp.dense_h_to_4h", pattern, bias=True, init=xavier(D, F), **part)

    layer = {
        "attention_norm": declare.layer_norm(h + "input_layernorm"),
        "attention": {
            **projection("query", 0, 1.0),
            **projection("key", 1, 1.0),
            **projection("value", 2, 1 / c.alpha),
            **declare.linear("out", h + "attention.dense", "D (H C) -> H C D", bias=True, init=xavier(D, D)),
        },
        "mlp_norm": declare.layer_norm(h + "post_attention_layernorm"),
        "mlp": {
            **(up("up", two=0) | up("gate", two=1) if c.gated else up("up")),
            **declare.linear("down", h + "mlp.dense_4h_to_h", "D F -> F D", bias=True, init=xavier(F, D)),
        },
    }
    return {
        "tokens": declare.embedding("transformer.word_embeddings.weight"),
        "blocks": stacked(c.layers, layer),
        "norm": declare.layer_norm("transformer.final_layernorm"),
        **({} if c.tied else {"head": declare.embedding("lm_head.weight")}),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, and the cache. There is no dropout."""
    x = lookup(params["tokens"], call.tokens)  # [B, T, D]
    places = [call.positions[:, row] for row in range(2)] if c.positions_2d else [call.positions]  # [B, T] each
    angles = [rope.cos_sin_of(_frequencies(c), place, x.dtype) for place in places]

    def block(x, p, kv, layer, key):
        x = norm(x, p["attention_norm"], c)
        y, kv = attention(x, p["attention"], kv, layer)
        x = norm(c.alpha * x + y, p["mlp_norm"], c)
        y = gated_mlp(x, p["mlp"], "gelu") if c.gated else mlp(x, p["mlp"], "gelu_new")
        return c.alpha * x + y, kv

    def attention(x, p, kv, layer):
        q, k = (_rotated(linear("BTD,DHC->BTHC", x, p, name), angles) for name in ("query", "key"))
        y, kv = cached_attention(q, k, linear("BTD,DHC->BTHC", x, p, "value"), call, kv, layer)  # [B, T, H, C]
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    return scan_layers(block, x, params["blocks"], call)


def _frequencies(c: Config) -> np.ndarray:
    """Rotation in radians per position, for each pair of entries of half a head or of a whole one."""
    exact = rope.frequencies(Rope(), c.head_dim // 2 if c.positions_2d else c.head_dim)
    return np.asarray(exact, np.float16 if c.half_frequencies else np.float64)


def _rotated(x: jax.Array, angles: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """x [B, T, H, C] in as many parts along C as there are angles, each rotated by its own."""
    parts = zip(jnp.split(x, len(angles), axis=-1), angles, strict=True)
    return jnp.concatenate([rope.rotate_halves(part, *angle) for part, angle in parts], axis=-1)


OBJECTIVE = "infill"

#: Field of the Config -> name of the control token in the tokenizers that `garrulax train` makes.
CONTROL_TOKENS = {
    "mask": "[MASK]", "sentence_mask": "[sMASK]", "generation_mask": "[gMASK]",
    "sop": "<|startofpiece|>", "eop": "<|endofpiece|>",
}  # fmt: skip


def blanks(c: Config) -> Blanks:
    """How the family reads blanks: masks anywhere in the text, <sop> and the answer behind it.

    With two rows, all tokens of an answer have the position of its mask, and the second row numbers them. With one row,
    an answer to [gMASK] continues the positions of the text; the tokens of other answers have the position of the mask.
    (chatglm-6b `get_position_ids`; GLM-130B generate.py. Until 31 March 2023 the code of ChatGLM-6B placed the <sop> of
    a [gMASK], but no token after it, behind its mask; we follow the later code, also for models with the older
    vocabulary.)
    """
    counting = () if c.positions_2d or c.generation_mask is None else (c.generation_mask,)
    return Blanks(
        masks=mask_ids(c.mask, c.sentence_mask, c.generation_mask),
        sop=c.sop,
        end_tokens=(c.eop,) if c.eos is None else (c.eop, c.eos),
        after=() if c.eos is None else (c.eos,),
        open_ended=("", "s", "g"),
        rows=2 if c.positions_2d else 1,
        masks_answered_at_end=frozenset(counting),
    )


_FIELDS = {
    "vocab": key("vocab_size"),
    "width": key("hidden_size"),
    "layers": key("num_layers"),
    "heads": key("num_attention_heads"),
    "mlp_width": key("inner_hidden_size"),
}

_FORMATS = {
    "chatglm": HFConfig(
        model_type="chatglm",
        architecture="ChatGLMModel",
        fields={  # with the defaults of the class; the first release's files leave the masks out
            **_FIELDS,
            "context": key("max_sequence_length", default=2048),
            "positions_2d": key("position_encoding_2d", default=True),
            "norm_eps": key("layernorm_epsilon", default=1e-5),
            "tied": key("tie_word_embeddings", default=True),
            "mask": key("mask_token_id", default=150000),
            "generation_mask": key("gmask_token_id", default=150001, null=True),
            "sop": key("bos_token_id", default=150004),
            "eop": key("eos_token_id", default=150005),
            "pad": key("pad_token_id", default=0),
        },
        fixed={"quantization_bit": 0, "pre_seq_len": None, "add_cross_attention": False},
        ignored=frozenset({"prefix_projection", "cross_attention_hidden_size"}),
        remote=True,
        marker="inner_hidden_size",  # ChatGLM2 and 3 say model_type chatglm as well
    ),
    "glm-130b": HFConfig(
        model_type="glm-130b",
        architecture="GLM130B",
        fields={
            **_FIELDS,
            "context": key("max_sequence_length"),
            "positions_2d": key("position_encoding_2d"),
            "norm_eps": key("layernorm_epsilon"),
            "tied": key("tie_word_embeddings"),
            "mask": key("mask_token_id"),
            "generation_mask": key("gmask_token_id", null=True),
            "sop": key("bos_token_id"),
            "pad": key("pad_token_id"),
            "gated": key("glu"),
            "half_frequencies": key("half_frequencies"),
            "alpha_layers": key("alpha_layers"),
            "sentence_mask": key("smask_token_id", null=True),
            "eop": key("eop_token_id"),
            "eos": key("eos_token_id", null=True),
        },
        remote=True,
    ),
}

DIALECTS = tuple(_FORMATS.values())


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json of ChatGLM-6B, or in our own format.

    Raises ValueError as `core.hf.HFConfig.read` does: among others for quantized (quantization_bit) and P-tuned
    (pre_seq_len) checkpoints.
    """
    hf = find_format(DIALECTS, raw)
    fixed = _CHATGLM if hf.model_type == "chatglm" else {}
    return Config(**hf.read(raw), **fixed, dialect=hf.model_type)


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of a Config, in its dialect."""
    return _FORMATS[c.dialect].write(c)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree."""
    return TensorNames(prefix="transformer.", heads=("lm_head.weight",), buffers=("rotary_emb.inv_freq",))


_FIRST_IDS: dict[str, Any] = {"vocab": 150528, "mask": 150000, "generation_mask": 150001, "sop": 150004, "eop": 150005}

#: As published. Sources: configs/model_glm_130b.sh of THUDM/GLM-130B; config.json of THUDM/chatglm-6b. chatglm-6b-v0 is
#: its release of March 2023, whose vocabulary begins with 20,000 image tokens.
PRESETS = {
    "glm-130b": Config(
        **_FIRST_IDS, width=12288, layers=70, heads=96, mlp_width=32768, gated=True, positions_2d=False,
        half_frequencies=False, alpha_layers=70, sentence_mask=150002, eos=20002, pad=0, dialect="glm-130b",
    ),
    "chatglm-6b": Config(),
    "chatglm-6b-v0": Config(**_FIRST_IDS, pad=20003),
}  # fmt: skip
