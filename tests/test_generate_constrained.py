"""Constraints in `generate`: what is written satisfies them, whatever the batch, the limit and the transforms."""

import json
import re

import jax
import jsonschema
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

forward = jax.jit(gx.forward, static_argnums=2)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON, DATE = gx.json_schema(SCHEMA), gx.regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@pytest.fixture(scope="module")
def model():
    return tiny.byte_model("llama", layers=1, bos=None, eos=256)


def test_texts_satisfy_their_constraints(model):
    """JSON, a date and free text in one batch, each as alone; strings that could go on for ever are closed."""
    prompts, limits = ["Ann is", "The day:", "Once", "A"], [60, 20, 9, 90]
    constrain = [JSON, DATE, None, JSON]
    seeds = [1, 2, 3, 4]
    out = gx.generate(model, prompts, constrain=constrain, max_new_tokens=limits, seed=seeds)
    for i in (0, 3):
        jsonschema.validate(json.loads(out[i].text), SCHEMA)
        assert out[i].finish_reason == "eos"
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", out[1].text)
    assert out[2].tokens == gx.generate(model, "Once", max_new_tokens=9, seed=3).tokens
    pieces, alone = tiny.drained(gx.stream(model, prompts[0], constrain=JSON, max_new_tokens=60, seed=1))
    assert "".join(pieces) == out[0].text
    assert alone.tokens == out[0].tokens
    np.testing.assert_allclose(alone.logprobs, out[0].logprobs, atol=1e-4)


def test_forced_tokens_at_the_end_of_the_context():
    """The pass that reads them is padded beyond it; a position that was learned has no value there."""
    model = tiny.byte_model("gpt", layers=1, bos=None, eos=256)
    out = gx.generate(model, "x" * 60, constrain=gx.regex("a" * 35), max_new_tokens=36)
    assert (out.text, out.finish_reason) == ("a" * 35, "eos")


def test_each_prompt_of_best_of_has_its_own_constraint(model):
    search, limits = gx.best_of(2, returned=2), {"max_new_tokens": 20}
    dates, free = gx.generate(model, ["The day:", "Once"], constrain=[DATE, None], search=search, seed=[4, 7], **limits)
    assert all(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", one.text) for one in dates)
    assert sorted(one.tokens for one in free) == sorted(
        gx.generate(model, "Once", seed=seed, **limits).tokens for seed in (7, 8)
    )


def test_greedy_is_the_best_allowed_token(model):
    out = gx.generate(model, "The day:", constrain=DATE, max_new_tokens=20, temperature=0)
    ids, digits = model.tokenizer.encode("The day:"), [model.tokenizer.encode(str(d))[-1] for d in range(10)]
    logits, _ = forward(model.params, np.array([[*ids, *out.tokens]]), model.config)
    for i, token in enumerate(out.tokens[:10]):
        allowed = model.tokenizer.encode("-")[-1:] if i in (4, 7) else digits
        assert token == allowed[np.asarray(logits[0, len(ids) - 1 + i])[allowed].argmax()]
    assert out.tokens[10] == model.config.eos


def test_beams_satisfy_constraints(model):
    """The two best dates are those that a search without constraints over the allowed digits alone would find."""
    short = gx.regex("[0-3][ab]")
    found = gx.generate(model, "The day:", constrain=short, search=gx.beam(8, returned=8))
    ids = model.tokenizer.encode("The day:")
    texts = [a + b for a in "0123" for b in "ab"]
    rows = np.array([[*ids, *model.tokenizer.encode(text), 256] for text in texts])
    logits, _ = forward(model.params, rows, model.config)
    logprobs = np.asarray(logits, np.float64) - np.logaddexp.reduce(np.asarray(logits, np.float64), -1, keepdims=True)
    scores = np.take_along_axis(logprobs[:, len(ids) - 1 : -1], rows[:, len(ids) :, None], -1).sum((1, 2)) / 3
    order = np.argsort(-scores)
    assert [one.text for one in found] == [texts[i] for i in order]
    np.testing.assert_allclose([one.score for one in found], scores[order], atol=1e-5)


def test_errors_come_before_anything_is_compiled(model):
    with pytest.raises(ValueError, match="needs 11 tokens"):
        gx.generate(model, "The day:", constrain=DATE, max_new_tokens=10)
    with pytest.raises(TypeError, match=r"must be made by gx\.json_schema"):
        gx.generate(model, "a", constrain="[0-9]")
    with pytest.raises(ValueError, match="2 constraints for 1 prompts"):
        gx.generate(model, "a", constrain=[DATE, DATE])
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        gx.generate((model.params, model.config), [1, 2], constrain=DATE)
    with pytest.raises(ValueError, match="leave no token"):
        gx.generate(model, "a", constrain=gx.regex("[0-9]+"), max_new_tokens=5, allowed_tokens=[65])


@pytest.mark.slow
def test_the_command(model, tmp_path, capsys):
    gx.save(gx.Model(model.config, model.params, model.tokenizer), tmp_path / "m")
    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["one", "two"]}))
    for options in (
        ["--regex", "[0-9]{4}", "--min-p", "0.01"],
        ["--json-schema", str(tmp_path / "schema.json"), "--repetition-penalty", "1.2", "--no-repeat-ngram-size", "3"],
        ["--json-schema", str(tmp_path / "schema.json"), "--beams", "2"],
    ):
        assert main(["generate", str(tmp_path / "m"), "ab", "--no-cache", *options]) == 0
        text = capsys.readouterr().out.removeprefix("ab").strip()
        assert re.fullmatch(r"[0-9]{4}" if "--regex" in options else r'"(one|two)"', text)
    assert main(["generate", str(tmp_path / "m"), "ab", "--regex", "(a"]) == 2
    assert "regex" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "m"), "ab", "--beams", "2", "--temperature", "0.1"]) == 2
    assert "--beams does not sample" in capsys.readouterr().err
