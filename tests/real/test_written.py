"""What SmolLM2-135M-Instruct writes after twenty prompts, against transformers (`make_written.py`); and JSON."""

import json
import re

import jsonschema
import pytest
from smollm2_texts import BEGINNINGS
from test_smollm2 import HERE, model  # noqa: F401  (fixtures)

import garrulax as gx

pytestmark = pytest.mark.real
KINDS = {
    "greedy": {"temperature": 0},
    "penalised": {"temperature": 0, "repetition_penalty": 1.3},
    "no_repeat": {"temperature": 0, "no_repeat_ngram_size": 3},
    "beams": {"search": gx.beam(4)},
}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "country": {"enum": ["France", "Spain", "Italy"]}},
    "required": ["city", "country"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def written():
    return json.loads((HERE / "smollm2_written.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_transformers(kind, model, written):  # noqa: F811
    wanted = written[kind]
    most = max(map(len, wanted))
    found = gx.generate(model, BEGINNINGS, max_new_tokens=most, end_tokens=2, **KINDS[kind])
    assert [one.tokens for one in found] == wanted


def repeated(tokens, n=4):
    """How many runs of n tokens stood in the text before."""
    runs = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(runs) - len(set(runs))


def test_penalties_end_repetition(written):
    counts = {kind: sum(repeated(tokens[:64]) for tokens in written[kind]) for kind in KINDS}
    print(counts)
    assert counts["penalised"] < counts["greedy"] / 4
    assert counts["no_repeat"] == 0


def test_json_answers_are_valid_and_sensible(model):  # noqa: F811
    capitals = {"Paris": "France", "Madrid": "Spain", "Rome": "Italy"}
    prompts = [
        model.tokenizer.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": f"{city} is the capital of {country}. Write this as JSON with city and country.",
                }
            ]
        )
        for city, country in capitals.items()
    ]
    answers = gx.generate(model, prompts, constrain=gx.json_schema(CITY), temperature=0, max_new_tokens=60)
    for answer, (city, country) in zip(answers, capitals.items(), strict=True):
        found = json.loads(answer.text)
        jsonschema.validate(found, CITY)
        assert found == {"city": city, "country": country}
    dates = gx.generate(model, ["The war ended on"] * 8, constrain=gx.regex(r"\d{4}-\d\d-\d\d"), seed=list(range(8)))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", one.text) for one in dates)
