"""The command line: what it prints, what it refuses, and with which exit code."""

import dataclasses
import json
import subprocess
import sys

import jax
import pytest
import tiny
from tiny import byte_model

import garrulax as gx
from garrulax import sampling
from garrulax.cli import costs, main
from garrulax.sampling.state import prefill
from garrulax.train.settings import Settings, read_settings

pytestmark = pytest.mark.usefixtures("quick_compilation")
TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * 7 % 13}\n\n" for i in range(300))
TINY = ["model.width=32", "model.layers=1", "model.heads=4", "window=24", "batch=4", "steps=3", "tokenizer=bytes"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "code.py").write_text(TEXT)
    return tmp_path


def refused(capsys, code, *words):
    assert main([str(word) for word in words]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in lines[-1]
    return lines[-1]


def test_train_generate_info(folder, capsys):
    run = folder / "run"
    assert (
        main(["train", "llama-tiny", "model.kv_heads=2", *TINY, f"corpus={folder / 'code.py'}", "--run", str(run)]) == 0
    )
    said = capsys.readouterr().err
    assert "corpus sha256" in said
    assert "xz -9 needs" in said
    assert json.loads((run / "model" / "config.json").read_text())["model_type"] == "llama"

    words = ["generate", str(run), "def f", "--max-new-tokens", "5", "--seed", "3"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f")
    assert main(words) == 0
    assert capsys.readouterr().out == first

    assert main(["info", str(run)]) == 0
    assert "llama family" in capsys.readouterr().out
    assert "holds a run" in refused(
        capsys, 2, "train", "llama-tiny", *TINY, f"corpus={folder / 'code.py'}", "--run", run
    )
    assert "window=48 is longer" in refused(
        capsys, 2, "train", "llama-tiny", *TINY, "window=48", "model.context=32", f"corpus={folder / 'code.py'}",
        "--run", folder / "other",
    )  # fmt: skip
    assert "is of another run" in refused(capsys, 2, "train", "--resume", run, "batch=8")
    assert "GLM" in refused(capsys, 2, "fill", run, "a [MASK]")


@pytest.mark.slow
def test_train_and_fill_a_glm(folder, capsys):
    run = folder / "run"
    assert main(["train", "glm-tiny", *TINY, "window=48", f"corpus={folder / 'code.py'}", "--run", str(run)]) == 0
    capsys.readouterr()
    assert main(["fill", str(run), "def [MASK](x):\n    return [MASK]\n", "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("def ")
    assert "(x):\n    return " in out
    assert "[MASK]" not in out


def test_list_explains_every_setting_as_it_is_written(capsys):
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for field in dataclasses.fields(Settings):
        (line,) = [line for line in lines if line.startswith(f"  {field.name}=")]
        assert len(line.split("  ")) > 2, line
        value = line.split()[0]
        if value != f"{field.name}=":
            assert read_settings(None, [value])[0] == Settings()


def test_info_counts_exactly(capsys):
    assert main(["info", "gpt2"]) == 0
    out = capsys.readouterr().out
    assert "124,439,808 parameters" in out
    assert "284.8 MFLOP" in out  # 2 x 123,532,032 + 4 x 12 x 768 x 1024


def test_usage_errors_are_one_line_and_exit_2(folder, capsys):
    code = f"corpus={folder / 'code.py'}"
    assert "did you mean 'gpt2-xl'" in refused(capsys, 2, "info", "gpt2xl")
    assert "did you mean" in refused(capsys, 2, "train", "gpt2-tiny", "stepps=3")
    assert "steps" in refused(capsys, 2, "train", "gpt2-tiny", "steps=many")
    assert "nothing" in refused(capsys, 2, "train", "gpt2-tiny", f"corpus={folder / 'nothing'}")
    (folder / "empty.txt").write_text("")
    assert "empty" in refused(capsys, 2, "train", "gpt2-tiny", f"corpus={folder / 'empty.txt'}")
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 40)
    assert "binary.bin" in refused(capsys, 2, "train", "gpt2-tiny", f"corpus={folder / 'binary.bin'}")
    (folder / "short.txt").write_text("hello\nworld\n" * 3)
    assert "window" in refused(
        capsys, 2, "train", "gpt2-tiny", "tokenizer=bytes", f"corpus={folder / 'short.txt'}", "--run", folder / "r"
    )
    assert "vocab=NUMBER" in refused(capsys, 2, "train", "gpt2-tiny", "vocab=30000", code, "--run", folder / "r")
    line = refused(capsys, 2, "train", "gpt2-tiny", "vocab=400", "model.vocab=300", code, "--run", folder / "r")
    assert "the tokenizer's 400 ids: leave out model.vocab" in line
    assert "vocab=300" in line
    assert "needs 3 devices" in refused(
        capsys, 2, "train", "gpt2-tiny", *TINY, code, "--mesh", "fsdp=3", "--run", folder / "r"
    )
    assert "not like" in refused(
        capsys, 2, "train", "gpt2-tiny", *TINY, code, "--mesh", "fsdp:3", "--run", folder / "r"
    )
    assert "config.json" in refused(capsys, 2, "generate", folder, "hello")


def test_nan_loss_is_a_failure_with_the_step(folder, capsys):
    words = ["train", "gpt2-tiny", *TINY, "optimizer=adamw", "lr=1e30", "clip=0", "warmup=0", "steps=20"]
    line = refused(capsys, 1, *words, f"corpus={folder / 'code.py'}", "--run", folder / "run")
    assert "step" in line
    assert "not finite" in line or "nan" in line or "inf" in line


def test_help_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from garrulax.cli import main\ntry: main(['--help'])\n"
         "finally: print('jax' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "train a model on text" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_chat(tmp_path, capsys):
    model = byte_model("llama", layers=1)
    model = gx.Model(model.config, model.params, model.tokenizer)
    gx.save(model, tmp_path / "m")
    words = ["generate", str(tmp_path / "m"), "hi", "--chat", "--max-new-tokens", "6", "--temperature", "0"]
    assert "no chat format is known for this model" in refused(capsys, 2, *words)
    gx.save(model.replace(tokenizer=None), tmp_path / "n")
    assert "--chat needs the model's tokenizer" in refused(capsys, 2, "generate", tmp_path / "n", "hi", "--chat")

    pytest.importorskip("jinja2")
    (tmp_path / "m" / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    assert main(words) == 0
    answer = gx.generate(model, "<hi>", max_new_tokens=6, temperature=0)
    assert capsys.readouterr().out == f"{answer}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "opt"])
def test_reading_a_prompt_takes_the_memory_that_info_says(name):
    """XLA's plan of memory, however many layers there are, against the row of `garrulax info`."""
    tokens = 4096
    config = dataclasses.replace(tiny.CONFIGS[name], width=256, context=2 * tokens)

    def temporaries(layers):
        deep = dataclasses.replace(config, layers=layers)
        params = jax.eval_shape(lambda: gx.unstack(gx.init(deep, jax.random.key(0))))
        request = sampling.Decoder(deep).request([1] * tokens, max_new_tokens=10)
        program = prefill.lower(params, request, deep, sampling.DEFAULT, 2 * tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporaries(3), temporaries(6)
    assert many < 1.1 * few
    assert 0.4 < many / costs.reading_bytes(config, tokens) < 1.5
