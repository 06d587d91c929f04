"""Floor 4: from parameters to text. Logit transforms, one decoding step, one loop, and what is built of them."""

from garrulax.sampling.fill import Filled, fill, fill_stream
from garrulax.sampling.generate import generate, stream
from garrulax.sampling.loop import run, step
from garrulax.sampling.state import Requests, State, init
from garrulax.sampling.transforms import STANDARD, Transform, chain, temperature, top_k, top_p
from garrulax.sampling.writing import Completion

__all__ = [
    "STANDARD",
    "Completion",
    "Filled",
    "Requests",
    "State",
    "Transform",
    "chain",
    "fill",
    "fill_stream",
    "generate",
    "init",
    "run",
    "step",
    "stream",
    "temperature",
    "top_k",
    "top_p",
]
