"""generation_config.json: its end tokens count, and everything in it is kept."""

import json

import jax
import pytest

import garrulax as gx
from garrulax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = models.preset("llama-tiny", layers=1, width=16, heads=2, kv_heads=2, mlp_width=16, vocab=64, eos=2)
FULL = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "_from": {"a": None}}


@pytest.fixture
def folder(tmp_path):
    gx.save(gx.Model(CONFIG, gx.init(CONFIG, jax.random.key(0))), tmp_path / "m")
    return tmp_path / "m"


def write(folder, content):
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_end_tokens_are_read_and_everything_is_kept(folder):
    write(folder, FULL)
    model = gx.load(folder)
    assert (model.config.eos, model.generation) == ((2, 7), FULL)
    assert gx.hub.reading.load_config(folder).eos == (2, 7)
    gx.save(model, folder)
    assert json.loads((folder / "generation_config.json").read_text()) == FULL
    assert gx.load(folder).config == model.config
    gx.save(model.replace(config=CONFIG), folder)  # end tokens that were changed since
    assert json.loads((folder / "generation_config.json").read_text()) == FULL | {"eos_token_id": 2}


@pytest.mark.parametrize(
    ("content", "eos"),
    [({}, 2), ({"eos_token_id": None, "top_k": 5}, 2), ({"eos_token_id": []}, 2), ({"eos_token_id": 7}, 7),
     ({"eos_token_id": [2]}, 2), ({"eos_token_id": [9, 999]}, (9, 999))],
)  # fmt: skip
def test_which_end_tokens_count(folder, content, eos):
    write(folder, content)
    model = gx.load(folder)
    assert model.config.eos == eos
    gx.save(model, folder)
    if content:
        assert json.loads((folder / "generation_config.json").read_text()) == content


@pytest.mark.parametrize(
    ("content", "words"),
    [("[1]", "is not a JSON object"), ("{", "is not valid JSON"), ({"eos_token_id": "</s>"}, "must be a token id"),
     ({"eos_token_id": [1, -2]}, "must be a token id"), ({"eos_token_id": True}, "must be a token id")],
)  # fmt: skip
def test_a_malformed_file_gives_one_line(folder, content, words):
    write(folder, content)
    with pytest.raises(ValueError, match=f"generation_config.json.*{words}") as error:
        gx.load(folder)
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_dropped(folder):
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text((folder / name).read_text(), "utf-8-sig")
    assert gx.load(folder).config == CONFIG


def test_named_templates_are_converted_and_replaced(folder, tmp_path):
    from garrulax.hub.converting import convert_folder

    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    for _ in range(2):  # the second replaces the first
        convert_folder(folder, tmp_path / "c")
        assert (tmp_path / "c" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 1 }}"
    (tmp_path / "c" / "additional_chat_templates" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds more than a model \(additional_chat_templates/mine.txt\)"):
        convert_folder(folder, tmp_path / "c")
