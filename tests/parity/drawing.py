"""Random configurations of the families that transformers has: one table of draws a family, by the keys of its
config class. A draw is off the default of that class; a flag or a kind is off it in the first case and takes turns in
the others."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

LENGTH = 22  # tokens of a text: some contexts are shorter, which rotary positions allow


class Draw:
    """The random choices of one case of a family; the same case always makes the same ones."""

    def __init__(self, name: str, case: int):
        self._case, self._calls = case, 0
        self._seed = zlib.crc32(name.encode())
        self._random = np.random.default_rng([self._seed, case])

    def whole(self, low: int, high: int) -> int:
        return int(self._random.integers(low, high + 1))

    def number(self, low: float, high: float) -> float:
        """Evenly on a logarithmic scale, three digits."""
        return float(f"{np.exp(self._random.uniform(np.log(low), np.log(high))):.3g}")

    def turn(self, *options: Any) -> Any:
        """As many cases as there are options see each once, in an order of their own; the first case the first."""
        self._calls += 1
        lap, at = divmod(self._case, len(options))
        order = np.random.default_rng([self._seed, self._calls, lap]).permutation(len(options)).tolist()
        if lap == 0:
            order = [0, *(i for i in order if i)]
        return options[order[at]]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family that transformers has.

    name: model_type of its config class. row: in README's table. draw: the arguments of that class.
    cases: how many are drawn unless PARITY_CASES says so. detour: a dialect of ours that transformers does not have,
    in which the model is written and read before it is compared.
    """

    name: str
    row: str
    draw: Callable[[Draw], dict[str, Any]]
    cases: int = 3
    detour: str | None = None

    @property
    def id(self) -> str:
        return self.detour or self.name


def tokens(d: Draw, vocab: int) -> dict[str, Any]:
    """bos and eos. Of several eos the last is replaced by one that the model writes (`peer.Peer`)."""
    several = [d.whole(0, vocab - 1), d.whole(0, vocab - 1)]
    return {"bos_token_id": d.whole(3, vocab - 1), "eos_token_id": d.turn(several, several[0], several[:1])}


def rope(d: Draw, width: int, context: int, *kinds: str) -> dict[str, Any]:
    """rope_parameters for `width` rotated entries of a head; of the kinds, or of all kinds."""
    kind = d.turn(*(kinds or ("llama3", "dynamic", "yarn", "default", "longrope", "linear")))
    settings: dict[str, Any] = {"rope_type": kind, "rope_theta": d.number(30, 1e6)}
    if kind != "default":
        settings["factor"] = d.number(1.5, 9)
    if kind == "llama3":
        low = d.number(0.5, 2)
        settings |= {"low_freq_factor": low, "high_freq_factor": low * d.number(1.5, 5)}
        settings["original_max_position_embeddings"] = d.whole(15, 500)
    if kind == "yarn":
        slow = d.number(0.5, 2)
        settings |= {"beta_slow": slow, "beta_fast": slow * d.number(4, 40), "truncate": d.turn(False, True)}
        settings["original_max_position_embeddings"] = d.whole(3, 2000)
        scales = {"mscale": d.number(0.5, 3), "mscale_all_dim": d.number(0.5, 3)}
        settings |= d.turn(scales, {"attention_factor": d.number(0.7, 1.4)}, {})
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            settings[name] = [d.number(1, 9) for _ in range(width // 2)]
        settings["original_max_position_embeddings"] = d.whole(4, LENGTH + 4)
        settings |= d.turn({"attention_factor": d.number(0.7, 1.4)}, {})
        if d.turn(True, False):
            del settings["factor"]  # then it is the context over the original one
            settings["original_max_position_embeddings"] = d.whole(4, context)
    return settings


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


def rotary(d: Draw, head_dim: int = 0, *kinds: str) -> dict[str, Any]:
    """What the families with grouped queries, a gated MLP and rotary positions have in common. head_dim: width of a
    head, by default any even one."""
    kv, vocab, context = d.whole(1, 3), d.whole(40, 99), d.whole(18, 21)
    head_dim, heads = head_dim or 2 * d.whole(2, 6), kv * d.turn(2, 3, 1)
    return {
        "vocab_size": vocab, "max_position_embeddings": context, "hidden_size": heads * d.whole(3, 9),
        "num_hidden_layers": d.whole(2, 4), "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": head_dim, "intermediate_size": d.whole(9, 40),
        "hidden_act": d.turn("gelu", "relu", "silu", "quick_gelu", "gelu_pytorch_tanh"),
        "initializer_range": d.number(0.03, 0.1), "rms_norm_eps": d.number(1e-4, 1e-1),
        "attention_dropout": d.number(0.1, 0.5), "tie_word_embeddings": d.turn(True, False),
        "rope_parameters": rope(d, head_dim, context, *kinds), **tokens(d, vocab),
    }  # fmt: skip


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


def baichuan(d: Draw) -> dict[str, Any]:
    """What a Baichuan-7B can be, said as transformers' Llama."""
    drawn = llama(d)
    heads, head_dim = drawn["num_attention_heads"], drawn["head_dim"]
    return {
        **drawn, "num_key_value_heads": heads, "hidden_size": heads * head_dim, "attention_bias": False,
        "mlp_bias": False, "attention_dropout": 0.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip


FAMILIES = (
    Family("openai-gpt", "GPT-1", gpt1),
    Family("gpt2", "GPT-2", gpt2),
    Family("gpt_neo", "GPT-3", gpt_neo),
    Family("llama", "LLaMA 1/2/3", llama, cases=6),
    Family("mistral", "Mistral", mistral),
    Family("qwen2", "Qwen2", qwen2),
    Family("llama", "Baichuan", baichuan, cases=2, detour="baichuan"),
    Family("falcon", "Falcon", falcon, cases=5),
    Family("glm", "GLM-4", glm),
    Family("glm4", "GLM-4", glm),
    Family("glm", "ChatGLM2/3-6B", chatglm, cases=2, detour="chatglm"),
)
