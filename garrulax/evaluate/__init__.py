"""Layer 5: how probable texts are to a model. `score`, `perplexity`, `choose`; `lm_eval` for lm-evaluation-harness."""

from garrulax.evaluate.choose import Choice, choose
from garrulax.evaluate.perplexity import Perplexity, perplexity
from garrulax.evaluate.score import Score, score

__all__ = ["Choice", "Perplexity", "Score", "choose", "perplexity", "score"]
