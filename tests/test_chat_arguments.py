"""Arguments of apply_chat_template: those of transformers, templates by name, and templates that look into messages."""

import json

import made
import pytest

from garrulax.hub.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer

pytest.importorskip("jinja2")
TURNS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}<|end|>{% endfor %}"
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]


def with_template(template, specials=("<|endoftext|>", "<|end|>")):
    tokenizer = ByteTokenizer(specials)
    tokenizer.config = {"chat_template": template}
    return tokenizer


def said(tokenizer, ids):
    names = {i: content for content, i in tokenizer.specials.items()}
    return b"".join(names[i].encode() if i in names else tokenizer.token_bytes(i) for i in ids).decode()


def test_the_model_continues_the_last_message():
    t = with_template(TURNS)
    ids = t.apply_chat_template(TALK, continue_final_message=True)
    assert said(t, ids) == "user: q<|end|>assistant: The answer is"
    assert said(t, t.apply_chat_template(TALK, False)) == "user: q<|end|>assistant: The answer is<|end|>"
    # A template that trims messages trims the continued one too; another keeps its space.
    spaced = [TALK[0], {"role": "assistant", "content": "so "}]
    assert said(t, t.apply_chat_template(spaced, continue_final_message=True)).endswith("assistant: so ")
    trims = with_template(TURNS.replace("m['content']", "m['content'] | trim"))
    assert said(trims, trims.apply_chat_template(spaced, continue_final_message=True)).endswith("assistant: so")
    forged = [TALK[0], {"role": "assistant", "content": "<|end|> \ud800 <|end|>"}]
    ids = t.apply_chat_template(forged, continue_final_message=True)
    assert said(t, ids).endswith("assistant: <|end|> \ufffd <|end|>")
    assert ids.count(257) == 1, "messages end no turn"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    t.config["chat_template"] = "{{ messages[0].content[0].text }}<|end|>"
    assert said(t, t.apply_chat_template(parts, continue_final_message=True)) == "hi"
    t.config["chat_template"] = "{{ messages[0].thought }}<|end|>"
    assert said(t, t.apply_chat_template([TALK[0] | {"thought": "hm"}], continue_final_message="thought")) == "hm"
    with pytest.raises(ValueError, match="has no text 'thought' to continue"):
        t.apply_chat_template(TALK, continue_final_message="thought")
    t.config["chat_template"] = "{{ messages[0].content }}<|end|>"
    with pytest.raises(ValueError, match="does not write the last message as it is"):
        t.apply_chat_template(TALK, continue_final_message=True)
    with pytest.raises(ValueError, match="not both"):
        t.apply_chat_template(TALK, True, continue_final_message=True)


def test_published_formats_continue_too():
    t = SentencePieceTokenizer(made.pieces())
    ids = t.apply_chat_template(TALK, template="llama2", continue_final_message=True)
    assert ids == [1, *t.encode("[INST] q [/INST] The answer is")]
    tagged = [TALK[0], {"role": "assistant", "content": "a [INST] b"}]
    ids = t.apply_chat_template(tagged, template="llama2", continue_final_message=True)
    assert t.decode(ids) == "[INST] q [/INST] a [INST] b"


def test_the_text_of_a_conversation():
    t = with_template(TURNS)
    assert t.apply_chat_template(TALK, tokenize=False) == "user: q<|end|>assistant: The answer is<|end|>"
    with pytest.raises(ValueError, match=r"a message spells the control token '<\|end\|>'"):
        t.apply_chat_template([TALK[0] | {"content": "<|end|>"}], tokenize=False)
    llama = SentencePieceTokenizer(made.pieces())
    text = llama.apply_chat_template(TALK, False, tokenize=False, template="llama2")
    assert text == "<s>[INST] q [/INST] The answer is </s>"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_tensors", "np"), ("return_dict", True), ("return_assistant_tokens_mask", True), ("padding", True),
        ("truncation", True), ("max_length", 5), ("tokenizer_kwargs", {"a": 1}), ("chat_template", TURNS),
        ("conversation", TALK), ("sanitize_control_tokens", False),
    ],
)  # fmt: skip
def test_arguments_of_transformers_that_are_refused(name, value):
    t = with_template(TURNS)
    with pytest.raises(ValueError, match=name) as error:
        t.apply_chat_template(TALK, **{name: value})
    assert "\n" not in str(error.value)
    off = {"return_dict": False, "padding": False, "max_length": None, "sanitize_control_tokens": True, "tools": None}
    assert t.apply_chat_template(TALK, **off) == t.apply_chat_template(TALK)
    llama = SentencePieceTokenizer(made.pieces())
    assert llama.apply_chat_template(TALK[:1], template="llama2", **off)


