"""Instruction tuning, reward models and preference objectives: masks, packing, gradients, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import FOLDER
from safetensors.numpy import load_file, save_file
from tiny import SHALLOW, byte_model

import garrulax as gx
from garrulax import align, models
from garrulax.align import answers, conversations, objectives, rollouts, sft, teachers
from garrulax.align.comparisons import NO_ANSWER
from garrulax.align.policy import masked_mean
from garrulax.hub.tokenizers import ByteTokenizer
from garrulax.models import reward
from garrulax.train.objectives import causal_lm
from garrulax.train.settings import Settings

Z = np.load(FOLDER / "alignment_s0.npz")
USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
MESSAGES = [USER, ANSWER, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "because"}]


class Words:
    """The tokenizer of the oracle's conversation: a word an id, in a template like ChatML."""

    text = "<pad> <|start|> <|end|> <nl> system user assistant be kind what is 2 + 3 5 thanks you are welcome"
    words = tuple(text.split())

    def encode(self, text, *, start=True):
        return [self.words.index(w) for w in text.replace("\n", " <nl> ").split()]

    def apply_chat_template(self, messages, *, add_generation_prompt=True):
        text = "".join(f"<|start|> {m['role']}\n{m['content']} <|end|>\n" for m in messages)
        return self.encode(text + ("<|start|> assistant\n" if add_generation_prompt else ""))


def test_mask_of_transformers():
    ids, mask = Z["chat/input_ids"], Z["chat/assistant_mask"]
    text = " ".join(Words.words[i] for i in ids)
    messages = []
    for turn in text.split("<|start|>")[1:]:
        role, content = turn.split("<nl>", 1)
        messages.append({"role": role.strip(), "content": content.split("<|end|>")[0].strip()})
    example = conversations.encode(Words(), messages, (2,))
    used = np.asarray(example.tokens)
    np.testing.assert_array_equal(used, ids[: len(used)])
    np.testing.assert_array_equal(example.mask, mask[: len(used)].astype(bool))
    assert not mask[len(used) :].any()
    assert mask.sum() > 0


SPECIALS = ["<|endoftext|>", "<s>", "</s>", "[gMASK]", "sop", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
            "<|observation|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eot_id|>"]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "end", "learned"),
    [
        ("llama3", "<|eot_id|>", [b"so.", b"because"]),
        ("chatglm3", "<|user|>", [b"so.", b"because"]),  # the next turn ends an answer
        ("glm4", "<|user|>", [b"so.", b"because"]),
        ("llama2", "</s>", [b"so.", b"because"]),
        ("chatglm2", "</s>", [b"because"]),  # all is one text
    ],
)
def test_only_answers_and_their_ends_are_learned(form, end, learned):
    tokenizer = ByteTokenizer(SPECIALS)
    tokenizer.chat_format = form
    tokenizer.bos, tokenizer.eos = tokenizer.specials["<s>"], tokenizer.specials["</s>"]
    end_id = tokenizer.specials[end]
    example = conversations.encode(tokenizer, MESSAGES, (end_id,))
    answers, current = [], []
    for token, counted in zip(example.tokens, example.mask, strict=True):
        if counted:
            current.append(token)
            if token == end_id:
                answers, current = [*answers, current], []
    assert not current, "an answer has no end"
    assert [bytes(ids[:-1]).strip(b"\n ") for ids in answers] == learned
    prompt = tokenizer.apply_chat_template(MESSAGES[:-1], add_generation_prompt=True)
    assert example.tokens[: len(prompt)] == prompt
    assert example.mask[len(prompt)]


def test_records_in_the_usual_shapes(tmp_path):
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    records = [
        {"messages": asked},
        {"prompt": "q", "completion": "a"},
        {"prompt": asked[:1], "completion": asked[1:]},
        {"instruction": "q", "input": "", "output": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert [conversations.conversation(r, where) for where, r in conversations.read_records(path)] == [asked] * 5
    with_input = conversations.conversation({"instruction": "add", "input": "1 2", "output": "3"})
    assert with_input[0]["content"] == "add\n\n1 2"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [{"role": "robot", "content": "a"}, ANSWER]}, "role 'robot'"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "'alien' is none of"),
        ({"text": "a"}, "has the keys text"),
        ({"messages": ["a"]}, "message 0 has no role"),
    ],
)
def test_bad_records(record, message):
    with pytest.raises(ValueError, match=message):
        conversations.conversation(record)


