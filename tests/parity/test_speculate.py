"""Speculation against transformers in float64, token for token: assisted generation and prompt lookup."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import torch
import transformers

import garrulax as gx

pytestmark = pytest.mark.usefixtures("quick_compilation")
V, NEW = 61, 40
PROMPTS = [[3, 1, 4, 1, 5, 9, 3, 1, 4], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


def gpt2(layers):
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=96, n_embd=32, n_layer=layers, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def llama(layers):
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def both(model, seed, folder):
    """transformers' model with random weights, and ours, in float64."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = p.ndim == 1 and not name.endswith("bias")
            p.copy_(torch.from_numpy(0.2 * rng.normal(size=tuple(p.shape)) + norm))
    model.save_pretrained(folder)
    ours = gx.load(folder)
    return model.double().eval(), (gx.unstack(jax.tree.map(lambda x: x.astype(np.float64), ours.params)), ours.config)


@pytest.mark.parametrize("family", [gpt2, llama])
def test_greedy_tokens(family, tmp_path):
    with jax.enable_x64(True):
        model, ours = both(family(2), 0, tmp_path / "model")
        small, our_small = both(family(1), 1, tmp_path / "small")
        lookups = gx.generate(ours, PROMPTS, max_new_tokens=NEW, temperature=0, speculate=gx.prompt_lookup(2, 5))
        drafts = gx.generate(ours, PROMPTS, max_new_tokens=NEW, temperature=0, speculate=gx.draft(our_small))
    for prompt, found, assisted in zip(PROMPTS, lookups, drafts, strict=True):
        ids = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
        theirs = model.generate(ids, prompt_lookup_num_tokens=5, max_matching_ngram_size=2, **options)
        assert found.tokens == theirs[0, len(prompt) :].tolist()
        theirs = model.generate(ids, assistant_model=small, **options)
        assert assisted.tokens == theirs[0, len(prompt) :].tolist()
    assert sum(one.passes for one in lookups) < len(PROMPTS) * NEW