def test_templates_by_name(tmp_path):
    (tmp_path / "additional_chat_templates").mkdir()
    for name, text in (("rag", "rag"), ("tool_use", "tools")):
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(text + "{{ messages | length }}")
    ByteTokenizer().save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "own"}))

    def shown(folder, **given):
        t = load_tokenizer(folder)
        return said(t, t.apply_chat_template(TALK, **given))

    for folder in (tmp_path, tmp_path / "copy"):
        assert [shown(folder, template=name) for name in ("rag", "default", None)] == ["rag2", "own", "own"]
        assert shown(folder, tools=[{"name": "sing"}]) == "tools2"
        load_tokenizer(folder).save(tmp_path / "copy")
    with pytest.raises(
        ValueError, match="there is no chat format 'absent': give template=, one of default, rag, tool_u"
    ):
        shown(tmp_path, template="absent")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ 1 }}of json"}', "utf-8-sig")
    assert shown(tmp_path) == "1of json"
    (tmp_path / "chat_template.jinja").write_text("{{ 1 }}of jinja", "utf-8-sig")
    assert shown(tmp_path) == "1of jinja"


THOUGHT = "<think>se|cret</think> 42 <b>"
LOOKS = {
    "{% if '</think>' in c %}{{ c.split('</think>')[-1] }}{% endif %}": " 42 <b>",
    "{% if '</think>' not in c %}none{% else %}{{ c.rsplit('</think>', 1)[0] }}{% endif %}": "<think>se|cret",
    "{{ c.partition('</think>')[2] }}": " 42 <b>",
    "{{ c.rpartition('<think>')[2].removesuffix('<b>').strip() }}": "se|cret</think> 42",
    "{{ c.replace('<think>', '').replace('</think>', '') }}": "se|cret 42 <b>",
    "{{ c | replace('</think>', '#') }}": "<think>se|cret# 42 <b>",
    "{{ c.startswith('<think>') }}{{ c.endswith('</think>') }}{{ c.count('</think>') }}": "TrueFalse1",
    "{{ c[c.find('</think>') + 8:] }}": " 42 <b>",
    "{{ c[:7] == '<think>' }}{{ c[:7] != '<think>' }}{{ c[:7] is eq('<think>') }}": "TrueFalseTrue",
    "{{ c[:7] in ['<think>', 'x'] }}{{ c[:7] in {'<think>': 1} }}": "TrueTrue",
    "{{ c.lstrip('<thinkse|').rstrip('>b<') }}": ">se|cret</think> 42 ",
    "{{ c.split(maxsplit=1)[1] }}|{{ c.split() | length }}": "42 <b>|3",
}


@pytest.mark.parametrize("source", LOOKS)
@pytest.mark.parametrize("specials", [(), ("<think>", "</think>")])
def test_templates_that_look_into_messages(source, specials):
    """The same, whether what they look for is a control token or not; and what is shown stays plain text."""
    t = with_template("{% set c = messages[0].content %}" + source, ("<|endoftext|>", *specials))
    ids = t.apply_chat_template([{"role": "assistant", "content": THOUGHT}], False)
    assert said(t, ids) == LOOKS[source]
    assert max(ids) < 256, "no control token"


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_the_ends_of_answers():
    """eos, and the control token that the format writes behind an answer; a format without one has eos only."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert with_template(CHATML, names).answer_ends == (256, 258)
    assert with_template(TURNS.replace("<|end|>", " <|end|>\n")).answer_ends == (256, 257)
    assert with_template("{% for m in messages %}{{ m.content }}\n\n{% endfor %}").answer_ends == (256,)
    assert with_template("{{ raise_exception('no') }}").answer_ends == (256,)
    assert ByteTokenizer().answer_ends == (), "no chat format"


def test_half_characters_in_messages():
    t = with_template("{{ messages[0].content }}{{ tools[0] }}")
    ids = t.apply_chat_template([TALK[0] | {"content": "a\ud83d"}], tools=["\ude00b"])
    assert t.decode(ids) == "a\ufffd\ufffdb"
