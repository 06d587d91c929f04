"""`garrulax chat`, driven by a script and by a user at a terminal that is not there."""

import builtins
import io
import runpy
import signal
import sys
from pathlib import Path

import pytest
from tiny import byte_model

import garrulax as gx
from garrulax.cli import chat, conversation, main
from garrulax.sampling import Session

pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("quick_compilation")
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}a:"
WORDS = ("--max-new-tokens", "6", "--seed", "3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, path = byte_model("llama", context=64, layers=1, eos=None), tmp_path_factory.mktemp("model")
    gx.save(gx.Model(made.config, made.params, made.tokenizer), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


@pytest.fixture(scope="module")
def model(folder):
    return gx.load(folder)


def expected(model, said, seed):
    """The answer to a conversation, [(role, text), ...]."""
    text = "".join(f"{role}:{content}|" for role, content in said) + "a:"
    ids = model.tokenizer.encode(text)
    return gx.generate(model, ids, max_new_tokens=6, temperature=0.8, top_p=0.95, seed=seed).text.strip()


def scripted(monkeypatch, folder, lines, *words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", folder, *WORDS, *words])


def test_a_script(model, folder, capsys, monkeypatch):
    lines = "/help\nhi\n\n more\n/system Be.\nhi\n/seed 9\nhi\n/reset\nhi\n/exit\nnever\n"
    assert scripted(monkeypatch, folder, lines) == 0
    one = expected(model, [("u", "hi")], 3)
    two = expected(model, [("u", "hi"), ("a", one), ("u", "more")], 4)
    three = expected(model, [("s", "Be."), ("u", "hi")], 3)
    four = expected(model, [("s", "Be."), ("u", "hi"), ("a", three), ("u", "hi")], 9)
    five = expected(model, [("s", "Be."), ("u", "hi")], 9)
    assert len({one, two, three, four, five}) == 5
    assert all([one, two, three, four, five]), "a turn without an answer tests little"
    printed = capsys.readouterr()
    assert printed.out.split() == " ".join([one, two, three, four, five]).split()
    assert printed.err == f"{chat.HELP}\n"


def test_errors_are_one_line(folder, capsys, monkeypatch, tmp_path):
    def refused(lines, *words, folder=folder):
        assert scripted(monkeypatch, folder, lines, *words) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        return printed.err

    assert "unknown command /nonsense: /help" in refused("/nonsense\n")
    assert "/seed takes a whole number, not 'x'" in refused("/seed x\n")
    assert "the seed must be a whole number from 0 to 2**32 - 1, not -1" in refused("hi\n", "--seed", "-1")
    assert "the message is too long" in refused("a" * 80 + "\n")
    assert "--max-new-tokens 0 must be at least 1" in refused("hi\n", "--max-new-tokens", "0")
    made = byte_model("llama", context=64, layers=1, eos=None)
    gx.save(gx.Model(made.config, made.params, made.tokenizer), tmp_path / "plain")
    said = refused("hi\n", folder=str(tmp_path / "plain"))
    assert "plain has no chat format" in said
    assert "garrulax generate" in said


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def typed(folder, monkeypatch, capsys):
    """Runs a chat in which a user types lines, and stops the answers that have so many pieces; Ctrl-D at the end."""

    def run(lines, stop_at=99):
        asked, pieces, prompts = iter(lines), 0, []

        def fake_input(prompt):
            nonlocal pieces
            pieces = 0
            line = next(asked, None)
            if line is None:
                raise EOFError
            if line is KeyboardInterrupt:
                raise line
            return line

        def fake_print(*words, **options):
            nonlocal pieces
            builtins.print(*words, **options)
            pieces += options.get("end") == ""
            if pieces == stop_at:
                pieces = -99
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # does nothing: the answer ends already
                raise KeyboardInterrupt

        stream = Session.stream
        monkeypatch.setattr(Session, "stream", lambda self, ids, **k: prompts.append(ids) or stream(self, ids, **k))
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(builtins, "input", fake_input)
        monkeypatch.setattr(chat, "print", fake_print, raising=False)
        for name in ("compile_ahead", "compile_for_later"):  # the test needs few programs, and one after the other
            monkeypatch.setattr(conversation.Conversation, name, lambda self, question=None: None)
        before = signal.getsignal(signal.SIGINT)
        assert main(["chat", folder, *WORDS]) == 0
        assert signal.getsignal(signal.SIGINT) is before
        return prompts, capsys.readouterr()

    return run


def test_ctrl_c_stops_the_answer_and_keeps_it(model, typed):
    whole = expected(model, [("u", "hi")], 3)
    prompts, printed = typed(["hi", "more", "/nonsense", "/help"], stop_at=3)
    assert printed.out.count(" ... (stopped)\n") == 2
    second = bytes(prompts[1]).decode()
    partial = second.removeprefix("u:hi|a:").removesuffix("|u:more|a:")
    assert partial
    assert whole.startswith(partial)
    assert len(partial) < len(whole)
    assert "(unknown command /nonsense: /help lists the commands)" in printed.err
    assert "/system TEXT" in printed.out


def test_a_long_conversation_forgets_its_beginning(typed):
    prompts, printed = typed(["first question", "second question", "third question", KeyboardInterrupt])
    texts = [bytes(ids).decode(errors="replace") for ids in prompts]
    assert texts[1].startswith("u:first question|a:")
    assert texts[2].startswith("u:second question|a:")
    assert "its first question and answer are forgotten" in printed.err
    assert "the answer is cut off here" in printed.err


def test_the_demo_is_a_chat(monkeypatch, capsys):
    called = []
    monkeypatch.setattr("garrulax.cli.main", lambda words: called.append((words, sys.stdin.read())) or 0)
    monkeypatch.setattr(sys, "argv", ["demo.py", "some/model"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parent.parent / "examples" / "demo.py"), run_name="__main__")
    assert end.value.code == 0
    ((words, question),) = called
    assert words[:2] == ["chat", "some/model"]
    assert question == "What is the capital of France?\n"
    assert question.strip() in capsys.readouterr().out


@pytest.mark.slow
def test_a_cache_in_the_memory_of_the_host(folder, capsys):
    words = ["generate", folder, "ab" * 40, "--cache", "blocks=4,2,2,8,2", "--max-new-tokens", "20"]
    texts = []
    for more in ([], ["--offload"], ["--offload", "--kv", "int8"]):
        assert main([*words, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["generate", folder, "ab", "--offload"]) == 2
    assert "--offload keeps blocks in the host's memory: it goes with --cache blocks" in capsys.readouterr().err


def test_a_conversation_without_an_end(model, folder, capsys, monkeypatch):
    lines = "".join(f"question {i}\n" for i in range(12))
    assert scripted(monkeypatch, folder, lines, "--stream", "--temperature", "0") == 0
    printed = capsys.readouterr()
    ids, answers, kind = [], [], gx.sinks(4, 60)
    for i in range(12):
        ids += model.tokenizer.encode(f"u:question {i}|a:")
        done = gx.generate(model, ids, max_new_tokens=6, temperature=0, cache=kind)
        answers.append(done.text)
        written = done.tokens[:-1] if done.finish_reason == "eos" else done.tokens
        ids += [*written, *model.tokenizer.encode("|")]  # the format ends an answer itself
    assert printed.out.split() == " ".join(answers).split()
    assert printed.err == ""
    assert len(ids) > 2 * model.config.context
    assert scripted(monkeypatch, folder, "hi\n", "--stream", "--cache", "window=8") == 2
    assert "--stream keeps 4 first tokens and a window: leave it or --cache window=8 out" in capsys.readouterr().err
    for words in ("ring", "sinks=4", "window=x", "blocks=1,2,3,4,5,6"):
        assert scripted(monkeypatch, folder, "hi\n", "--cache", words) == 2
        assert f"--cache {words}: it must be one of full, window=N" in capsys.readouterr().err
    assert main(["generate", folder, "ab", "--cache", "sinks=2,20", "--kv", "int8", "--max-new-tokens", "100"]) == 0
