"""OPT."""

from typing import Any

from drawing import Draw, Drawn, tokens
from entry import SIZES, Change, Entry

from garrulax.models.opt import Config


def opt(d: Draw) -> dict[str, Any]:
    heads, vocab = d.whole(2, 4), d.whole(40, 99)
    before, removed = d.turn((True, True), (False, False), (True, False))
    return {
        "vocab_size": vocab, "max_position_embeddings": d.whole(22, 40), "hidden_size": heads * d.whole(4, 9),
        "num_hidden_layers": d.whole(2, 4), "num_attention_heads": heads, "ffn_dim": d.whole(9, 40),
        "word_embed_proj_dim": d.turn(d.whole(5, 7), None), "activation_function": d.turn("gelu", "silu", "gelu_new"),
        "do_layer_norm_before": before, "_remove_final_layer_norm": removed, "enable_bias": d.turn(False, True),
        "attention_dropout": d.number(0.1, 0.5), "dropout": d.number(0.2, 0.5), "init_std": d.number(0.03, 0.1),
        "tie_word_embeddings": d.turn(False, True), **tokens(d, vocab),
    }  # fmt: skip


ENTRY = Entry(
    config=Config(**SIZES, mlp_width=12, embedding_width=6, attention_dropout=0.1, init_std=0.3),
    rows=("OPT",),
    oracles={"opt": "OPT", "opt_350m": "OPT"},
    unstacked=("opt_350m",),
    changes={"embedding_width": Change(5), "activation": Change("gelu")},
    counts={
        "opt-125m": 125_239_296, "opt-350m": 331_196_416, "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800,
        "opt-6.7b": 6_658_473_984, "opt-13b": 12_853_473_280, "opt-30b": 29_974_540_288, "opt-66b": 65_719_701_504,
    },
    foreign="gpt2",
    draws=(Drawn("opt", "OPT", opt),),
)  # fmt: skip
