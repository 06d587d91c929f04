"""Beam search against transformers in float64, token for token, on tiny random models with large weights."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import torch
import transformers

import garrulax as gx

pytestmark = pytest.mark.usefixtures("quick_compilation")
V, NEW = 61, 14
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=None,
        )
    ),
}  # fmt: skip
#: beams, end tokens, arguments of transformers; those of `gx.beam` have the same names.
SETTINGS = {
    "default": (4, [11], {}),
    "several ends": (3, [7, 11, 19, 23, 31, 43], {"length_penalty": 0.5, "early_stopping": True}),
    "early": (4, [7, 11, 19, 23, 31, 43], {"early_stopping": True}),
    "never": (4, [7, 11, 19, 23, 31, 43], {"early_stopping": "never", "length_penalty": 2.0}),
    "negative": (5, [7, 11, 19, 23, 31, 43], {"early_stopping": "never", "length_penalty": -0.5}),
    "no ends": (6, [], {"length_penalty": 0.0}),
}
PROCESSED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4}


@pytest.fixture(scope="module", params=MODELS, name="pair")
def _pair(request, tmp_path_factory):
    """transformers' model and ours, in float64."""
    rng = np.random.default_rng(len(request.param))
    model = MODELS[request.param]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = p.ndim == 1 and not name.endswith("bias")
            p.copy_(torch.from_numpy(0.3 * rng.normal(size=tuple(p.shape)) + norm))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with jax.enable_x64(True):
        ours = gx.load(folder)
        params = jax.tree.map(lambda x: x.astype(np.float64), ours.params)
        yield model.double(), (gx.unstack(params), ours.config)


def theirs(model, prompt, beams, ends, returned, **settings):
    """(new tokens, score) of each sequence."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, num_beams=beams, num_return_sequences=returned,
        max_new_tokens=NEW, eos_token_id=ends or None, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True, **settings,
    )  # fmt: skip
    return [
        (trimmed(row[len(prompt) :].tolist(), ends), score)
        for row, score in zip(out.sequences, out.sequences_scores.tolist(), strict=True)
    ]


def trimmed(tokens, ends):
    """The tokens up to the first end token."""
    return tokens[: min((tokens.index(end) + 1 for end in ends if end in tokens), default=len(tokens))]


@pytest.mark.parametrize("processed", [False, True], ids=["plain", "processed"])
@pytest.mark.parametrize("name", SETTINGS)
def test_beam_search(pair, name, processed):
    model, ours = pair
    beams, ends, settings = SETTINGS[name]
    knobs = PROCESSED if processed else {}
    search = gx.beam(beams, returned=beams, **settings)
    together = gx.generate(ours, PROMPTS, max_new_tokens=NEW, end_tokens=ends, search=search, **knobs)
    for prompt, own in zip(PROMPTS, together, strict=True):
        wanted = theirs(model, prompt, beams, ends, beams, **settings, **knobs)
        assert [one.tokens for one in own] == [tokens for tokens, _ in wanted]
        np.testing.assert_allclose([one.score for one in own], [score for _, score in wanted], rtol=2e-5)
