"""ChatGLM2, ChatGLM3 and GLM-4."""

from typing import Any

from drawing import Draw, Drawn, rotary
from entry import SIZES, Change, Entry

from garrulax.models.chatglm import Config


def glm(d: Draw) -> dict[str, Any]:
    part = d.turn(0.75, 0.5, 1.0)
    drawn = rotary(d, 8, "yarn", "default", "dynamic")
    drawn["rope_parameters"]["partial_rotary_factor"] = part
    return {**drawn, "attention_bias": d.turn(False, True), "pad_token_id": d.whole(0, drawn["vocab_size"] - 1)}


def chatglm(d: Draw) -> dict[str, Any]:
    """What a ChatGLM2, 3 or the remote code's GLM-4 can be, said as transformers' Glm."""
    base, linear = {"rope_type": "default", "rope_theta": d.number(1e3, 1e6)}, {"rope_type": "linear", "factor": 4.0}
    settings = {"rope_theta": 1e4, "partial_rotary_factor": 0.5} | d.turn(base, linear)
    return {**glm(d), "hidden_act": "silu", "tie_word_embeddings": False, "rope_parameters": settings}


_GLM = {"dialect": "glm", "residual_dropout": 0.0}

ENTRY = Entry(
    config=Config(**SIZES, head_dim=8, mlp_width=12, attention_dropout=0.1, residual_dropout=0.1),
    rows=("ChatGLM2/3-6B", "GLM-4"),
    oracles={
        # chatglm3*: the same numbers (test_models_chatglm.py)
        **dict.fromkeys(("chatglm2", "chatglm2_mha", "chatglm2_post"), "ChatGLM2/3-6B"),
        "glm": "GLM-4", "glm4": "GLM-4",
    },
    unstacked=("chatglm2", "glm"),
    changes={
        "width": Change(12, also={"kv_heads": 1}),
        "heads": Change(1, also={"kv_heads": 1}),
        "rotary": Change(1.0, base=_GLM),
        "activation": Change("relu", base=_GLM),
        "tied": Change(True, base=_GLM),
        "output_norms": Change(True, base=_GLM, also={"dialect": "glm4"}),
        "dialect": Change("chatglm", base=_GLM),
    },
    elsewhere=("context", "dialect", "pad"),
    counts={
        **dict.fromkeys(("chatglm2-6b", "chatglm2-6b-32k", "chatglm3-6b", "chatglm3-6b-32k"), 6_243_584_000),
        "glm-4-9b": 9_399_951_360, "glm-4-9b-chat": 9_399_951_360, "glm-4-9b-0414": 9_400_279_040,
    },
    foreign="gpt2",
    rich=Config(
        **SIZES, kv_heads=1, mlp_width=12, output_norms=True, attention_dropout=0.2, dialect="glm4", init_std=0.3,
    ),
    text=Config(
        vocab=103, context=96, kv_heads=2, mlp_width=48, eos=None, width=32, layers=2, heads=4, init_std=0.4,
    ),
    draws=(
        Drawn("glm", "GLM-4", glm),
        Drawn("glm4", "GLM-4", glm),
        Drawn("glm", "ChatGLM2/3-6B", chatglm, cases=2, detour="chatglm"),
    ),
)  # fmt: skip
