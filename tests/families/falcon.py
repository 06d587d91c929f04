"""Falcon."""

from typing import Any

from drawing import Draw, Drawn, rope, tokens
from entry import SIZES, Change, Entry

from garrulax.models.falcon import Config

FALCON = {
    "40b": {"alibi": False, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    "7b": {"alibi": False, "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    "11b": {"alibi": False, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    "rw": {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False},
}


def falcon(d: Draw) -> dict[str, Any]:
    """The four layouts that were published, and what else the class can do."""
    other = d.turn(
        FALCON["7b"] | {"parallel_attn": False}, FALCON["rw"] | {"parallel_attn": True},
        FALCON["rw"] | {"multi_query": True}, FALCON["40b"] | {"num_ln_in_parallel_attn": None},
        FALCON["40b"] | {"alibi": True}, FALCON["11b"] | {"alibi": True},
    )  # fmt: skip
    layout = d.turn(*FALCON.values(), other)
    kv, vocab, context, head_dim = d.whole(1, 3), d.whole(40, 99), d.whole(18, 21), 2 * d.whole(2, 6)
    heads = kv * d.turn(2, 3, 4)
    kv = kv if layout["new_decoder_architecture"] else 1 if layout["multi_query"] else heads
    turned = {} if layout["alibi"] else {"rope_parameters": rope(d, head_dim, context, "dynamic", "default", "linear")}
    return {
        **layout, "vocab_size": vocab, "max_position_embeddings": context, "hidden_size": heads * head_dim,
        "num_hidden_layers": d.whole(2, 4), "num_attention_heads": heads, "num_kv_heads": kv,
        "layer_norm_epsilon": d.number(1e-4, 1e-1), "initializer_range": d.number(0.03, 0.1),
        "hidden_dropout": d.number(0.1, 0.5), "attention_dropout": d.number(0.1, 0.5), "bias": d.turn(True, False),
        "ffn_hidden_size": d.whole(9, 40), "activation": d.turn("relu", "gelu", "silu", "gelu_new"),
        "tie_word_embeddings": d.turn(False, True), **turned, **tokens(d, vocab),
    }  # fmt: skip


ENTRY = Entry(
    config=Config(**SIZES, kv_heads=2, norms=2, attention_dropout=0.1, residual_dropout=0.1),
    rows=("Falcon",),
    oracles=dict.fromkeys(("falcon7b", "falcon40b", "falcon11b", "falconrw_alibi", "falconrw_alibi_pow2"), "Falcon"),
    unstacked=("falcon11b",),
    changes={
        "width": Change(12, also={"kv_heads": 1}),
        "heads": Change(1, also={"kv_heads": 1}),
        "norms": Change(1),
    },
    elsewhere=("context",),
    counts={
        "falcon-7b": 6_921_720_704, "falcon-40b": 41_303_293_952, "falcon-180b": 178_557_088_768,
        "falcon-11b": 11_102_822_400, "falcon-rw-1b": 1_311_625_216,
    },
    rich=Config(
        **SIZES, kv_heads=1, norms=2, alibi=True, attention_dropout=0.2, residual_dropout=0.2, init_std=0.3,
    ),
    text=Config(
        vocab=105, context=96, kv_heads=1, norms=2, alibi=True, eos=None, width=32, layers=2, heads=4, init_std=0.4,
    ),
    draws=(Drawn("falcon", "Falcon", falcon, cases=5),),
)  # fmt: skip
