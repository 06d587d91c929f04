import dataclasses
import json
import pathlib

import pytest

from garrulax import models
from garrulax.train import settings
from garrulax.train.settings import Settings


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'preset = "llama3-8b"\nlr = 1\ncorpus = ["a", "b"]\n[model]\nlayers = 3\n[model.rope]\ntheta = 7.0\n'
    )
    s, config = settings.read_settings(
        file, ["lr=2e-3", "dropout=true", "valid=x,y", "model.rope.kind=linear", "model.rope.factor=2"]
    )
    assert (s.lr, s.dropout, s.corpus, s.valid) == (2e-3, True, ("a", "b"), ("x", "y"))
    assert (config.layers, config.rope.theta, config.rope.kind, config.rope.factor) == (3, 7.0, "linear", 2.0)
    assert config.width == models.preset("llama3-8b").width
    assert isinstance(settings.read_settings(file)[0].lr, float)


def test_rates_follow_the_optimizer():
    assert (Settings().lr, Settings().adam_lr, Settings().weight_decay) == (0.02, 4e-3, 0.0)
    assert (Settings(optimizer="adamw").lr, Settings(optimizer="adamw").weight_decay) == (1e-3, 0.1)
    assert Settings(lr=0.5).lr == 0.5


def test_none_and_optional_numbers():
    assert settings.read_settings(None, ["model.eos=none"])[1].eos is None
    assert settings.read_settings(None, ["model.mlp_width=99"])[1].mlp_width == 99
    assert settings.read_settings(None, ["preset=llama3-8b", "model.eos=5"])[1].eos == 5
    assert settings.read_settings(None, ["preset=llama3-8b", "model.eos=5,6"])[1].eos == (5, 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stesp=3"], "unknown setting 'stesp': did you mean 'steps'?"),
        (["model.layer=3"], "unknown setting 'model.layer': did you mean 'model.layers'?"),
        (["model.rope.theta=3"], "unknown setting 'model.rope'"),
        (["preset=gtp2"], "unknown preset 'gtp2'; did you mean 'gpt2'?"),
        (["steps=many"], "steps='many' is not a whole number"),
        (["steps=1.5"], "steps='1.5' is not a whole number"),
        (["lr=fast"], "lr='fast' is not a number"),
        (["dropout=yes"], "dropout='yes' is not true or false"),
        (["steps"], "'steps' is not like key=value"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["lr=-1"], "lr=-1.0 must not be negative"),
        (["optimizer=sgd"], "optimizer='sgd': choose from muon, adamw"),
        (["precision=fp8"], "precision='fp8': choose from float32, bfloat16"),
        (["batch=10", "accumulation=4"], "batch=10 cannot be cut into accumulation=4"),
        (["model=big"], "model='big' is not a table"),
        (["model.layers=0"], "layers=0 must be a whole number"),
        (["lr.x=3"], "setting 'lr' has no parts"),
    ],
)
def test_what_is_refused(overrides, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        settings.read_settings(None, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 1.5", "steps=1.5 is not a whole number"),
        ("steps = true", "steps=True is not a whole number"),
        ("dropout = 1", "dropout=1 is not true or false"),
        ("preset = 3", "preset=3 is not text"),
        ("corpus = 3", "corpus=3 is not a list"),
        ("steps = ", "is not valid TOML"),
        ("[model]\nlayes = 3", "did you mean 'model.layers'"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        settings.read_settings(file)
    assert message in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no settings file"):
        settings.read_settings(tmp_path / "none.toml")
    with pytest.raises(FileNotFoundError, match="not the folder of a run"):
        settings.read_run_file(tmp_path)


def test_a_run_is_read_back_from_its_folder(tmp_path):
    s, config = settings.read_settings(
        None, ["preset=llama-7b", "model.rope.kind=linear", "model.rope.factor=3", "corpus=a,b"]
    )
    config = dataclasses.replace(config, vocab=77)
    settings.write_run_file(tmp_path, s, config, {"corpus": "abc"})
    assert settings.read_run_file(tmp_path) == (s, config)
    assert settings.read_run_file(tmp_path, ["steps=9"])[0] == dataclasses.replace(s, steps=9)
    assert json.loads((tmp_path / "run.json").read_text())["data"] == {"corpus": "abc"}


def test_differences_name_what_matters():
    s, config = settings.read_settings(None, [])
    ours = settings.run_identity(s, config, {"tokenizer": "x"})
    assert (
        settings.differences(
            ours, settings.run_identity(dataclasses.replace(s, steps=9, lr=1.0), config, {"tokenizer": "x"})
        )
        == []
    )
    other = settings.run_identity(
        dataclasses.replace(s, seed=5), dataclasses.replace(config, layers=3), {"tokenizer": "y"}
    )
    assert settings.differences(ours, other) == [
        "config.layers is 12, was 3",
        "data.tokenizer is 'x', was 'y'",
        "settings.seed is 0, was 5",
    ]


def test_every_setting_is_documented_and_read():
    import garrulax.train

    source = "".join(p.read_text() for p in pathlib.Path(garrulax.train.__file__).parent.glob("*.py"))
    for field in dataclasses.fields(Settings):
        assert field.name in Settings.__doc__, field.name
        # The command line finds the data and writes the samples.
        if field.name not in ("corpus", "valid", "tokenizer", "vocab", "sample_prompts", "sample_tokens"):
            assert f".{field.name}" in source, field.name


def test_commands_of_the_pages_about_training():
    pages = [pathlib.Path(__file__).parents[1] / "docs" / name for name in ("optimizers.md", "reports.md")]
    lines = [line.split("#")[0] for page in pages for line in page.read_text().splitlines()]
    commands = [line.split()[2:] for line in lines if line.startswith("garrulax train ")]
    for preset, *words in commands:
        assert settings.read_settings(None, [f"preset={preset}", *words])[0].preset == preset
    assert len(commands) >= 7
