"""Runs that go on from another folder, with other steps, or after an evaluation that failed."""

import re
import shutil

import numpy as np
import pytest
import training

from garrulax.cli import main
from garrulax.train import loop, metrics, settings
from garrulax.train.continuing import continued
from garrulax.train.data_identity import data_differences
from garrulax.train.optimizers import schedule_of

pytestmark = pytest.mark.usefixtures("quick_compilation", "shared_steps")
TINY = ["model.width=16", "model.layers=1", "model.heads=2", "window=16", "batch=2", "tokenizer=bytes"]


def garrulax(capsys, *words):
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err


def test_a_run_goes_on_from_another_folder_without_its_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    text = tmp_path / "a" / "notes, 2024 [1].txt"
    text.write_text("some text to learn\n" * 200)
    code, _ = garrulax(capsys, "train", "gpt2-tiny", f"corpus={text.name}", *TINY, "steps=2", "--run", "my run")
    assert code == 0
    run = tmp_path / "a" / "my run"
    assert settings.read_run_file(run)[0].corpus == (str(text),)

    monkeypatch.chdir("/")
    moved = text.rename(tmp_path / "moved.txt")
    code, said = garrulax(capsys, "train", "--resume", run, "steps=4")
    assert code == 0, said
    assert "from the cache" in said
    shutil.rmtree(tmp_path / "cache")
    code, said = garrulax(capsys, "train", "--resume", run, "steps=6")
    last = said.strip().splitlines()[-1]
    assert code == 2
    assert f"{run / 'run.json'} says corpus={text}" in last
    assert "corpus=PATH" in last
    assert "GARRULAX_CACHE" in last
    (tmp_path / "other.txt").write_text("other text\n" * 300)
    code, said = garrulax(capsys, "train", "--resume", run, f"corpus={tmp_path / 'other.txt'}", "steps=6")
    assert code == 2
    assert "the text has changed" in said
    code, said = garrulax(capsys, "train", "--resume", run, f"corpus={moved}", "steps=6")
    assert code == 0, said
    assert settings.read_run_file(run)[0].corpus == (str(moved),)
    code, said = garrulax(capsys, "train", "--resume", run, "model.layers=3")
    assert code == 2
    assert "model.layers: " in said
    assert "goes on with the model that it began with" in said
    code, said = garrulax(capsys, "train", "--resume", run, f"corpus={moved}:1,{moved}:1")
    assert code == 2
    assert re.search(r"sha256 (\w{12}),\1, the run began with \1\.", said), "one more text, not another one"
    code, said = garrulax(capsys, "train", "--resume", run, "dedup=exact", "steps=6")
    assert code == 0, said
    assert "from the cache" not in said, "what is left out may be another text: it is read"


def test_a_text_to_evaluate_on_that_has_changed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text, more = tmp_path / "a.txt", tmp_path / "more.txt"
    text.write_text("some text to learn\n" * 200)
    more.write_text("some text to evaluate on\n" * 9)
    words = ["corpus=a.txt", "eval_texts=more=more.txt,a=a.txt", *TINY, "steps=1", "--run", "run"]
    assert garrulax(capsys, "train", "gpt2-tiny", *words)[0] == 0
    more.write_text("another text to evaluate\n" * 9)
    code, said = garrulax(capsys, "train", "--resume", "run", "steps=2")
    assert code == 2
    assert re.search(r"eval_texts=more=\S+/more.txt has changed: sha256 \w{12}, the run began with \w{12}\.", said)
    assert "--new-data goes on with the new one under this name" in said
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed early
    assert garrulax(capsys, "train", "--resume", "run")[0] == 2
    code, said = garrulax(capsys, "train", "--resume", "run", "eval_texts=other=more.txt,a=a.txt")
    assert code == 0, said
    losses = [name for r in metrics.read_metrics("run") for name in r if name.startswith("valid_loss/")]
    assert losses == ["valid_loss/other", "valid_loss/a"]


