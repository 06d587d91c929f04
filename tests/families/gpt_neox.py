"""GPT-NeoX and Pythia."""

from typing import Any

from drawing import Draw, Drawn, rope, tokens
from entry import SIZES, Change, Entry

from garrulax.models.gpt_neox import Config


def gpt_neox(d: Draw) -> dict[str, Any]:
    heads, head_dim, vocab, context = d.whole(2, 4), 8, d.whole(40, 99), d.whole(18, 21)
    part = d.turn(0.5, 1.0, 0.75)
    settings = rope(d, int(head_dim * part), context, "yarn", "default", "linear") | {"partial_rotary_factor": part}
    return {
        "vocab_size": vocab, "max_position_embeddings": context, "hidden_size": heads * head_dim,
        "num_hidden_layers": d.whole(2, 4), "num_attention_heads": heads, "intermediate_size": d.whole(9, 40),
        "hidden_act": d.turn("relu", "gelu", "gelu_fast", "silu"), "layer_norm_eps": d.number(1e-4, 1e-1),
        "use_parallel_residual": d.turn(False, True), "attention_bias": d.turn(False, True),
        "attention_dropout": d.number(0.1, 0.5), "hidden_dropout": d.number(0.1, 0.5),
        "initializer_range": d.number(0.03, 0.1), "tie_word_embeddings": d.turn(True, False),
        "rope_parameters": settings, **tokens(d, vocab),
    }  # fmt: skip


ENTRY = Entry(
    config=Config(**SIZES, mlp_width=12, rotary=1.0, attention_dropout=0.1, residual_dropout=0.1, init_std=0.3),
    rows=("GPT-NeoX",),
    oracles={"gpt_neox": "GPT-NeoX", "gpt_neox_seq": "GPT-NeoX"},
    unstacked=("gpt_neox_seq",),
    changes={"rotary": Change(0.5)},
    elsewhere=("context",),
    counts={
        "gpt-neox-20b": 20_554_567_680, "pythia-14m": 14_067_712, "pythia-31m": 30_494_720, "pythia-70m": 70_426_624,
        "pythia-160m": 162_322_944, "pythia-410m": 405_334_016, "pythia-1b": 1_011_781_632,
        "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960, "pythia-6.9b": 6_857_302_016,
        "pythia-12b": 11_846_072_320,
    },
    foreign="gpt2",
    draws=(Drawn("gpt_neox", "GPT-NeoX", gpt_neox),),
)  # fmt: skip
