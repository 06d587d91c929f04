"""GLM with blank infilling: one stack that reads a text with blanks both ways and writes the blanks left to right.

Letters: B batch, T tokens, D model width, H heads, C head width, F feed-forward width, V vocabulary, L layers.
Source: Du et al. 2022 (arXiv 2103.10360), section 2; THUDM/GLM model/modeling_glm.py, mpu/transformer.py.

Part A is the text with [MASK] for every blank; part B is [sop] and the answer of each blank. A token has two
positions, each with a learned table: where it stands in part A (for part B: where its [MASK] stands), and where in
its span (0 in part A, 1, 2, ... in a span). `kernels.masks.prefix` is the mask.
"""

import dataclasses
from typing import Any

import jax

from garrulax.core import config as fields
from garrulax.core.blanks import Blanks
from garrulax.core.blanks import masks as mask_ids
from garrulax.core.config import OptionalTokenId, Positive, Rate, Size, TokenId
from garrulax.core.einsum import lookup
from garrulax.core.hf import HFConfig, TensorNames, key
from garrulax.core.spec import Declare, Tree, normal, stacked
from garrulax.layers.attention import cached_attention
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.dropout import dropout, split
from garrulax.layers.mlp import linear, mlp, split_heads
from garrulax.layers.stack import scan_layers
from garrulax.models.contract import norm


@dataclasses.dataclass(frozen=True)
class Config:
    """GLM. Defaults are GLM-base."""

    vocab: Size = 30592  # rows of the embedding, padded to a multiple of 128 in the published models
    context: Size = 512  # greatest position; both position tables have one row more
    width: Size = 768
    layers: Size = 12
    heads: Size = 12
    norm_eps: Positive = 1e-5
    embedding_dropout: Rate = 0.1
    attention_dropout: Rate = 0.1
    residual_dropout: Rate = 0.1
    init_std: Positive = 0.02  # of the initial weights
    eos: TokenId = 0
    pad: TokenId = 0
    cls: TokenId = 101
    mask: TokenId = 103  # [MASK], a blank of a few words
    sentence_mask: OptionalTokenId = None  # [sMASK], a blank of sentences; None: [MASK] is used instead
    generation_mask: OptionalTokenId = None  # [gMASK], the rest of a text; None: [MASK] is used instead
    sop: TokenId = 30522  # begins an answer
    eop: TokenId = 30523  # ends an answer

    max_length = fields.context_as_max_length
    head_dim = fields.width_over_heads
    kv_heads = fields.heads_as_kv_heads

    def __post_init__(self):
        fields.check_fields(self)
        fields.check_heads(self.width, self.heads)

    @property
    def tied(self) -> bool:
        """The output head is the token embedding."""
        return True


def parameters(c: Config) -> Tree:
    """The ParamSpec tree: query, key and value fused as [D, 3, H, C]; the output head is the token embedding."""
    sizes = {"D": c.width, "H": c.heads, "C": c.head_dim, "F": 4 * c.width, "V": c.vocab, "P": c.context + 1}
    declare = Declare(normal(c.init_std), **sizes)
    residual = normal(c.init_std / (2 * c.layers) ** 0.5)
    h, qkv = "transformer.layers.{}.", "(three H C) D -> D three H C"
    layer = {
        "attention_norm": declare.layer_norm(h + "input_layernorm"),
        "attention": {
            **declare.linear("qkv", h + "attention.query_key_value", qkv, bias=True),
            **declare.linear("out", h + "attention.dense", "D (H C) -> H C D", bias=True, init=residual),
        },
        "mlp_norm": declare.layer_norm(h + "post_attention_layernorm"),
        "mlp": {
            **declare.linear("up", h + "mlp.dense_h_to_4h", "F D -> D F", bias=True),
            **declare.linear("down", h + "mlp.dense_4h_to_h", "D F -> F D", bias=True, init=residual),
        },
    }
    return {
        "tokens": declare.embedding("word_embeddings.weight"),
        "positions": declare.embedding("transformer.position_embeddings.weight", "P D -> P D"),
        "span_positions": declare.embedding("transformer.block_position_embeddings.weight", "P D -> P D"),
        "blocks": stacked(c.layers, layer),
        "norm": declare.layer_norm("transformer.final_layernorm"),
    }


