"""What a model writes while it is trained."""

from collections.abc import Sequence

import jax

import garrulax as gx
from garrulax import models
from garrulax.core.spec import Tree
from garrulax.core.strategies import PIPELINE_AXIS

TEMPERATURE, TOP_P = 0.8, 0.95


class Samples:
    """Writes after the same prompts with the same seeds each time, so that samples of several steps can be compared.

    Args:
        model: Config and tokenizer.
        prompts: Beginnings of texts, or texts with blanks for a model that fills them.
        tokens: Most tokens of an answer.
        mesh: The run's devices by axis, as in its settings.

    Raises:
        ValueError: With several processes and the axis `pipeline`; and for a prompt that does not fit.
    """

    def __init__(self, model: gx.Model, prompts: Sequence[str], tokens: int, mesh: str = ""):
        if jax.process_count() > 1 and PIPELINE_AXIS in mesh:
            raise ValueError("sample_every does not go with several processes and the mesh axis pipeline: leave it out")
        self._model, self._prompts, self._tokens = model, list(prompts), tokens
        assert model.tokenizer is not None
        for prompt in prompts:
            length = len(model.tokenizer.prompt(prompt))
            if not 0 < length < model.config.context:
                raise ValueError(
                    f"sample_prompts: {prompt!r} has {length} tokens, the model's context is {model.config.context}"
                )

    def __call__(self, params: Tree) -> list[tuple[str, str]]:
        """Pairs of a prompt and what the model writes after it."""
        mesh = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
        if mesh is not None and PIPELINE_AXIS in mesh.shape:  # sampling does not run in stages
            params = jax.device_get(params)
        model = self._model.replace(params=params)
        return [(prompt, self._one(model, prompt, seed)) for seed, prompt in enumerate(self._prompts)]

    def _one(self, model: gx.Model, prompt: str, seed: int) -> str:
        options = {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": seed}
        if models.blanks(model.config) is not None and "MASK]" in prompt:
            return gx.fill(model, prompt, max_new_tokens=self._tokens, **options).text
        assert model.tokenizer is not None
        room = model.config.context - len(model.tokenizer.prompt(prompt))
        return gx.generate(model, prompt, max_new_tokens=min(self._tokens, room), **options).text
