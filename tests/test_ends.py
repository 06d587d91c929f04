"""The ends of texts, and how many tokens are generated: chat formats, stop strings with control tokens, defaults."""

import dataclasses
import json

import jax
import made
import pytest
import tiny

import garrulax as gx
from garrulax.cli import main
from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
from garrulax.models import forward_pass
from garrulax.sampling.writing import Writer

pytestmark = pytest.mark.usefixtures("quick_compilation")
SPECIALS = ("<|endoftext|>", "<|user|>", "<|end|>")


def always(model, prompt, token):
    """The model, changed so that it says `token` after `prompt`."""
    hidden, _ = jax.jit(forward_pass.hidden, static_argnums=2)(model.params, jax.numpy.array([prompt]), model.config)
    return model.replace(params={**model.params, "head": model.params["head"].at[token].set(hidden[0, -1] * 100)})


@pytest.fixture(scope="module")
def chat_model():
    pytest.importorskip("jinja2")
    tokenizer = ByteTokenizer(SPECIALS)
    tokenizer.config = {"chat_template": "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"}
    config = dataclasses.replace(tiny.SHALLOW["llama"], vocab=259, eos=256)
    return gx.Model(config, tiny.params(config), tokenizer)


def test_readmes_lines_end_with_the_answer(tmp_path):
    """ChatGLM3's folder, whose config names one end token only: <|user|> ends the answer."""
    config = gx.preset(
        "chatglm3-6b", vocab=512, layers=1, width=32, heads=4, kv_heads=2, mlp_width=64, context=512, eos=2
    )
    gx.save(gx.Model(config, gx.init(config, jax.random.key(0))), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(made.pieces())
    about = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    model = gx.load(tmp_path)
    user = model.tokenizer.specials["<|user|>"]
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    model = always(model, ids, user)
    for stop in ((), "<|user|>"):
        done = gx.generate(model, ids, max_new_tokens=8, temperature=0, stop=stop)
        assert (done.tokens, done.text, done.finish_reason) == ([user], "", "eos")
    assert tiny.drained(gx.stream(model, ids, max_new_tokens=8, temperature=0))[1] == done
    free = gx.generate(model, ids, max_new_tokens=8, temperature=0, end_tokens=())
    assert (len(free.tokens), free.finish_reason) == (8, "length")
    stopped = gx.generate(model, ids, max_new_tokens=8, temperature=0, end_tokens=[], stop=["x", "<|user|>"])
    assert (stopped.tokens, stopped.text, stopped.finish_reason) == ([user], "", "stop")


def test_end_tokens_of_a_template_and_of_the_caller(chat_model):
    prompt = chat_model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    model = always(chat_model, prompt, 258)
    short = {"max_new_tokens": 4, "temperature": 0}
    assert gx.generate(model, prompt, **short).tokens == [258]
    plain = model.replace(tokenizer=ByteTokenizer(SPECIALS))  # no chat format: only the config's eos ends a text
    free = gx.generate(plain, prompt, **short).tokens
    assert len(free) == 4
    assert gx.generate(plain, prompt, end_tokens=258, **short).tokens == [258]
    assert gx.generate(plain, prompt, end_tokens=free[1:2], **short).tokens == free[: free.index(free[1]) + 1]
    for bad, words in ((["</s>"], "must be token ids"), ("</s>", "must be token ids"), (259, "has token id 259")):
        with pytest.raises(ValueError, match=f"end_tokens {words}"):
            gx.generate(plain, prompt, end_tokens=bad)


class Words:
    """Tokens that are pieces of text, or control tokens."""

    strips_space = spaces_words = False

    def __init__(self, *words, **specials):
        self.words, self.specials, self.vocab = words, specials, len(words)

    def token_bytes(self, token):
        return b"" if token in self.specials.values() else self.words[token].encode()

    def stream(self, *, start=True):
        from garrulax.hub.tokenizers import StreamDecoder

        return StreamDecoder(self, start=start)


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("END", "aEN", 3),  # the token, not only its text
        (["END\n"], "aENb", 6),
        ("bEND\n", "aEN", 6),
        ("ENDEND", "aENb\n", 8),
        ("ENDx", "aENb\n", 9),
        ("ENb", "a", 4),  # a control token that no stop string names has no text, and hides nothing
    ],
)
def test_control_tokens_in_stop_strings(stop, text, count):
    words = Words("a", "EN", "b", "\n", "x", "", END=5)
    writer = Writer(words, 99, (), stop)
    shown = [writer.push([t], [0.0]) for t in (0, 1, 5, 2, 5, 3, 5, 5, 4)]
    assert (writer.reason, len(writer.tokens), "".join(shown)) == ("stop", count, text)
    assert writer.completion().text == text