def test_bad_files(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, message in (("", "is empty"), ("{", "a.jsonl:1 is not JSON"), ("[]", "is list, not an object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(conversations.read_records(path))


def examples(count, seed=0):
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens, answer = draw.integers(0, 250, draw.integers(4, 20)).tolist(), draw.integers(1, 4)
        made.append(conversations.Example(tokens, [i >= len(tokens) - answer for i in range(len(tokens))]))
    return made


def test_nothing_is_trained_on_nothing():
    with pytest.raises(ValueError, match="none of the 2 tokens is in the mask"):
        conversations.Example([1, 2], [False, False])
    with pytest.raises(ValueError, match="a mask of 1 for 2 tokens"):
        conversations.Example([1, 2], [True])
    rows = {"tokens": np.ones((2, 3), np.int32), "weights": np.array([[0, 1, 1], [0, 0, 0]], np.float32)}
    with pytest.raises(ValueError, match="row 1 has no token with a weight"):
        answers.array_data(rows, rows, Settings(batch=2))


def test_packed_conversations_have_the_loss_of_each_alone(quick_compilation):
    made, model = examples(30), byte_model("llama", layers=1)
    settings = Settings(batch=4, window=32, steps=4)
    data = sft.make_sft_data([*made, conversations.Example([1] * 40, [True] * 40)], made[:5], settings)
    assert "1 of 31 train conversations left out" in data.notes[0]
    total = count = 0.0
    batch = data.batch_at(0)
    assert set(np.unique(batch["weights"])) == {0.0, 1.0}
    held_out_loss = jax.jit(causal_lm, static_argnums=2)
    for part in data.held_out():
        part = {k: jnp.asarray(v) for k, v in part.items()}
        loss, metrics = held_out_loss(model.params, part, model.config)
        total, count = total + float(loss * metrics["tokens"]), count + float(metrics["tokens"])
    alone = 0.0
    forward = jax.jit(models.forward, static_argnums=2)
    for example in made[:5]:  # of one length: what is right of a token does not reach it
        ids, mask = (np.pad(x, (0, 20 - len(x)))[None].astype(np.int32) for x in (example.tokens, example.mask))
        logits, _ = forward(model.params, ids[:, :-1], model.config)
        alone -= float(align.sequence_logprobs(align.logprobs_of(logits, ids[:, 1:]), mask[:, 1:].astype("float32"))[0])
    assert count == sum(sum(e.mask) for e in made[:5])
    np.testing.assert_allclose(total, alone, rtol=1e-5)
    with pytest.raises(ValueError, match="no conversation fits into window=2: the shortest has 4 tokens"):
        sft.make_sft_data(examples(50), made, Settings(batch=4, window=2, steps=4))


def test_scores_are_those_of_transformers_wherever_the_padding_is(tmp_path):
    folder = FOLDER / "alignment_rm"
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    body = {k: v for k, v in tensors.items() if k != "score.weight"}
    save_file({**body, "lm_head.weight": np.zeros((40, 32), np.float32)}, tmp_path / "model.safetensors")
    model = gx.load(tmp_path)
    params = reward.add_reward_head(model.params, model.config, jax.random.key(0))
    head = {"weight": jnp.asarray(tensors["score.weight"].T), "bias": jnp.zeros(1)}
    params[reward.NAME] = head
    tokens = jnp.asarray(Z["rmpool/right"], jnp.int32)
    lengths = jnp.array([9, 5, 7])
    found = reward.scores(params, tokens, lengths, model.config)
    np.testing.assert_allclose(found, Z["rmpool/rewards"], atol=1e-5)
    longer = reward.scores(params, jnp.pad(tokens, ((0, 0), (0, 6)), constant_values=3), lengths, model.config)
    np.testing.assert_allclose(longer, found, atol=1e-6)
    moved = reward.scores(reward.centred(params, found.mean()), tokens, lengths, model.config)
    np.testing.assert_allclose(moved.mean(), 0, atol=1e-6)


def pairs(config, count=4, length=10, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, config.vocab, (count, 2, length + 1))
    ends = draw.integers(6, length + 1, (count, 2, 1))
    index = np.arange(length)
    return {
        "tokens": jnp.asarray(tokens[..., :-1], jnp.int32),
        "targets": jnp.asarray(tokens[..., 1:], jnp.int32),
        "weights": jnp.asarray((index >= 4) & (index < ends), jnp.float32),
    }


def test_a_preference_is_learned_from_log_2_on(quick_compilation):
    config = SHALLOW["gpt"]
    params = models.init(config, jax.random.key(1))
    batch = objectives.with_reference(pairs(config), params, config)
    loss = objectives.pair_objective("dpo", beta=0.5)
    step = jax.jit(jax.value_and_grad(lambda p: loss(p, batch, config)[0]))
    value, gradient = step(params)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)

    def direction(p):  # the first gradient is -beta / 2 (grad log pi(chosen) - grad log pi(rejected))
        filled = objectives.with_reference(batch, p, config)["reference"]
        return -0.25 * jnp.mean(filled[:, 0] - filled[:, 1])

    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(jax.jit(jax.grad(direction))(params)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max() + 1e-6))
    for _ in range(5):
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, step(params)[1])
    assert step(params)[0] < 0.6
    metrics = jax.jit(loss, static_argnums=2)(params, batch, config)[1]
    assert metrics["accuracy"] == 1
    assert metrics["margin"] > 0


