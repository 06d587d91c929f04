"""The commands that the quick start runs and prints, that training prints and that README shows, run as they stand.

Only the number of steps and the size of the models are smaller, and the default corpus is a small text.
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
from tiny import byte_model

import garrulax as gx
from garrulax import models
from garrulax.cli import main

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parent.parent
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n\n" for i in range(400))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder as the working directory, with the repository's examples and a small text in my_folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_folder").mkdir()
    (tmp_path / "my_folder" / "code.py").write_text(TEXT)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(line, capsys):
    """Runs a command of garrulax in this process, a short training instead of a long one. Returns what it printed."""
    words = shlex.split(line, comments=True)
    assert words.pop(0) == "garrulax", line
    if words[0] in ("train", "align") and "--list" not in words:
        small = {"steps": "2"}
        if "--resume" in words:
            small = {"steps": "3"}
        elif words[1] in models.presets():
            small |= {"model.width": "32", "model.heads": "4", "model.layers": "1", "vocab": "320", "batch": "8"}
        else:
            small |= {"window": "16"}
        words = [word for word in words if word.partition("=")[0] not in small]
        words += [f"{key}={value}" for key, value in small.items()]
        if words[0] == "train" and "--resume" not in words and not any(word.startswith("corpus=") for word in words):
            words.append("corpus=my_folder")
    if "--step" in words:
        words[words.index("--step") + 1] = "2"
    code = main(words)
    printed = capsys.readouterr()
    assert code == 0, (words, printed.err)
    return printed.out + printed.err


def next_commands(printed):
    """The commands that a program printed as the next to type."""
    return [line.split("next: ")[-1].strip() for line in printed.splitlines() if re.match(r"(next:)? *garrulax ", line)]


def run_what_is_printed(lines, capsys):
    """Runs commands, and those that they print; of printed ones with the same words and options the first alone."""
    seen = set()
    for line in lines:
        for printed in next_commands(run(line, capsys)):
            _, name, *words = shlex.split(printed)
            kind = name, *(word for word in words if word.startswith("--"))
            if kind not in seen:
                seen.add(kind)
                run(printed, capsys)


def test_quick_start_and_what_it_prints(place, capsys):
    """A program in the place of garrulax notes the commands; then they are run, and those that they print."""
    notes = place / "notes.jsonl"
    program = place / "bin" / "garrulax"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\nopen({str(notes)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    program.chmod(0o755)
    path = os.pathsep.join([str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", str(ROOT / "examples" / "quickstart.sh")], env={**os.environ, "PATH": path}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    commands = [shlex.join(["garrulax", *json.loads(line)]) for line in notes.read_text().splitlines()]
    assert [command.split()[1] for command in commands] == ["train", "generate", "train", "fill", "fill"]
    shown = [
        re.split(r"\s{3,}", line.strip())[0] for line in done.stdout.split("Next commands to try\n")[1].splitlines()
    ]
    (place / "YOUR_FOLDER").symlink_to(place / "my_folder")
    run_what_is_printed([*commands, *(line for line in shown if line.startswith("garrulax"))], capsys)
    assert any(line.startswith("python examples/") for line in shown)


def test_commands_of_readme(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))  # of `garrulax chat`
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands\n\n```\n")[1].split("```")[0]
    chat, llama = byte_model("chatglm", layers=1), byte_model("llama", layers=1)
    for folder, model in (
        ("path/to/chatglm3-6b", chat),
        ("path/to/llama", llama),
        ("path/to/model", byte_model(layers=1)),
        ("SRC", byte_model(layers=1)),
    ):
        gx.save(gx.Model(model.config, model.params, model.tokenizer), place / folder)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for folder in ("path/to/chatglm3-6b", "path/to/llama"):
        settings = place / folder / "tokenizer_config.json"
        settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    glm = byte_model("glm", layers=1)
    gx.save(gx.Model(glm.config, glm.params, glm.tokenizer), place / "runs/glm/model")
    (place / "model.gguf").write_bytes(gguf_files.file_of("gpt2"))
    chats = [{"prompt": f"a{i}", "completion": "b"} for i in range(20)]
    pairs = [{"prompt": f"a{i}", "chosen": "b", "rejected": "c"} for i in range(20)]
    for name, records in (("chats.jsonl", chats), ("pairs.jsonl", pairs)):
        (place / name).write_text("\n".join(map(json.dumps, records)))
    run_what_is_printed(block.splitlines(), capsys)
    assert (place / "glitch.png").exists()
    assert (place / "DST" / "model.safetensors").exists()
