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
        scales = {"mscale": d.number(0.5, 2), "mscale_all_dim": d.number(0.5, 2)}
        settings |= d.turn(scales, {"attention_factor": d.number(0.5, 2)}, {})
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            settings[name] = [d.number(1, 9) for _ in range(width // 2)]
        settings["original_max_position_embeddings"] = d.whole(4, LENGTH + 4)
        settings |= d.turn({"attention_factor": d.number(0.5, 2)}, {})
        if d.turn(True, False):
            del settings["factor"]  # then it is the context over the original one
            settings["original_max_position_embeddings"] = d.whole(4, context)
    return settings


def gpt2(d: Draw) -> dict[str, Any]:
    heads, vocab = d.whole(2, 5), d.whole(40, 99)
    return {
        "vocab_size": vocab, "n_positions": d.whole(LENGTH, 40), "n_embd": heads * d.whole(3, 9), "n_head": heads,
        "n_layer": d.whole(2, 3), "n_inner": d.turn(d.whole(9, 40), None),
        "activation_function": d.turn("silu", "relu", "gelu", "quick_gelu", "tanh", "gelu_pytorch_tanh", "gelu_new"),
        "resid_pdrop": d.number(0.2, 0.5), "embd_pdrop": d.number(0.2, 0.5), "attn_pdrop": d.number(0.2, 0.5),
        "layer_norm_epsilon": d.number(1e-4, 1e-1), "initializer_range": d.number(0.03, 0.1),
        "scale_attn_weights": d.turn(False, True), "scale_attn_by_inverse_layer_idx": d.turn(True, False),
        "tie_word_embeddings": d.turn(False, True), **tokens(d, vocab),
    }  # fmt: skip


def llama(d: Draw) -> dict[str, Any]:
    kv, vocab, half, context = d.whole(1, 3), d.whole(40, 99), d.whole(2, 6), d.whole(18, 21)
    heads = kv * d.turn(2, 3, 1)
    return {
        "vocab_size": vocab, "max_position_embeddings": context, "hidden_size": heads * d.whole(3, 9),
        "num_hidden_layers": d.whole(2, 3), "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": 2 * half, "intermediate_size": d.whole(9, 40),
        "hidden_act": d.turn("gelu", "relu", "silu", "quick_gelu", "gelu_pytorch_tanh"),
        "initializer_range": d.number(0.03, 0.1), "rms_norm_eps": d.number(1e-4, 1e-1),
        "attention_dropout": d.number(0.1, 0.5), "attention_bias": d.turn(True, False), "mlp_bias": d.turn(True, False),
        "tie_word_embeddings": d.turn(True, False), "rope_parameters": rope(d, 2 * half, context), **tokens(d, vocab),
    }  # fmt: skip


FAMILIES = (
    Family("gpt2", "GPT-2", gpt2),
    Family("llama", "LLaMA 1/2/3", llama, cases=6),
)
