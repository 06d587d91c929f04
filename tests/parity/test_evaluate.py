"""score, perplexity and the model class for lm-evaluation-harness, against transformers and the harness' own class."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest

import garrulax as gx

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import peer as peers
import torch
from registry import FAMILIES

from garrulax.hub.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DRAWS = {drawn.id: drawn for name in ("gpt", "llama") for drawn in FAMILIES[name].draws}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loaded(request, tmp_path_factory):
    """A model of ours, the log-probabilities of theirs in float64, and a text."""
    peer = peers.Peer(DRAWS[request.param], 0)
    folder = tmp_path_factory.mktemp("checkpoint")
    peer.model.save_pretrained(folder)
    model = gx.load(folder)
    with peers.double_precision():
        twin = peer.double()

    def log_softmax(ids):
        with peers.double_precision():
            logits = torch.tensor(np.asarray(peer.logits(np.array([ids]), twin)))[0]
        return torch.log_softmax(logits, -1).numpy()

    return model, log_softmax, peer.tokens[0].tolist()


@pytest.fixture
def pair(loaded):
    model, log_softmax, ids = loaded
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), model.params)
        yield (params, model.config), log_softmax, ids


def test_every_token_in_float64(pair):
    model, log_softmax, ids = pair
    found = gx.score(model, [ids, ids[:5]], prefix=ids[-1:])
    for score in found:
        wanted = log_softmax([ids[-1], *score.tokens])[:-1]
        picked = wanted[np.arange(len(score.tokens)), score.tokens]
        np.testing.assert_allclose(score.logprobs, picked, rtol=1e-11)
        assert score.is_argmax == (wanted.argmax(-1) == score.tokens).tolist()


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (9, 2), (5, 1)])
def test_windows_are_those_of_hugging_face_s_guide(pair, window, stride):
    """A restatement of the loop in transformers' page "Perplexity of fixed-length models"; with a stride of the whole
    window the token before each window joins it, so that the first of a window is scored too."""
    model, log_softmax, ids = pair
    nll, count, end_before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        begin = min(begin, max(end_before - 1, 0))
        logprobs = log_softmax(ids[begin:end])
        for i in range(max(end_before, 1), end):
            nll -= logprobs[i - 1 - begin, ids[i]]
            count += 1
        end_before = end
        if end == len(ids):
            break
    found = gx.perplexity(model, ids, window=window, stride=stride)
    assert found.tokens == count == len(ids) - 1
    assert found.nll == pytest.approx(nll, rel=1e-11)


@pytest.fixture(scope="module", params=["gpt", "llama"])
def harness(request, tmp_path_factory):
    """Our class and the harness' own for transformers on one model: LLaMA with a bos before texts, GPT-2 without."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval installs it")
    from lm_eval.models.huggingface import HFLM

    from garrulax.evaluate.lm_eval import Harness

    folder = tmp_path_factory.mktemp(request.param)
    library = made.byte_level_bpe(specials=("<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    if request.param == "llama":
        settings["bos_token"] = "<s>"
        library.post_processor = made.hf.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = dataclasses.replace(FAMILIES[request.param].decoding, vocab=400, context=96, eos=0)
    params = jax.tree.map(lambda x: x * 0.5, gx.init(config, jax.random.key(0)))
    gx.save(gx.Model(config, params, load_tokenizer(folder)), folder / "model")
    return Harness(gx.load(folder / "model")), HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=4)


def requests(*arguments):
    return [SimpleNamespace(args=args) for args in arguments]


def test_log_likelihoods_in_the_harness(harness):
    """Contexts that end with spaces, are empty or too long; texts that are longer than the context."""
    long = " ".join(f"def function_{i}" for i in range(60))
    asked = requests(
        ("def f(x", "):"), ("return ", "other"), ("return \n ", " other"), ("", "argument"), (long, " the end"),
        ("if argument", ":\n\t"), ("<|im_start|>user\nhi<|im_end|>\n", "yes"), ("<s>def", " function"),
    )  # fmt: skip
    found, wanted = (lm.loglikelihood(asked, disable_tqdm=True) for lm in harness)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in wanted], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    texts = requests((long,), ("def function_1(argument)",), (long[:200],))
    found, wanted = (lm.loglikelihood_rolling(texts, disable_tqdm=True) for lm in harness)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_texts_and_conversations_in_the_harness(harness):
    ours, theirs = harness
    asked = requests(
        ("def function", {"until": ["\n"], "max_gen_toks": 12}), ("return", {"until": ["e"], "max_gen_toks": 20}),
        ("if argument:" * 40, {"until": [], "max_gen_toks": 9, "do_sample": False}),
    )  # fmt: skip
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    sampled = requests(*[("def", {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0})] * 2)
    first, second = ours.generate_until(sampled)
    assert first != second
    talk = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A parrot"}]
    for messages, begin in ((talk[:1], True), (talk, False)):
        text = ours.apply_chat_template(messages, begin)
        assert text == theirs.apply_chat_template(messages, begin)
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHATML
    with pytest.raises(TypeError, match="mirostat"):
        ours.generate_until(requests(("def", {"until": [], "max_gen_toks": 4, "mirostat": 2})))


def test_the_local_tasks_of_the_example(harness, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    spec = importlib.util.spec_from_file_location("run", ROOT / "examples" / "lm_eval" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    found, wanted = (run.evaluate(lm) for lm in harness)
    assert set(found) == set(run.TASKS)
    compared = 0
    for task, numbers in wanted.items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)
                compared += 1
    assert compared >= 6