@pytest.mark.parametrize("loss", ["ipo", "orpo", "simpo"])
def test_objectives_on_pairs_are_the_functions_on_their_log_probabilities(loss):
    config = SHALLOW["gpt"]
    params, other = (models.init(config, jax.random.key(i)) for i in (1, 2))
    batch = objectives.with_reference(pairs(config), other, config)
    value, _ = objectives.pair_objective(loss, nll_weight=0.3)(params, batch, config)
    lengths = batch["weights"].sum(-1)
    used = objectives.with_reference(batch, params, config)["reference"] / lengths
    reference = batch["reference"] / lengths
    expected = {
        "ipo": lambda: align.ipo(*used.T, *reference.T),
        "orpo": lambda: align.orpo(*used.T, -used[:, 0]),
        "simpo": lambda: align.simpo(*used.T),
    }[loss]()
    np.testing.assert_allclose(value, jnp.mean(expected - 0.3 * used[:, 0]), rtol=1e-5)
    with pytest.raises(ValueError, match="loss='ppo': the losses on pairs are dpo, ipo, orpo, simpo"):
        objectives.pair_objective("ppo")


def test_a_reward_model_learns_its_comparisons(quick_compilation):
    config = SHALLOW["llama"]
    params = reward.add_reward_head(models.init(config, jax.random.key(0)), config, jax.random.key(1))
    draw = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(draw.integers(0, config.vocab, (3, 4, 8)), jnp.int32),
        "length": jnp.asarray(draw.integers(3, 9, (3, 4)), jnp.int32),
        "rank": jnp.array([[0, 1, 2, 3], [1, 0, NO_ANSWER, NO_ANSWER], [0, 0, 1, NO_ANSWER]], jnp.int32),
    }
    objective = objectives.reward_objective(centring=0.01)
    step = jax.jit(jax.value_and_grad(lambda p: objective(p, batch, config), has_aux=True))
    (first, metrics), _ = step(params)
    assert metrics["tokens"] == 3, "the weight in a mean is the number of prompts"
    for _ in range(30):
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, step(params)[1])
    (last, metrics), _ = step(params)
    assert metrics["accuracy"] == 1
    assert last < first / 3
    for a, b in zip(jax.tree.leaves(models.init(config, jax.random.key(0))),
                    jax.tree.leaves(reward.without_head(params)), strict=True):  # fmt: skip
        assert a.shape == b.shape


def test_sums_of_objectives(quick_compilation):
    config = SHALLOW["gpt"]
    params, old = (models.init(config, jax.random.key(i)) for i in (1, 2))
    draw = np.random.default_rng(0)
    text = {k: jnp.asarray(draw.integers(0, config.vocab, (2, 8)), jnp.int32) for k in ("tokens", "targets")}
    text["weights"] = jnp.ones((2, 8))
    chosen = objectives.with_reference(pairs(config), params, config)
    batch = {f"a/{k}": v for k, v in chosen.items()} | {f"b/{k}": v for k, v in text.items()}
    both = objectives.mixed(objectives.pair_objective(), causal_lm, 0.25)
    value, metrics = both(params, batch, config)
    lm = causal_lm(params, text, config)[0]
    np.testing.assert_allclose(value, np.log(2) + 0.25 * lm, rtol=1e-6)
    np.testing.assert_allclose(metrics["second_loss"], lm, rtol=1e-6)
    held = objectives.penalised(causal_lm, lambda p: align.ewc_penalty(p, old, weight=0.1))
    squares = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (params, old)), strict=True))
    np.testing.assert_allclose(held(params, text, config)[0], lm + 0.05 * squares, rtol=1e-5)
    repeated = objectives.token_penalty_objective(align.unlikelihood, 2.0)
    logits, _ = models.forward(params, text["tokens"], config)
    penalty = masked_mean(align.unlikelihood(logits, text["targets"]), text["weights"])
    np.testing.assert_allclose(repeated(params, text, config)[0], lm + 2 * penalty, rtol=1e-5)


