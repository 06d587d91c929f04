"""LLaMA, Mistral, Qwen 2 and Baichuan."""

from typing import Any

from drawing import LENGTH, Draw, Drawn, rotary
from entry import SIZES, Change, Entry

from garrulax.layers.rope import Rope
from garrulax.models.llama import Config


def llama(d: Draw) -> dict[str, Any]:
    return {**rotary(d), "attention_bias": d.turn(True, False), "mlp_bias": d.turn(True, False)}


def mistral(d: Draw) -> dict[str, Any]:
    return {**rotary(d, 0, "yarn", "default", "dynamic"), "sliding_window": d.turn(d.whole(2, 7), None, LENGTH)}


def qwen2(d: Draw) -> dict[str, Any]:
    drawn = rotary(d, 0, "yarn", "longrope", "llama3")
    layers = drawn["num_hidden_layers"]
    first = d.whole(0, layers - 1)
    kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return {
        **drawn, "sliding_window": d.whole(2, 12), "max_window_layers": first, "use_sliding_window": True,
        **d.turn({}, {"layer_types": kinds}, {"use_sliding_window": False}),
    }  # fmt: skip


def baichuan(d: Draw) -> dict[str, Any]:
    """What a Baichuan-7B can be, said as transformers' Llama."""
    drawn = llama(d)
    heads, head_dim = drawn["num_attention_heads"], drawn["head_dim"]
    return {
        **drawn, "num_key_value_heads": heads, "hidden_size": heads * head_dim, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip


_BAICHUAN = {"dialect": "baichuan", "attention_dropout": 0.0}
_OTHER_SIZES = {"kv_heads": 1, "head_dim": 0}

ENTRY = Entry(
    config=Config(**SIZES, kv_heads=2, mlp_width=12, attention_dropout=0.1),
    rows=("LLaMA 1/2/3", "Mistral", "Qwen2", "Baichuan", "Baichuan2"),
    oracles={
        **dict.fromkeys(
            (
                "llama", "llama_gqa", "llama_tied", "llama_linear", "llama_dynamic", "llama_yarn", "llama3",
                "llama_longrope",
            ),
            "LLaMA 1/2/3",
        ),
        "mistral": "Mistral", "qwen2": "Qwen2", "qwen2_window": "Qwen2", "baichuan7b": "Baichuan",
        "baichuan13b": "Baichuan", "baichuan2_7b_composite": "Baichuan2", "baichuan2_13b": "Baichuan2",
    },
    unstacked=("llama_gqa", "qwen2_window", "baichuan13b"),
    changes={
        "width": Change(12, also=_OTHER_SIZES),
        "heads": Change(1, also=_OTHER_SIZES),
        "window": Change(3, base={"dialect": "mistral"}),
        "window_from": Change(1, base={"dialect": "qwen2", "qkv_bias": True, "window": 3}),
        "positions": Change("alibi", base=_BAICHUAN),
        "normalized_head": Change(True, base=_BAICHUAN),
        "qkv_bias": Change(True, also={"dialect": "qwen2"}),
        "out_bias": Change(True, also={"qkv_bias": True}),
        "dialect": Change("mistral"),
    },
    elsewhere=("context", "dialect"),
    counts={
        "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616,
        "llama-65b": 65_285_660_672, "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
        "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
        "llama3-405b": 405_853_388_800, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
        "llama3.3-70b": 70_553_706_496, "mistral-7b": 7_241_732_096, "mistral-7b-v0.2": 7_241_732_096,
        "mistral-7b-v0.3": 7_248_023_552, "qwen2-0.5b": 494_032_768, "qwen2-1.5b": 1_543_714_304,
        "qwen2-7b": 7_615_616_512, "qwen2-72b": 72_706_203_648, "baichuan-7b": 7_000_559_616,
        "baichuan-13b": 13_264_901_120, "baichuan2-7b": 7_505_973_248, "baichuan2-13b": 13_896_668_160,
    },
    foreign="gpt2",
    rich=Config(
        **SIZES, kv_heads=1, mlp_width=12, qkv_bias=True, out_bias=True, mlp_bias=True, attention_dropout=0.2,
        rope=Rope(kind="dynamic", factor=2.0, original_context=6), init_std=0.3,
    ),
    text=Config(
        vocab=101, context=96, kv_heads=2, mlp_width=48, eos=None, width=32, layers=2, heads=4, init_std=0.4,
    ),
    draws=(
        Drawn("llama", "LLaMA 1/2/3", llama, cases=6),
        Drawn("mistral", "Mistral", mistral),
        Drawn("qwen2", "Qwen2", qwen2),
        Drawn("llama", "Baichuan", baichuan, cases=2, detour="baichuan"),
    ),
)  # fmt: skip