def hidden(params: Tree, call: Call, c: Config) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] before the last norm, and the cache."""
    embedding_key, layers_key = split(call.key, 2)
    text, span = call.positions[:, 0], call.positions[:, 1]  # [B, T] each
    x = lookup(params["tokens"], call.tokens)  # [B, T, D]
    x = x + lookup(params["positions"], text) + lookup(params["span_positions"], span)
    x = dropout(x, c.embedding_dropout, embedding_key)

    def block(x, p, kv, layer, key):
        keys = split(key, 3)
        y, kv = attention(norm(x, p["attention_norm"], c), p["attention"], kv, layer, keys[0])
        x = x + dropout(y, c.residual_dropout, keys[1])
        y = mlp(norm(x, p["mlp_norm"], c), p["mlp"], "gelu_new")
        return x + dropout(y, c.residual_dropout, keys[2]), kv

    def attention(x, p, kv, layer, key):
        q, k, v = split_heads("BTD,DnHC->BTnHC", x, p, "qkv")  # [B, T, H, C] each
        y, kv = cached_attention(q, k, v, call, kv, layer, dropout=c.attention_dropout, dropout_key=key)
        return linear("BTHC,HCD->BTD", y, p, "out"), kv

    return scan_layers(block, x, params["blocks"], call, layers_key)


OBJECTIVE = "infill"

#: Field of the Config -> name of the control token in the tokenizers that `garrulax train` makes.
CONTROL_TOKENS = {
    "cls": "[CLS]", "mask": "[MASK]", "sentence_mask": "[sMASK]", "generation_mask": "[gMASK]",
    "sop": "<|startofpiece|>", "eop": "<|endofpiece|>",
}  # fmt: skip


def blanks(c: Config) -> Blanks:
    """How the family reads blanks: [CLS] and end of text around it; the answers stand behind, in the order of their
    masks (THUDM/GLM generate_samples.py)."""
    return Blanks(
        masks=mask_ids(c.mask, c.sentence_mask, c.generation_mask),
        sop=c.sop,
        end_tokens=(c.eop, c.eos),
        before=(c.cls,),
        after=(c.eos,),
        open_ended=("g",),  # an answer to [gMASK] runs to the end of the text
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
        "vocab": key("vocab_size"),
        "context": key("max_sequence_length"),
        "width": key("hidden_size"),
        "layers": key("num_layers"),
        "heads": key("num_attention_heads"),
        "norm_eps": key("layernorm_epsilon", default=1e-5),
        "embedding_dropout": key("embedding_dropout_prob", default=0.1),
        "attention_dropout": key("attention_dropout_prob", default=0.1),
        "residual_dropout": key("output_dropout_prob", default=0.1),
        "init_std": key("initializer_range", default=0.02),
        **{field: key(name, default=None) for field, name in _IDS.items()},
    },
    fixed={"relative_encoding": False, "block_position_encoding": True, "spell_length": None},
    ignored=frozenset({
        "attention_scale",  # divides the queries and multiplies the scores again, against overflow in float16
        "checkpoint_activations", "checkpoint_num_layers", "max_memory_length", "output_predict", "parallel_output",
        "pool_token", "spell_func", "use_scaled_init_for_output_weights",
    }),
    remote=True,
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

#: All but the last as published; glm-tiny trains on a laptop in minutes. Sources: config.json of THUDM/glm-2b, glm-10b,
#: glm-large-chinese and glm-10b-chinese; for the others the files config/model_blocklm_*.sh of THUDM/GLM.
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


def from_hf(raw: dict[str, Any]) -> Config:
    """The Config of a parsed config.json with model_type glm (the original GLM's remote code).

    Published files leave the control tokens to the tokenizer; they are taken from the preset of the same size.
    Raises ValueError as `core.hf.HFConfig.read` does, and where neither the file nor a preset tells the tokens.
    """
    values = HF.read(raw)
    sizes = {k: values[k] for k in ("vocab", "context", "width", "layers", "heads")}
    same = [p for p in PRESETS.values() if all(getattr(p, k) == v for k, v in sizes.items())]
    for name, stored in _IDS.items():
        if values[name] is None and same:
            values[name] = getattr(same[0], name)
        if values[name] is None and name not in ("sentence_mask", "generation_mask"):
            raise ValueError(f"config.json of a glm of unpublished size must give {stored}")
    return Config(**values)


def to_hf(c: Config) -> dict[str, Any]:
    """The config.json of `c`."""
    return HF.write(c)


def tensor_names(c: Config) -> TensorNames:
    """Names in a checkpoint beyond those of the ParamSpec tree: the Hugging Face class puts `glm.` before all names."""
    return TensorNames(extra_prefix="glm.")