def test_a_student_learns_from_a_teacher_on_its_own_text(quick_compilation):
    """Without forgetting: at the old parameters the loss is that of the text alone. On-policy: the divergence falls."""
    made = byte_model("gpt", eos=0, layers=1)
    old, config = made.params, made.config
    draw = np.random.default_rng(0)
    text = {k: jnp.asarray(draw.integers(0, config.vocab, (2, 8)), jnp.int32) for k in ("tokens", "targets")}
    text["weights"] = jnp.ones((2, 8))
    kept = teachers.distillation_objective(old, temperature=2.0, weight=0.7, nll_weight=1.0)
    value, metrics = kept(old, text, config)
    np.testing.assert_allclose(value, causal_lm(old, text, config)[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"], 0, atol=1e-6)
    student = models.init(config, jax.random.key(5))
    logits = [models.forward(p, text["tokens"], config)[0] for p in (student, old)]
    wanted = 0.7 * 4 * align.distillation(*logits, temperature=2.0).mean()
    value, metrics = kept(student, text, config)
    np.testing.assert_allclose(value, wanted + metrics["nll"], rtol=1e-5)

    prompts = rollouts.Prompts(["ab", "c"], config, made.tokenizer, 4)
    write = teachers.StudentRollouts(prompts, config, 4, 0, limit=4, tokenizer=made.tokenizer)
    objective = teachers.distillation_objective(old, beta=1.0)
    step = jax.jit(jax.value_and_grad(lambda p, batch: objective(p, batch, config)[0]))
    values = []
    for i in range(4):
        batch = write(None, i, student)[1]
        again = write(None, i, student)[1]
        assert all((batch[name] == again[name]).all() for name in batch)
        value, gradient = step(student, {name: jnp.asarray(x) for name, x in batch.items()})
        student = jax.tree.map(lambda p, g: p - 0.003 * g, student, gradient)
        values.append(float(value))
    assert values[-1] < values[0]


def test_fisher_information_is_a_mean_of_squares():
    params = {"w": jnp.array([0.5, -1.0])}
    x = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0], [2.0, 1.0]])

    def loglikelihood(p, row):  # of a logistic model: its gradient is (1 - sigmoid) x
        return jax.nn.log_sigmoid(row @ p["w"])

    found = align.fisher(loglikelihood, params, x, parts=2)["w"]
    expected = np.mean(((1 - 1 / (1 + np.exp(-np.asarray(x @ params["w"]))))[:, None] * np.asarray(x)) ** 2, axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="4 examples cannot be taken in 3 equal parts"):
        align.fisher(loglikelihood, params, x, parts=3)


def test_noise_on_the_embeddings():
    from garrulax.align import neftune

    config = SHALLOW["llama"]
    params = models.init(config, jax.random.key(0))
    segment = jnp.array([[0] * 6 + [1] * 2, [0] * 8])
    batch = {"tokens": jnp.ones((2, 8), jnp.int32), "targets": jnp.ones((2, 8), jnp.int32), "weights": jnp.ones((2, 8)),
             "segment": segment}  # fmt: skip
    noisy = neftune.neftune(causal_lm, 5.0)
    plain = causal_lm(params, batch, config)[0]
    assert noisy(params, batch, config)[0] == plain, "evaluation has no noise"
    found = [float(noisy(params, batch, config, jax.random.key(i))[0]) for i in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert found[0] != plain
    table = jnp.zeros((3, 4000))
    scale = 5.0 / np.sqrt(neftune._lengths(batch) * 4000)
    noise = neftune.Noisy(table, scale, jax.random.key(0)).lookup(jnp.ones((2, 8), jnp.int32))
    assert float(jnp.abs(noise).max()) <= 5 / np.sqrt(2 * 4000)
    np.testing.assert_allclose(jnp.var(noise, axis=2), scale**2 / 3, rtol=0.1)
    np.testing.assert_allclose(scale[:, 0], 5.0 / np.sqrt(np.array([6, 8]) * 4000), rtol=1e-6)
    with pytest.raises(ValueError, match="alpha=0 must be positive"):
        neftune.neftune(causal_lm, 0)


@pytest.mark.parametrize("family", [pytest.param("glm", marks=pytest.mark.slow), "glm130b"])
def test_answers_are_trained_as_blanks(family, quick_compilation):
    """The log-likelihood of the answer is that with which the model would write it into the blank."""
    from garrulax.sampling.partners import encode_prompt
    from garrulax.train.objectives import blank_infilling

    model = byte_model(family, layers=1)
    prompt = encode_prompt("ab", None, model.config, model.tokenizer, "a prompt").ids
    written = gx.generate(model, prompt, max_new_tokens=3, temperature=0, end_tokens=())
    example = conversations.Example([*prompt, *written.tokens], [False] * len(prompt) + [True] * 3)
    batch = {k: jnp.asarray(v) for k, v in sft.blank_arrays([example, example], model.config, len(prompt) + 8).items()}
    loss, metrics = blank_infilling(model.params, batch, model.config)
    assert metrics["tokens"] == 6
    np.testing.assert_allclose(loss, -np.mean(written.logprobs), rtol=1e-5)
