"""Layer 4: text from a model. Logit transforms, the decoding loop, `generate`, `stream`, `fill` and `fill_stream`."""

from garrulax.sampling.buckets import Buckets
from garrulax.sampling.decoder import Decoder, compile
from garrulax.sampling.fill import Filled, fill, fill_stream
from garrulax.sampling.generate import compile_ahead, generate, stream
from garrulax.sampling.session import Session
from garrulax.sampling.state import Requests, State
from garrulax.sampling.transforms import DEFAULT, Transform, chain, temperature, top_k, top_p
from garrulax.sampling.writing import Completion

__all__ = [
    "DEFAULT",
    "Buckets",
    "Completion",
    "Decoder",
    "Filled",
    "Requests",
    "Session",
    "State",
    "Transform",
    "chain",
    "compile",
    "compile_ahead",
    "fill",
    "fill_stream",
    "generate",
    "stream",
    "temperature",
    "top_k",
    "top_p",
]
