"""Layer 4: text from a model. Logit transforms, the decoding loop, `generate`, `stream`, `fill` and `fill_stream`."""

from garrulax.sampling.fill import Filled, fill, fill_stream
from garrulax.sampling.generate import generate, stream
from garrulax.sampling.loop import decode_step, decode_steps
from garrulax.sampling.state import Requests, State, prefill
from garrulax.sampling.transforms import DEFAULT, Transform, chain, temperature, top_k, top_p
from garrulax.sampling.writing import Completion

__all__ = [
    "DEFAULT",
    "Completion",
    "Filled",
    "Requests",
    "State",
    "Transform",
    "chain",
    "decode_step",
    "decode_steps",
    "fill",
    "fill_stream",
    "generate",
    "prefill",
    "stream",
    "temperature",
    "top_k",
    "top_p",
]
