"""Long texts of models of which only some layers have a window, against transformers in float64, token for token."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import torch
import transformers

import garrulax as gx
from garrulax.layers.cache_kinds import LayerWindows
from garrulax.sampling.generate import make_plan

pytestmark = pytest.mark.usefixtures("quick_compilation")
V, NEW, WINDOW = 61, 160, 16
MODELS = {
    "gpt_neo": lambda: transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            vocab_size=V, max_position_embeddings=512, hidden_size=32, num_layers=4, num_heads=4, window_size=WINDOW,
            attention_types=[[["global", "local"], 2]], bos_token_id=None, eos_token_id=None,
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, use_sliding_window=True, sliding_window=WINDOW,
            max_window_layers=1, bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_long_texts(name, tmp_path):
    rng = np.random.default_rng(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            norm = p.ndim == 1 and not path.endswith("bias")
            p.copy_(torch.from_numpy(0.3 * rng.normal(size=tuple(p.shape)) + norm))
    model.save_pretrained(tmp_path)
    prompts = [rng.integers(0, V, size).tolist() for size in (150, 5)]
    with jax.enable_x64(True):
        ours = gx.load(tmp_path)
        params = jax.tree.map(lambda x: x.astype(np.float64), ours.params)
        assert isinstance(make_plan((params, ours.config), prompts, NEW).decoder.cache, LayerWindows)
        found = gx.generate((params, ours.config), prompts, max_new_tokens=NEW, temperature=0)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.double().generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert completion.tokens == out[0, len(prompt) :].tolist()
        assert len(set(completion.tokens)) > 5  # no loop of a token or two
