"""Transforms against the logits processors of transformers, on random logits in float64: the same tokens are removed,
ties included, and the others have the same logits. Each case is a batch whose rows have different knobs and texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from garrulax.sampling import knobs, transforms

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import torch
from transformers.generation import logits_process as theirs

V, ROWS, SIZE, ENDS = 53, 24, 16, [7, 11, 50]
SEEDS = range(4)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def random_logits(rng, ties):
    logits = rng.normal(size=(ROWS, V)) * 3
    if ties:
        logits = np.round(logits)  # about 15 different values in a row
    logits[rng.random((ROWS, V)) < 0.05] = -np.inf
    return logits


def random_texts(rng):
    """Prompts and new tokens of few different ids, so that they repeat themselves."""
    return [(rng.integers(0, 6, rng.integers(1, 9)), rng.integers(0, 6, rng.integers(0, 7))) for _ in range(ROWS)]


def ours(names, values, logits, texts, **reserved):
    """Logits after the transforms of `names`, each row after its own prompt and new tokens.

    Without names: the standard chain."""
    transform = (
        transforms.chain(*(transforms.STANDARD[n]() for n in names)) if names else transforms.standard_chain(values)
    )
    given = knobs.knobs_per_prompt(ROWS, vocab=V, **values)
    arrays = knobs.knob_arrays(transform, given, ROWS)
    floats = [name for name, x in arrays.items() if getattr(x, "dtype", None) == np.float32]
    arrays |= {name: np.array(given[name]) if name in given else arrays[name] for name in floats}  # float64, as theirs
    prompt = np.full((ROWS, 8), -1, np.int32)
    for row, (before, _) in zip(prompt, texts, strict=True):
        row[: len(before)] = before
    fixed = {"prompt": prompt, "ends": np.tile(ENDS, (ROWS, 1)).astype(np.int32), "limit": np.full(ROWS, 7), **reserved}
    state = transform.init({**arrays, **jax.tree.map(jnp.asarray, fixed), "vocab": V, "size": SIZE})
    observe = jax.jit(transform.observe)
    for i in range(max(len(new) for _, new in texts)):
        active = np.array([i < len(new) for _, new in texts])
        token = jnp.array([new[i] if i < len(new) else 0 for _, new in texts], jnp.int32)
        after = observe(token, state)
        state = jax.tree.map(lambda a, b, m=active: jnp.where(m.reshape(-1, *(1,) * (a.ndim - 1)), a, b), after, state)
    return np.asarray(jax.jit(transform.update)(jnp.asarray(logits), state)[0])


def compare(own, processors, logits, texts):
    """`processors`: function from row to those of transformers."""
    for row, (before, new) in enumerate(texts):
        ids = torch.tensor(np.concatenate([before, new])[None])
        wanted = torch.tensor(logits[row : row + 1])
        for processor in processors(row):
            wanted = processor(ids, wanted)
        wanted = wanted[0].numpy()
        np.testing.assert_array_equal(np.isinf(own[row]), np.isinf(wanted), err_msg=f"row {row}")
        kept = ~np.isinf(wanted)
        np.testing.assert_allclose(own[row][kept], wanted[kept], rtol=1e-12, atol=1e-12, err_msg=f"row {row}")


FILTERS = {
    "top_k": (theirs.TopKLogitsWarper, lambda rng: int(rng.integers(1, V + 1))),
    "top_p": (theirs.TopPLogitsWarper, lambda rng: float(rng.choice([0.99, 0.9, 0.5, 0.3, 0.01, rng.random()]))),
    "min_p": (theirs.MinPLogitsWarper, lambda rng: float(rng.random())),
    "top_h": (theirs.TopHLogitsWarper, lambda rng: float(rng.uniform(0.01, 0.99))),
    "typical_p": (theirs.TypicalLogitsWarper, lambda rng: float(rng.uniform(0.01, 0.99))),
    "epsilon_cutoff": (theirs.EpsilonLogitsWarper, lambda rng: float(10 ** -rng.uniform(0.1, 5))),
    "eta_cutoff": (theirs.EtaLogitsWarper, lambda rng: float(np.float32(10 ** -rng.uniform(0.1, 5)))),
}


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FILTERS)
def test_filters(name, seed, ties):
    rng = np.random.default_rng(seed)
    processor, draw = FILTERS[name]
    logits, texts, values = random_logits(rng, ties), random_texts(rng), [draw(rng) for _ in range(ROWS)]
    own = ours([name], {name: values}, logits, texts)
    if ties and name in ("top_p", "top_h"):  # torch does not define which of equal logits it puts first
        for row, value in enumerate(values):
            wanted = processor(value)(None, torch.tensor(logits[row : row + 1])).numpy()[0]
            np.testing.assert_array_equal(np.sort(own[row]), np.sort(wanted), err_msg=f"row {row}")
    else:
        compare(own, lambda row: [processor(values[row])], logits, texts)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_of_a_large_vocabulary_and_equal_logits(name):
    rng = np.random.default_rng(0)
    processor, _ = FILTERS[name]
    logits = np.stack([rng.normal(size=4001) * 2, np.zeros(4001)])[: 1 if name == "top_h" else 2]
    for value in (0.3, 0.05):
        value = int(100 * value) if name == "top_k" else value
        filter = transforms.STANDARD[name]()
        own = filter.update(jnp.asarray(logits), filter.init({name: jnp.full(len(logits), value)}))[0]
        wanted = processor(value)(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(np.isinf(own).sum(-1), np.isinf(wanted).sum(-1))
        np.testing.assert_array_equal(own[0], wanted[0])


def biases(rng, most=3):
    """Sequences of 1 to `most` ids, and numbers that float32 has exactly."""
    words = [tuple(map(int, rng.integers(0, 6, rng.integers(1, most + 1)))) for _ in range(6)]
    return {word: float(rng.choice([-8.0, -0.5, 0.25, 3.0])) for word in words}


def dictionary(name, rng):
    """(value of the knob, processor of transformers for a prompt of a length)."""
    if name == "repetition_penalty":
        value = float(rng.uniform(0.5, 2))
        return value, lambda _: theirs.RepetitionPenaltyLogitsProcessor(value)
    if name == "no_repeat_ngram_size":
        value = int(rng.integers(1, 5))
        return value, lambda _: theirs.NoRepeatNGramLogitsProcessor(value)
    if name == "sequence_bias":
        value = biases(rng)
        return value, lambda _: theirs.SequenceBiasLogitsProcessor(value)
    if name == "bad_words_ids":
        value = [*map(list, biases(rng)), [ENDS[0]]]
        return value, lambda _: theirs.NoBadWordsLogitsProcessor(value, ENDS)
    if name == "min_length":
        value = int(rng.integers(0, 14))
        return value, lambda _: theirs.MinLengthLogitsProcessor(value, ENDS)
    if name == "min_new_tokens":
        value = int(rng.integers(0, 7))
        return value, lambda prompt: theirs.MinNewTokensLengthLogitsProcessor(prompt, value, ENDS)
    if name == "forced_bos_token_id":
        return 9, lambda _: theirs.ForcedBOSTokenLogitsProcessor(9)
    if name == "forced_eos_token_id":
        value = [5] if rng.random() < 0.5 else [5, 8]
        return value, lambda prompt: theirs.ForcedEOSTokenLogitsProcessor(prompt + 7, value)
    if name == "exponential_decay_length_penalty":
        value = (int(rng.integers(0, 5)), float(rng.uniform(0.8, 2)))
        return value, lambda prompt: theirs.ExponentialDecayLengthPenalty(value, ENDS, prompt)
    value = list(map(int, rng.integers(0, V, 5)))
    if name == "suppress_tokens":
        return value, lambda _: theirs.SuppressTokensLogitsProcessor(value)
    assert name == "begin_suppress_tokens"
    return value, lambda prompt: theirs.SuppressTokensAtBeginLogitsProcessor(value, prompt)


OTHERS = [
    "sequence_bias",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("names", [*([name] for name in OTHERS), OTHERS], ids=lambda names: names[len(names) > 1 :][0])
def test_penalties_sequences_and_lengths(names, seed):
    rng = np.random.default_rng(seed)
    logits, texts = random_logits(rng, ties=seed % 2), random_texts(rng)
    drawn = {name: [dictionary(name, rng) for _ in texts] for name in names}
    values = {name: [value for value, _ in pairs] for name, pairs in drawn.items()}
    compare(
        ours(names, values, logits, texts),
        lambda row: [drawn[name][row][1](len(texts[row][0])) for name in names],
        logits,
        texts,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_guidance(seed):
    rng = np.random.default_rng(seed)
    logits, texts = rng.normal(size=(ROWS, V)) * 3, random_texts(rng)
    scale = np.repeat(np.where(rng.random(ROWS // 2) < 0.3, 1, rng.uniform(0.5, 3, ROWS // 2)), 2).tolist()
    second = np.arange(ROWS) % 2 == 1
    own = ours(["guidance_scale"], {"guidance_scale": scale}, logits, texts, unconditional=second)
    for row in range(0, ROWS, 2):
        processor = theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale[row], None)
        other = torch.tensor(logits[row + 1][None, None])
        processor.get_unconditional_logits = lambda ids, other=other: other
        wanted = processor(None, torch.tensor(logits[row : row + 1])).numpy()[0]
        if scale[row] == 1:  # transformers does not use its processor then
            np.testing.assert_array_equal(own[row : row + 2], logits[row : row + 2])
        else:
            np.testing.assert_allclose(own[row : row + 2], [wanted, wanted], rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_standard_order_is_that_of_transformers(seed):
    """The list that `GenerationMixin` builds from a GenerationConfig with every field."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    rng = np.random.default_rng(seed)
    logits, texts = random_logits(rng, ties=False), random_texts(rng)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=V))
    fields = {
        "sequence_bias": {(1, 2): 2.0, (3,): -1.0},
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[4], [2, 3]],
        "min_length": 9,
        "min_new_tokens": 3,
        "exponential_decay_length_penalty": (2, 1.5),
        "suppress_tokens": [20, 21],
        "begin_suppress_tokens": [22],
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 5,
        "temperature": 0.7,
        "top_h": 0.9,
        "top_k": 40,
        "top_p": 0.97,
        "min_p": 0.01,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-3,
        "eta_cutoff": float(np.float32(2e-3)),
    }
    own = ours((), fields, logits, texts)

    def processors(row):
        prompt = len(texts[row][0])
        config = GenerationConfig(**fields, do_sample=True, max_length=prompt + 7, eos_token_id=ENDS)
        config._eos_token_tensor = torch.tensor(ENDS)
        return model._get_logits_processor(config, input_ids_seq_length=prompt, device="cpu")

    compare(own, processors, logits, texts)