def test_a_control_token_that_is_spelled_stops_too():
    writer = Writer(Words("a", "EN", "D", "", END=3), 99, (), "END")
    assert [writer.push([t], [0.0]) for t in (0, 1, 2)] == ["a", "", ""]
    assert writer.reason == "stop"


def test_as_many_new_tokens_as_fit(chat_model):
    model, off = chat_model, {"end_tokens": (), "temperature": 0}
    context = model.config.max_length
    assert context == 96
    texts = gx.generate(model, ["x" * 90, "x" * 40], **off)
    assert [len(done.tokens) for done in texts] == [6, 56]
    mixed = gx.generate(model, ["x" * 90, "x" * 40], max_new_tokens=[None, 3], **off)
    assert [len(done.tokens) for done in mixed] == [6, 3]
    assert len(tiny.drained(gx.stream(model, "x" * 90, **off))[1].tokens) == 6
    with pytest.raises(ValueError, match="prompt 0 has 96 tokens, which leaves no space in the model's context of 96"):
        gx.generate(model, "x" * 96, **off)
    with pytest.raises(ValueError, match="prompt 0 has 90 tokens and 7 new ones are asked for"):
        gx.generate(model, "x" * 90, max_new_tokens=7, **off)
    long = dataclasses.replace(model.config, context=400)
    assert len(gx.generate(model.replace(config=long), "x", **off).tokens) == 128


def test_none_is_off(chat_model):
    off = gx.generate(chat_model, "ab", max_new_tokens=6, temperature=None, top_k=None, top_p=None, seed=3)
    assert off == gx.generate(chat_model, "ab", max_new_tokens=6, seed=3)
    each = gx.generate(chat_model, ["ab", "ab"], max_new_tokens=6, top_k=[None, 1], top_p=[1, None], seed=3)
    assert each[0].tokens == off.tokens
    assert each[1].tokens == gx.generate(chat_model, "ab", max_new_tokens=6, temperature=0).tokens


def test_rows_that_pad_the_embedding_are_never_chosen():
    """400 rows for 257 tokens; the end token beyond them, which the files of a tokenizer may lack, stays."""
    config = dataclasses.replace(tiny.SHALLOW["llama"], vocab=400, eos=399)
    model = gx.Model(config, tiny.params(config), ByteTokenizer())
    done = gx.generate(model, ["ab"] * 4, max_new_tokens=16, seed=[1, 2, 3, 4], temperature=3.0)
    tokens = [token for one in done for token in one.tokens]
    assert len(tokens) > 40
    assert all(token < 257 or token == 399 for token in tokens)
    assert max(t for one in gx.generate(model.replace(tokenizer=None), [[97]] * 4, seed=[1, 2, 3, 4], max_new_tokens=16)
               for t in one.tokens) > 257  # fmt: skip
    assert gx.generate(always(model, [97, 98], 399), "ab", temperature=0, max_new_tokens=4).finish_reason == "eos"


@pytest.mark.parametrize("family", ["glm"])
def test_fill_takes_the_same_arguments(family):
    model = tiny.byte_model(family, layers=1)
    text = "a \ud83d [MASK] b [MASK]"
    knobs = {"temperature": 0, "end_tokens": ()}
    filled = gx.fill(model, text, max_new_tokens=5, top_k=None, **knobs)
    assert filled.text.startswith("a \ufffd")
    assert [len(span.tokens) for span in filled.spans] == [5, 5]
    assert "".join(tiny.drained(gx.fill_stream(model, text, max_new_tokens=5, **knobs))[0]) == filled.text
    fits = gx.fill(model, "a [MASK]", **knobs)
    assert len(fits.spans[0].tokens) == min(128, model.config.context - 1)
    model.tokenizer = ByteTokenizer(GLM_SPECIALS)
    first = filled.spans[0].tokens[1]
    assert gx.fill(model, text, max_new_tokens=5, temperature=0, end_tokens=first).spans[0].finish_reason == "eos"


def test_the_command_goes_the_same_way(chat_model, tmp_path, capsys):
    ids = chat_model.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    gx.save(always(chat_model, ids, 258), tmp_path / "my model")
    words = ["generate", str(tmp_path / "my model"), "Hi", "--temperature", "0"]
    assert main([*words, "--chat"]) == 0
    assert capsys.readouterr() == ("\n", "")
    assert main(["generate", str(tmp_path / "my model"), "Hi \udcff" + "x" * 80]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Hi \ufffdx")
    assert "add --chat to send it as a message" in err
    assert len(err.splitlines()) == 1