def test_which_changes_of_the_data_forbid_to_go_on():
    began = {"corpus": "1", "tokenizer": "2", "eval_texts.a": "3"}
    for now, found in (
        ({"corpus": "1", "tokenizer": "2"}, []),
        ({**began, "eval_texts.b": "5"}, []),
        ({**began, "eval_texts.a": "4"}, ["data.eval_texts.a is '4', was '3'"]),
        ({**began, "corpus": "6"}, ["data.corpus is '6', was '1'"]),
        ({**began, "reference": "7"}, ["data.reference is '7', was None"]),
        ({**began, "corpus": "6", **{f"instead_of.{name}": value for name, value in began.items()}}, []),
        (
            {**began, "corpus": "6", "instead_of.corpus": "8", "instead_of.tokenizer": "2"},
            ["data.corpus is '6', was '1'"],
        ),
    ):
        assert data_differences(now, began) == found


def test_stdlib_of_another_python_is_named(tmp_path, monkeypatch):
    from garrulax import hub, models
    from garrulax.cli import starting
    from garrulax.train.corpus import Corpus

    (tmp_path / "x.txt").write_text("text\n" * 50)
    begun = starting.Start(
        settings.Settings(), tmp_path, hub.Model(models.preset("gpt2-tiny"), {}), recorded={"corpus": "f" * 64}
    )
    with pytest.raises(ValueError, match=r"corpus=stdlib, but stdlib is the source of the running Python"):
        starting.check_corpus(begun, Corpus(tmp_path / "x.txt"))


@pytest.mark.slow
def test_the_rate_does_not_jump_when_a_run_gets_more_steps(tmp_path):
    short = ["steps=4", "eval_every=9", "warmup=1"]
    training.train(tmp_path / "run", short)
    _, said = training.train(tmp_path / "run", [*short, "steps=8"], resume=True)
    rates = [r["lr"] for r in metrics.read_metrics(tmp_path / "run") if "lr" in r]
    assert "learning rate: 0.00" in said
    assert "tail_step=0" in said
    done = settings.read_run_file(tmp_path / "run")[0]
    assert (done.tail_step, done.tail_ratio) == (4, pytest.approx(0.1))
    assert rates[-1] == pytest.approx(0.002)
    # a run that was killed after this goes on alike, without another word
    _, said = training.train(tmp_path / "run", [*short, "steps=8", "tail_step=4", f"tail_ratio={done.tail_ratio}"],
                             resume=True)  # fmt: skip
    assert "learning rate" not in said


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("step", [3, 60, 190, 200])
@pytest.mark.parametrize("steps", [230, 400])
def test_the_rate_is_continuous_and_falls_to_its_end(kind, step, steps):
    old = settings.Settings(schedule=kind, steps=200, warmup=0.05, optimizer="adamw")
    new = settings.Settings(schedule=kind, steps=steps, warmup=0.05, optimizer="adamw")
    now, _ = continued(new, settings.run_identity(old, training.make("x").config, {})["settings"], step)
    before, after = schedule_of(old, old.lr), schedule_of(now, now.lr)
    assert float(after(step)) == pytest.approx(float(before(step)), rel=1e-5)
    rates = np.array([float(after(i)) for i in range(step, steps)])
    assert np.abs(np.diff(rates)).max() < 0.12 * old.lr
    if kind != "constant":
        assert rates[-1] <= 0.2 * old.lr
    if step >= 10:
        assert (np.diff(rates) <= 1e-9).all()


def test_a_rate_that_is_asked_for_jumps_with_a_word():
    old = settings.run_identity(settings.Settings(steps=200), training.make("x").config, {})["settings"]
    same, said = continued(settings.Settings(steps=200), old, 100)
    assert (same, said) == (settings.Settings(steps=200), None)
    for changes in ({"lr": 0.5}, {"steps": 400, "tail_step": 0}):
        now, said = continued(settings.Settings(**{"steps": 200, **changes}), old, 150)
        assert now.tail_step in (None, 0)
        assert said.startswith("learning rate: 0.00")
        assert "in step 150" in said


