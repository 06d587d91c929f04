"""Chat templates, continued messages and flags of tokenizer files, against transformers."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import made

from garrulax.hub.tokenizers import load_tokenizer

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim")
LAST = (
    "{% for m in messages %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ c.strip() }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "What is  this? "},
    {"role": "assistant", "content": "<think>hm</think> a  parrot, é 🙂 "},
]


def folder_of(path, **config):
    path.mkdir(exist_ok=True)
    library = made.byte_level_bpe(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "</think>"))
    library.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"} | config
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("template", [CHATML, TRIMMED, LAST], ids=["chatml", "trimmed", "last"])
@pytest.mark.parametrize("messages", [TALK, TALK[:1]], ids=["answer", "question"])
def test_conversations(tmp_path, template, messages):
    folder = folder_of(tmp_path / "a", chat_template=template)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    # Without control tokens in the messages, which transformers reads as such and we as plain text.
    plain = [m | {"content": m["content"].replace("</think>", "")} for m in messages]
    for asked in ({"add_generation_prompt": True}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        want = theirs.apply_chat_template(plain, return_dict=False, **asked)
        assert ours.apply_chat_template(plain, **asked) == want, asked
        text = theirs.apply_chat_template(plain, tokenize=False, **asked)
        assert ours.apply_chat_template(plain, tokenize=False, **asked) == text
    if template == LAST:  # the thought goes, though its end is a control token
        want = theirs.apply_chat_template(messages, return_dict=False)
        assert ours.apply_chat_template(messages, False) == want


def test_named_templates(tmp_path):
    folder = folder_of(tmp_path / "a")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag {{ messages[0].content }}")
    (folder / "chat_template.jinja").write_text(CHATML)
    load_tokenizer(folder).save(tmp_path / "b")
    for path in (folder, tmp_path / "b"):  # and what we save, transformers reads
        ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
        assert ours.apply_chat_template(TALK, template="rag") == theirs.apply_chat_template(
            TALK, chat_template="rag", return_dict=False
        )
        assert ours.apply_chat_template(TALK[:1], False) == theirs.apply_chat_template(TALK[:1], return_dict=False)


@pytest.mark.parametrize(
    "flags",
    [
        {}, {"add_prefix_space": True}, {"add_bos_token": True, "bos_token": "<|endoftext|>"},
        {"add_prefix_space": True, "add_bos_token": True, "bos_token": "<|endoftext|>"},
        {"add_bos_token": True}, {"add_bos_token": True, "bos_token": None},
    ],
)  # fmt: skip
def test_flags_of_vocab_and_merges(tmp_path, flags):
    made.byte_level_bpe().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"} | flags))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello", " Hello", "def f():\n    return 1", "🙂 é"):
        assert ours.prompt(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("flag", [{}, {"add_prefix_space": False}, {"add_prefix_space": True}])
@pytest.mark.parametrize("named", [None, "GPT2Tokenizer", "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("model_type", [None, "gpt2", "opt", "gpt_neox", "qwen2", "llama", "falcon"])
@pytest.mark.parametrize("in_file", [False, True])
def test_the_space_in_front_beside_tokenizer_json(tmp_path, flag, named, model_type, in_file):
    library = made.byte_level_bpe()
    library.pre_tokenizer = made.hf.pre_tokenizers.ByteLevel(add_prefix_space=in_file)
    library.save(str(tmp_path / "tokenizer.json"))
    config = flag | ({} if named is None else {"tokenizer_class": named})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello", " Hello", "def parrot"):  # Qwen2Tokenizer cuts lines and numbers by its own rule
        assert ours.prompt(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("named", ["<pad>", "<|endoftext|>"])
def test_a_pad_without_an_id_changes_no_text(tmp_path, named):
    folder = folder_of(tmp_path / "a", pad_token=named)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.encode("a parrot") == theirs("a parrot")["input_ids"]
    assert ours.pad == (None if named == "<pad>" else theirs.pad_token_id)
