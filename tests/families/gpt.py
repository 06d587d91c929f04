"""GPT-1, GPT-2, GPT-3 and GPT-Neo."""

from typing import Any

from drawing import LENGTH, Draw, Drawn, tokens
from entry import SIZES, Change, Entry

from garrulax.models.gpt import Config


def gpt(d: Draw, heads: int, vocab: int) -> dict[str, Any]:
    """What GPT-1 and GPT-2 have in common."""
    return {
        "vocab_size": vocab, "n_positions": d.whole(LENGTH, 40), "n_embd": heads * d.whole(3, 9), "n_head": heads,
        "n_layer": d.whole(2, 4), "resid_pdrop": d.number(0.2, 0.5), "embd_pdrop": d.number(0.2, 0.5),
        "attn_pdrop": d.number(0.2, 0.5), "layer_norm_epsilon": d.number(1e-4, 1e-1),
        "initializer_range": d.number(0.03, 0.1), "tie_word_embeddings": d.turn(False, True), **tokens(d, vocab),
    }  # fmt: skip


def gpt1(d: Draw) -> dict[str, Any]:
    return {**gpt(d, d.whole(2, 5), d.whole(40, 99)), "afn": d.turn("silu", "gelu", "relu", "swish")}


def gpt2(d: Draw) -> dict[str, Any]:
    return {
        **gpt(d, d.whole(2, 5), d.whole(40, 99)), "n_inner": d.turn(d.whole(9, 40), None),
        "activation_function": d.turn("silu", "relu", "gelu", "quick_gelu", "tanh", "gelu_pytorch_tanh", "gelu_new"),
        "scale_attn_weights": d.turn(False, True), "scale_attn_by_inverse_layer_idx": d.turn(True, False),
    }  # fmt: skip


def gpt_neo(d: Draw) -> dict[str, Any]:
    heads, vocab, layers = d.whole(2, 5), d.whole(40, 99), d.whole(2, 4)
    mixed = [[["local"], 1], [["global", "local"], (layers - 1) // 2], [["global"], (layers - 1) % 2]]
    regular = [[["global", "local"], layers // 2], [["global"], layers % 2]]
    return {
        "vocab_size": vocab, "max_position_embeddings": d.whole(LENGTH, 40), "hidden_size": heads * d.whole(3, 9),
        "num_heads": heads, "num_layers": layers, "intermediate_size": d.turn(d.whole(9, 40), None),
        "attention_types": d.turn(mixed, regular, [[["global"], layers]]), "window_size": d.whole(2, LENGTH - 2),
        "activation_function": d.turn("silu", "gelu_new", "relu"), "resid_dropout": d.number(0.2, 0.5),
        "embed_dropout": d.number(0.2, 0.5), "attention_dropout": d.number(0.2, 0.5),
        "layer_norm_epsilon": d.number(1e-4, 1e-1), "initializer_range": d.number(0.03, 0.1),
        "tie_word_embeddings": d.turn(False, True), **tokens(d, vocab),
    }  # fmt: skip


ENTRY = Entry(
    config=Config(**SIZES, band=4, scale_by_layer=True, init_std=0.3),
    rows=("GPT-1", "GPT-2", "GPT-3"),
    oracles={"gpt1": "GPT-1", "gpt2": "GPT-2", "gpt3": "GPT-3", "gptneo": "GPT-3"},
    unstacked=("gpt2", "gpt3"),
    changes={
        "band": Change(3),
        "band_stride": Change(2),
        "band_parity": Change(0),
        "qkv_bias": Change(False, also={"scale_attention": False, "scale_by_layer": False}),  # GPT-Neo
        "post_norm": Change(True, also={"band": 0, "scale_by_layer": False}),  # GPT-1
    },
    counts={
        "gpt1": 116_534_784, "gpt3-125m": 125_226_240, "gpt3-350m": 355_871_744, "gpt3-760m": 760_300_032,
        "gpt3-1.3b": 1_315_723_264, "gpt3-2.7b": 2_651_553_280, "gpt3-6.7b": 6_658_404_352,
        "gpt3-13b": 12_853_386_240, "gpt3-175b": 174_604_259_328, "gpt2": 124_439_808, "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    },
    foreign="llama",
    text=Config(vocab=97, context=96, eos=None, bos=None, tied=False, width=32, layers=2, heads=4, init_std=0.4),
    draws=(Drawn("openai-gpt", "GPT-1", gpt1), Drawn("gpt2", "GPT-2", gpt2), Drawn("gpt_neo", "GPT-3", gpt_neo)),
)  # fmt: skip