@pytest.mark.parametrize("family", [training.GPT, training.GLM])
def test_a_short_held_out_text_is_evaluated_and_one_too_short_refused_before_step_1(tmp_path, family):
    class Short(training.Text):
        def __init__(self, size):
            super().__init__("The jay laughs. A thrush sings, and the babbler answers. " * 9)
            self.valid = type(self.valid)([np.arange(size, dtype=np.int32) + 70], size, np.array([0, size]))

    s, config = settings.read_settings(None, [*family, *training.SHORT])
    for size in (2, 9, 20):
        if size < 9 and family is training.GLM:
            continue
        data = training.batches.make_data(Short(size), s, config, training.ByteTokenizer(training.GLM_SPECIALS))
        training.batches.check_held_out(data)
        assert all(batch["tokens"].shape == (8, 32) for batch in data.held_out())
    with pytest.raises(ValueError, match=r"the held-out text has 1 tokens \(1 bytes\), too few to evaluate on.*valid="):
        training.batches.make_data(Short(1), s, config, training.ByteTokenizer(training.GLM_SPECIALS))


@pytest.mark.slow
def test_no_evaluation_costs_a_run(tmp_path):
    run = training.make(tmp_path / "run", ["checkpoint_every=100", "eval_every=2"])
    passes = []

    def held_out():
        passes.append(1)
        if len(passes) == 3:  # the first is the check before step 1
            raise MemoryError("no memory to evaluate")
        return run.data.held_out()

    from dataclasses import replace

    with pytest.raises(MemoryError):
        loop.train(replace(run, data=replace(run.data, held_out=held_out)))
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
    result, said = training.train(tmp_path / "run", ["checkpoint_every=100", "eval_every=2"], resume=True)
    assert "at step 4" in said
    straight, _ = training.train(tmp_path / "straight", ["checkpoint_every=100", "eval_every=2"])
    assert result.evaluation == straight.evaluation
    assert result.best == straight.best == 6
    evaluated = [(r["step"], r["valid_loss"]) for r in metrics.read_metrics(tmp_path / "run") if "valid_loss" in r]
    assert evaluated == [
        (r["step"], r["valid_loss"]) for r in metrics.read_metrics(tmp_path / "straight") if "valid_loss" in r
    ]


@pytest.mark.slow
def test_a_mixture_goes_on_and_takes_another_text_only_if_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text to learn\n" * 200)
    lines = [f'{{"prompt": "{i} and one is ", "completion": "{i + 1}"}}\n' for i in range(300)]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    words = ["corpus=a.txt:0.75,b.jsonl:0.25", "packing=first_fit", "dedup=none", *TINY]
    code, said = garrulax(capsys, "train", "gpt2-tiny", *words, "batch=4", "steps=2", "--run", "run")
    assert code == 0, said
    assert "mixture: 25.0% of the rows from" in said
    monkeypatch.chdir("/")
    run = tmp_path / "run"
    code, said = garrulax(capsys, "train", "--resume", run, "steps=3")
    assert code == 0, said
    assert "from the cache" in said
    changed = f"corpus={tmp_path}/a.txt:0.5,{tmp_path}/b.jsonl:0.5"
    code, said = garrulax(capsys, "train", "--resume", run, changed, "steps=4")
    assert code == 2
    assert "data.mixture is '0.5,0.5', was '0.75,0.25'" in said
    (tmp_path / "a.txt").write_text("other text to learn\n" * 200)
    code, said = garrulax(capsys, "train", "--resume", run, changed, "steps=4")
    assert code == 2
    assert "--new-data goes on with the new one" in said
    code, said = garrulax(capsys, "train", "--resume", run, changed, "steps=4", "--new-data")
    assert code == 0, said
    code, said = garrulax(capsys, "train", "--resume", run, "steps=5")
    assert code == 0, said
    code, said = garrulax(capsys, "train", "gpt2-tiny", *words, "--run", "other", "--new-data")
    assert code == 2
    assert "--new-data is for a run that is resumed" in said
