"""`garrulax align`: from files to models, resuming after kill -9, errors before anything is trained."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny import byte_model

import garrulax as gx
from garrulax.align import answers, labelled
from garrulax.align.comparisons import NO_ANSWER
from garrulax.align.reward_files import load_reward_model, save_reward_model
from garrulax.cli import align, main, starting
from garrulax.cli.align_job import Job
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.models import reward

PAIRS = [{"prompt": f"is {i}", "chosen": " yes", "rejected": f" no {i}"} for i in range(40)]
FEW = ["batch=4", "window=24", "steps=4", "eval_every=4", "checkpoint_every=2", "lr=0.003", "log_every=1", "warmup=0"]
END = 256


def written(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def metrics_of(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(autouse=True)
def quick(quick_compilation):
    pass


FORM = answers.AnswerFormat(ByteTokenizer(["<|endoftext|>"]), (END,))


@pytest.fixture
def model(tmp_path):
    made = byte_model("gpt", eos=END, context=64, layers=1)
    gx.save(gx.Model(made.config, made.params, made.tokenizer), tmp_path / "base")
    return str(tmp_path / "base")


def test_pairs_and_rankings_of_a_file():
    record = {"prompt": "q", "answers": ["a", "bb", "bb", "c"], "ranks": [0, 1, 1, 2]}
    found = answers.ranking(record, FORM, "here")
    assert [one.tokens for one in found.answers[:2]] == [[113, 97, END], [113, 98, 98, END]]
    assert found.answers[1].mask == [False, True, True, True]
    assert len(list(found.pairs())) == 5, "the two equal ones tie"
    arrays, left_out = answers.pair_arrays([found], 8)
    assert arrays["tokens"].shape == (5, 2, 8)
    assert arrays["weights"][0].sum(axis=1).tolist() == [2, 3]
    assert not left_out["too long"]
    ranked, _ = answers.ranking_arrays([found, answers.ranking(PAIRS[0], FORM, "there")], 16)
    assert ranked["rank"].tolist() == [[0, 1, 1, 2], [0, 1, NO_ANSWER, NO_ANSWER]]
    assert ranked["length"].tolist() == [[3, 4, 4, 3], [9, 10, 0, 0]]
    same = answers.ranking({"prompt": "q", "chosen": "a", "rejected": "a"}, FORM, "here")
    for rankings, window, message in (([same], 8, "all of them tie"), ([found], 1, "no pair fits into window=1")):
        with pytest.raises(ValueError, match=message):
            answers.pair_arrays(rankings, window)
    with pytest.raises(ValueError, match="no ranking fits into window=3"):
        answers.ranking_arrays([found], 3)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "has no prompt"),
        ({"prompt": "a", "text": "b"}, "give chosen and rejected"),
        ({"prompt": "a", "answers": ["b"]}, "has 1 answers"),
        ({"prompt": "a", "answers": ["b", "c"], "ranks": [1]}, "not whole numbers, one an answer"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "an answer is a text"),
        ({"prompt": [{"role": "system", "content": "a"}] * 2, "chosen": "b", "rejected": "c"}, "has no chat format"),
    ],
)  # fmt: skip
def test_bad_answers(record, message):
    with pytest.raises(ValueError, match=message):
        answers.ranking(record, FORM, "here")


def test_a_reward_model_on_disk(tmp_path):
    made = byte_model("llama", layers=1)
    params = reward.add_reward_head(made.params, made.config, jax.random.key(1))
    save_reward_model(gx.Model(made.config, params, made.tokenizer), tmp_path / "reward")
    found = load_reward_model(tmp_path / "reward")
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(found.params), strict=True):
        np.testing.assert_array_equal(a, b)
    (tmp_path / "reward/reward_head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="is no reward model"):
        load_reward_model(tmp_path / "reward")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "trpo"], "--method trpo: choose from sft, reward, dpo"),
        (["--method", "dpo"], "--data FILE is needed"),
        (["--method", "ppo", "--data", "DATA"], "--method ppo needs --reward"),
        (["--method", "ppo", "--data", "DATA", "--reward", "nowhere"], "give MODULE:FUNCTION"),
        (["--method", "ppo", "--data", "DATA", "--reward", "json:nothing"], "has no attribute 'nothing'"),
        (["--method", "rloo", "--data", "DATA", "--reward", "json:dumps", "--option", "speed=3"], "--option speed: "),
        (["--method", "dpo", "--data", "DATA", "--option", "beta"], "--option beta is not like beta=0.1"),
        (["--method", "sft", "--data", "DATA"], "has the keys prompt, chosen, rejected"),
        (["--method", "dpo", "--data", "DATA", "window=65"], "window=65 is longer than model.context=64"),
        (["--method", "kto", "--data", "PRAISE"], "no undesirable answers to train on"),
    ],
)
def test_bad_commands(words, message, model, tmp_path, capsys):
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    praise = written(
        tmp_path / "praise.jsonl", [{"prompt": f"q{i}", "completion": "a", "label": True} for i in range(9)]
    )
    words = [{"DATA": data, "PRAISE": praise}.get(word, word) for word in words]
    assert main(["align", model, *FEW, *words, "--run", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dpo_from_a_file(model, tmp_path, capsys):
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    words = ["align", model, "--method", "dpo", "--data", data, *FEW, "--option", "beta=0.2", "--run"]
    assert main([*words, str(tmp_path / "run")]) == 0
    assert "pairs: 38 to train on, 2 held out" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] < np.log(2)
    assert any("accuracy" in line and "margin" in line for line in lines)
    assert gx.load(tmp_path / "run" / "model").config == gx.load(model).config


@pytest.mark.slow
def test_the_whole_way_and_kill_9(model, tmp_path):
    """Reward model, then PPO against it; a run that is killed ends with the bits of one that is not."""
    (tmp_path / "rules.py").write_text("def vowels(sample):\n    return sum(c in 'aeiou' for c in sample.text) / 4\n")
    pairs, prompts = (written(tmp_path / f"{name}.jsonl", records) for name, records in (
        ("pairs", PAIRS), ("prompts", [{"prompt": p["prompt"]} for p in PAIRS])))  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def started(*words):
        command = [sys.executable, "-c", "import sys; from garrulax.cli import main; sys.exit(main())", *words]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    def done(*words):
        process = started(*words)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        return errors

    done("align", model, "--method", "reward", "--data", pairs, *FEW, "--run", "reward")
    options = ["limit=6", "group=1", "epochs=2", "beta=0.05", "target_kl=1"]
    policy = ["align", model, "--method", "ppo", "--data", prompts, "--reward", "reward", "batch=8", "steps=60",
              "checkpoint_every=4", "eval_every=60", "lr=0.001", *(f"--option={o}" for o in options)]  # fmt: skip
    done(*policy, "--run", "whole")
    process = started(*policy, "--run", "killed")
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed/checkpoints/8").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/model").exists()
    assert "resumed" in done("train", "--resume", "killed")
    whole, killed = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    errors = done("align", model, "--method", "rloo", "--data", prompts, "--reward", "rules:vowels", *FEW,
                  "--option", "limit=6", "--option", "group=4", "--run", "rloo")  # fmt: skip
    assert "held-out reward" in errors


@pytest.mark.parametrize(("method", "family"), [("kto", "gpt"), ("kto", "glm"), ("dpo", "glm")])
def test_judged_answers_of_models_that_continue_and_that_fill_blanks(method, family, tmp_path, capsys):
    made = byte_model(family, context=64, layers=1, **({"eos": END} if family == "gpt" else {}))
    gx.save(gx.Model(made.config, made.params, made.tokenizer), tmp_path / "base")
    single = [{"prompt": p["prompt"], "completion": p["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
              for i, p in enumerate(PAIRS)]  # fmt: skip
    data = written(tmp_path / "data.jsonl", PAIRS if method == "dpo" else [*single, *PAIRS[:4]])
    words = ["align", str(tmp_path / "base"), "--data", data, *FEW, "--run", str(tmp_path / "run"), "--method"]
    assert main([*words, method]) == 0
    said = capsys.readouterr().err
    assert ("38 to train on, 2 held out" if method == "dpo" else "desirable and") in said
    losses = metrics_of(tmp_path / "run", "loss")
    assert losses[-1] < losses[0] < (np.log(2) if method == "dpo" else 0.5)  # that of the reference itself
    assert max(metrics_of(tmp_path / "run", "margin")) > 0  # 0 in a batch of one kind
    assert "perplexity" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # the loss is not one of tokens
    if family == "glm":
        assert main([*words[:-2], str(tmp_path / "other"), "--method", "reward"]) == 2
        assert "this model fills blanks: train it" in capsys.readouterr().err


def test_answers_to_other_prompts():
    records = [{"prompt": "a", "completion": "xy", "label": True}, {"prompt": "a", "completion": "z", "label": False},
               {"prompt": "bc", "completion": "w", "label": True}]  # fmt: skip
    found = [one for record in records for one in labelled.labelled(record, FORM, "here")]
    arrays, _ = labelled.labelled_arrays(found, 8)
    rows = np.concatenate([arrays["tokens"][:, 1, :1], arrays["targets"][:, 1]], axis=1)
    texts = [bytes(ids[ids < END].tolist()).rstrip(b"\0") for ids in rows]
    assert texts == [b"aw", b"aw", b"bcxy"]
    assert arrays["desirable"].tolist() == [1, 0, 1]
    assert arrays["weights"].sum(-1).tolist() == [[3, 2], [2, 2], [2, 3]]
    with pytest.raises(ValueError, match="all answers are to one prompt"):
        labelled.labelled_arrays(found[:2], 8)
    for record, message in (
        ({"prompt": "a", "completion": "b"}, "give prompt, completion and label"),
        ({"prompt": "a", "completion": "b", "label": 1}, "label=1 is neither true nor false"),
        ({"prompt": "a", "label": True}, "has a label, but no completion"),
    ):
        with pytest.raises(ValueError, match=message):
            labelled.labelled(record, FORM, "here")


def test_what_a_run_began_with_is_not_changed(model, tmp_path, capsys):
    data = written(tmp_path / "pairs.jsonl", PAIRS)
    run = str(tmp_path / "run")
    assert main(["align", model, "--method", "dpo", "--data", data, *FEW, "--run", run]) == 0
    assert main(["align", "--resume", run, "--option", "beta=1"]) == 2
    assert "--option does not go with --resume" in capsys.readouterr().err
    for words, message in (
        (
            ["--method", "dpo", "--option", "alpha=3"],
            "--option alpha: --method dpo knows beta, label_smoothing",
        ),
        (["--method", "reward", "--option", "beta=3"], "--option beta: --method reward knows centring"),
        (["--method", "dpo", "--ptx", "0.1"], "--ptx does not go with --method dpo"),
    ):
        assert main(["align", model, "--data", data, *FEW, *words, "--run", run + "2"]) == 2
        assert message in capsys.readouterr().err


def test_log_probabilities_of_the_reference_are_those_of_this_data(model, tmp_path):
    """A folder in which another run was killed early has some of other answers."""
    losses = []
    for folder, records in (("run", PAIRS[:30]), ("run", PAIRS), ("alone", PAIRS)):
        data = written(tmp_path / "pairs.jsonl", records)
        assert main(["align", model, "--method", "dpo", "--data", data, *FEW, "--run", str(tmp_path / folder)]) == 0
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        for name in ("run.json", "checkpoints", "metrics.jsonl", "model", "spare"):  # as if it had been killed early
            path = tmp_path / folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert losses[1] == losses[2]


def test_conversations_and_models_that_changed_since_a_run_began_are_refused(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GARRULAX_CACHE", str(tmp_path / "cache"))
    run, steps = tmp_path / "run", ["steps=1", "eval_every=1"]
    chats = [{"prompt": f"is {i}", "completion": f" yes {i}"} for i in range(40)]
    data = written(tmp_path / "chats.jsonl", chats)
    assert main(["train", model, "--sft", data, *FEW, *steps, "--run", str(run)]) == 0
    written(tmp_path / "chats.jsonl", [*chats[:-1], {"prompt": "is 39", "completion": " no"}])
    capsys.readouterr()
    for without_checkpoint in (False, True):
        assert main(["train", "--resume", str(run), "steps=2"]) == 2
        assert "data.corpus is " in capsys.readouterr().err
        if not without_checkpoint:
            shutil.rmtree(run / "checkpoints")  # as if it had been killed early
    # PPO-ptx: the model whose text is to stay likely, the one that judges, and the text.
    made, text = byte_model("gpt", eos=END, context=64, layers=1), tmp_path / "text.txt"
    judge = reward.add_reward_head(made.params, made.config, jax.random.key(1))
    text.write_text("some text to keep\n" * 30)
    save_reward_model(gx.Model(made.config, judge, made.tokenizer), tmp_path / "judge")
    job = Job("grpo", data, reward=str(tmp_path / "judge"), options={"beta": 0.1, "limit": 4, "group": 2}, ptx=0.5)
    arguments = argparse.Namespace(
        resume=None, config=None, settings=[model, f"corpus={text}", *FEW], run=str(tmp_path / "policy"),
        mesh=None, lora=None, new_data=False,
    )  # fmt: skip

    def identity():
        return align._policy(starting.start(arguments), job).data.identity

    began, other = identity(), jax.tree.map(lambda x: x + 1, made.params)
    save_reward_model(gx.Model(made.config, judge | {"norm": other["norm"]}, made.tokenizer), tmp_path / "judge")
    gx.save(gx.Model(made.config, other, made.tokenizer), model)
    text.write_text("other text to keep\n" * 30)
    assert {name for name, value in identity().items() if value != began[name]} == {"reference", "reward", "ptx_corpus"}
