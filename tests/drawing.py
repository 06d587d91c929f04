"""Random configurations of the model classes that transformers has, by the keys of their config classes.

The functions for each family are in `families/`. Every draw differs from the default of the class; a flag or a kind
differs from it in the first case and takes turns in the others.
"""

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
class Drawn:
    """A model class of transformers, with random configurations.

    Attributes:
        name: model_type of its config class.
        row: Its row in README's table.
        draw: Makes the arguments of that class.
        cases: Number of configurations, unless PARITY_CASES says another.
        detour: A dialect of ours that transformers does not have, in which the model is written and read before it is
            compared.
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
