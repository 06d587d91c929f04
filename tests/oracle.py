"""Loading the reference cases in tests/oracles: tiny random models run by the original authors' code.

Format: <case>_s0.safetensors (weights under the reference's names), .npz (inputs and outputs), .json (configuration).
llama_longrope was made with transformers 5.23.0 on the weights of llama (`short_logits`: the first eight tokens alone,
which use the short factors), qwen2_window likewise on those of qwen2 (a window of 3 from layer 1 on).
cpp_baichuan*.npz: hidden states of a prompt of three tokens and two steps, from chatglm.cpp's tests.
gpt3 was made with the same transformers' GPT-2 on the weights of gpt2, whose layers 0 and 2 were given a dense mask: a
token sees itself, the two before it, and every fifth.
"""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from registry import CAUSAL
from safetensors.numpy import load_file

from garrulax import models
from garrulax.core import spec
from garrulax.hub.reading import family_of

FOLDER = pathlib.Path(__file__).parent / "oracles"
LLAMA = tuple(case for case, row in CAUSAL.items() if row == "LLaMA 1/2/3")
CHATGLM = tuple(case for case, row in CAUSAL.items() if row == "ChatGLM2/3-6B")

#: Cases whose caches, masks and positions are those of another case.
LIKE_OTHERS = (
    "gptneo", "llama_tied", "llama_linear", "llama_yarn", "llama3", "qwen2", "baichuan7b",
    "baichuan2_7b_composite", "chatglm2_mha", "chatglm2_post", "glm4", "falcon7b", "falcon40b", "falconrw_alibi_pow2",
    "opt_350m",
)  # fmt: skip

#: ChatGLM-6B's code as published, and changed.
CHATGLM_6B = {
    "chatglm1_ref": {},
    "chatglm1_alphaN": {"alpha_layers": 3, "dialect": "glm-130b"},
    "chatglm1_alphaN_fp32freq": {"alpha_layers": 3, "half_frequencies": False, "dialect": "glm-130b"},
}


def arrays(case):
    return np.load(FOLDER / f"{case}_s0.npz")


def raw_config(case):
    raw = json.loads((FOLDER / f"{case}_s0.json").read_text())
    if case == "baichuan2_7b_composite":  # the body is Baichuan-7B's code, whose config.json knows no other head
        raw["config"]["normalized_head"] = True
    return raw


def weights(case):
    return FOLDER / f"{raw_config(case).get('weights', case)}_s0.safetensors"


def tensors(case):
    return load_file(weights(case))


@functools.cache
def config(case):
    if case == "glm_original":
        raw = raw_config(case)
        ids = raw["commands"]
        return models.glm.Config(
            vocab=raw["vocab"], context=raw["max_seq"], width=raw["hidden"], layers=raw["layers"], heads=raw["heads"],
            eos=ids["eos"], pad=ids["pad"], cls=ids["ENC"], mask=ids["MASK"], sentence_mask=ids["sMASK"],
            generation_mask=ids["gMASK"], sop=ids["sop"], eop=ids["eop"],
        )  # fmt: skip
    if case == "glm130b":
        raw = raw_config(case)
        return models.glm130b.Config(
            vocab=raw["vocab"], context=64, width=raw["hidden"], layers=raw["num_layers"], heads=raw["heads"],
            mlp_width=raw["inner"], gated=True, positions_2d=False, half_frequencies=False,
            alpha_layers=raw["num_layers"], mask=90, generation_mask=91, sop=94, eop=95, pad=0, dialect="glm-130b",
        )  # fmt: skip
    raw = raw_config(case)["config"]
    found = family_of(raw).from_hf(raw)
    if case in CHATGLM_6B:  # the same weights three times, with a head of their own
        return dataclasses.replace(found, tied=False, **CHATGLM_6B[case])
    return found


@functools.cache
def params(case, dtype=jnp.float32):
    """Parameters of a case, read through the ParamSpec tree; every stored tensor must be used."""
    c, stored = config(case), tensors(case)
    more = models.family(c).tensor_names(c)
    left = {k for k in stored if not (more.buffers and k.endswith(more.buffers)) and not (c.tied and k in more.heads)}

    def one(s):
        left.difference_update(s.names)
        parts = [s.layout.read(stored[name]) for name in s.names]
        return jnp.asarray(np.stack(parts) if s.layers else parts[0], dtype)

    tree = spec.map_specs(one, models.parameters(c))
    assert not left, f"unused tensors {left}"
    return tree


def relative_error(ours, reference):
    """Largest difference, relative to the largest value of the reference."""
    reference = np.asarray(reference, np.float64)
    return np.abs(np.asarray(ours, np.float64) - reference).max() / np.abs(reference).max()
