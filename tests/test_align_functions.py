"""The functions of `garrulax.align` against the numbers of the original authors' code (tests/oracles/alignment_s0.npz).

Made with the DPO repository, TRL 1.16, lm-human-preferences, summarize_from_feedback_details, unlikelihood_training and
ScaleGrad, in float64 from float32 inputs. The names of the arrays say which.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import FOLDER
from safetensors.numpy import load_file

import garrulax as gx
from garrulax import align
from garrulax.align import comparisons, groups, policy
from garrulax.align.logprobs import entropy

Z = np.load(FOLDER / "alignment_s0.npz")


@pytest.fixture(autouse=True)
def float64(quick_compilation):
    with jax.enable_x64(True):
        yield


def of(name):
    x = jnp.asarray(Z[name])
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def assert_close(found, name, tolerance=1e-9):
    np.testing.assert_allclose(found, Z[name], rtol=tolerance, atol=tolerance)


def completions(logits, *, mean=False):
    """Log-probabilities of the completions of pref/*; targets are the next tokens."""
    ids, mask = of("pref/input_ids"), of("pref/completion_mask")
    logps = align.logprobs_of(logits[:, :-1], ids[:, 1:])
    return align.sequence_logprobs(logps, mask[:, 1:], mean=mean)


def pairs(x):
    return x[:4], x[4:]


def test_log_probabilities_of_completions():
    logits = of("pref/policy_logits")
    assert_close(completions(logits), "pref/policy_logps")
    assert_close(completions(logits, mean=True), "pref/policy_logps_mean")
    assert_close(completions(of("pref/reference_logits")), "pref/reference_logps")


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("dpo/original/b0p1", align.dpo),
        ("dpo/original/b0p5", functools.partial(align.dpo, beta=0.5)),
        ("dpo/original/b0p1_ls0p3", functools.partial(align.dpo, label_smoothing=0.3)),
        ("dpo/original/b0p1_ipo", align.ipo),
        ("dpo/original/b0p1_reffree", lambda chosen, rejected, *_: align.dpo(chosen, rejected)),
        ("dpo/trl/sigmoid", align.dpo),
    ],
)
def test_losses_on_pairs(name, loss):
    assert_close(loss(*pairs(of("pref/policy_logps")), *pairs(of("pref/reference_logps"))), name)


def test_ipo_of_means_per_token():
    reference = completions(of("pref/reference_logits"), mean=True)
    assert_close(align.ipo(*pairs(of("pref/policy_logps_mean")), *pairs(reference)), "dpo/trl/ipo")


def test_gradient_of_dpo():
    def loss(logits):
        return align.dpo(*pairs(completions(logits)), *pairs(of("pref/reference_logps"))).mean()

    assert_close(jax.jit(jax.grad(loss))(of("pref/policy_logits")), "dpo/grad_b0p1")


def test_losses_without_a_reference():
    chosen, rejected = pairs(of("pref/policy_logps_mean"))
    assert_close(-align.orpo(chosen, rejected), "orpo/odds_ratio_term", 1e-6)
    nll = of("orpo/nll_prompt_and_completion")
    assert_close(align.orpo(chosen, rejected, nll).mean(), "orpo/loss", 1e-6)
    assert_close(align.simpo(chosen, rejected), "simpo/losses")


@pytest.mark.parametrize(("name", "weights"), [("kto/losses_b0p1", (1, 1)), ("kto/losses_b0p1_w", (1.5, 0.7))])
def test_kto(name, weights):
    kl = align.kto_kl(of("kto/kl_policy_logps"), of("kto/kl_reference_logps"))
    assert_close(kl, "kto/kl")
    labels = of("kto/labels")
    losses = align.kto(of("pref/policy_logps"), of("pref/reference_logps"), labels, kl,
                       desirable_weight=weights[0], undesirable_weight=weights[1])  # fmt: skip
    assert_close(jnp.concatenate([losses[labels], losses[~labels]]), name)


def test_losses_of_reward_models():
    rewards, counts = of("rm/rewards"), of("rm/counts")
    assert_close(align.kway_loss(rewards, counts), "rm/kway_loss")
    assert_close(comparisons.kway_losses(rewards, counts)[0], "rm/kway_loss_per_prompt")
    order = jnp.array([2, 0, 4, 1, 3])
    ranks = jnp.where(jnp.arange(5)[None] < counts[:, None], jnp.arange(5)[None], comparisons.NO_ANSWER)
    assert_close(align.kway_loss(rewards[:, order], ranks=ranks[:, order]), "rm/kway_loss")
    assert_close(comparisons.pick_best(rewards, of("rm/best")).mean(), "rm/pick_best")
    chosen, rejected = pairs(of("rm/pair_rewards"))
    assert_close(align.pair_loss(chosen, rejected).mean(), "rm/pair_loss_plain")
    assert_close(align.pair_loss(chosen, rejected, margin=of("rm/margin")).mean(), "rm/pair_loss_margin")
    assert_close(align.pair_loss(chosen, rejected, centring=0.01).mean(), "rm/pair_loss_centred")


def test_answers_that_tie_are_no_pair():
    rewards = jnp.array([[1.0, 5.0, 2.0]])
    tied = align.kway_loss(rewards, ranks=jnp.array([[0, 0, 1]]))
    np.testing.assert_allclose(tied, (np.log1p(np.exp(1.0)) + np.log1p(np.exp(-3.0))) / 2)
    assert align.kway_loss(rewards, ranks=jnp.zeros((1, 3), jnp.int32)) == 0


def test_whitening_and_estimates_of_the_kl():
    x, mask = of("whiten/values"), of("whiten/mask")
    assert_close(align.whiten(x), "whiten/openai")
    assert_close(align.whiten(x, keep_mean=True), "whiten/openai_keep_mean")
    for name, unbiased in (("details", False), ("trl", True)):
        found = align.whiten(x, mask, unbiased=unbiased)
        np.testing.assert_allclose(found, np.where(Z["whiten/mask"], Z[f"whiten/masked_{name}"], 0), atol=1e-9)
    for kind in ("k1", "k2", "k3"):
        assert_close(align.kl_estimate(of("ppo/old_logprobs"), of("ppo/ref_logprobs"), kind), f"kl/{kind}")


def test_controller_of_the_kl():
    controller = align.KLController(jnp.float64(0.15), target=6.0, horizon=10_000)
    found = [controller.coefficient]
    for kl in of("klctl/kl"):
        controller = controller.update(kl, 512)
        found.append(controller.coefficient)
    assert_close(jnp.stack(found), "klctl/coef")


def ppo_losses(advantages, returns, mask, value_mask):
    """Policy and value loss, and their sum's gradient by the new logits and values."""

    def loss(logits, values):
        logprobs = align.logprobs_of(logits, of("ppo/responses"))
        pg = align.clipped_policy_loss(logprobs, of("ppo/old_logprobs"), advantages, mask)
        vf = align.clipped_value_loss(values, of("ppo/values"), returns, value_mask)
        return pg + 0.1 * vf, (pg, vf)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return step(of("ppo/new_logits"), of("ppo/vpred"))


@pytest.mark.parametrize("kind", ["plain", "whiten"])
def test_ppo_as_openai_first_wrote_it(kind):
    rewards, every = of("ppo/openai/rewards"), jnp.ones((5, 8))
    if kind == "whiten":
        rewards = align.whiten(rewards, keep_mean=True)
    advantages, returns = align.gae(rewards, of("ppo/values"))
    (loss, (pg, vf)), (by_logits, by_values) = ppo_losses(align.whiten(advantages), returns, every, every)
    for found, name in ((loss, "loss"), (pg, "pg_loss"), (vf, "vf_loss"), (by_logits, "grad_logits"),
                        (by_values, "grad_values"), (entropy(of("ppo/new_logits")).mean(), "entropy")):  # fmt: skip
        assert_close(found, f"ppo/openai/{kind}/{name}", 1e-7)


@pytest.mark.parametrize("unbiased", [False, True], ids=["details", "trl"])
@pytest.mark.parametrize("kind", ["plain", "whiten_penalty"])
def test_ppo_with_masks(unbiased, kind):
    folder = f"ppo/{'trl' if unbiased else 'details'}/{kind}"
    mask, value_mask = of("ppo/mask"), of("ppo/mask_values")
    kl = policy.kl_estimate(of("ppo/old_logprobs"), of("ppo/ref_logprobs")) * mask
    assert_close(kl, f"{folder}/kl")
    scores = of("ppo/scores")
    if kind == "whiten_penalty":
        ended = (of("ppo/responses") == 2).any(1)
        scores = policy.score_without_end(scores, ended, **({"penalty": 1.0} if unbiased else {"instead": -1.0}))
    assert_close(scores, f"{folder}/scores")
    # These programs pay the score one step after the end token where there is room: at the end of the value mask.
    rewards = policy.token_rewards(scores, kl, value_mask, coefficient=0.05)
    if kind == "whiten_penalty":
        rewards = align.whiten(rewards, value_mask, keep_mean=True, unbiased=unbiased)
    assert_close(rewards, f"{folder}/rewards", 1e-7)
    advantages, returns = align.gae(rewards, of("ppo/values"), value_mask)
    assert_close(jnp.where(value_mask, returns, 0), f"{folder}/returns", 1e-7)
    advantages = align.whiten(advantages, mask, unbiased=unbiased)
    assert_close(advantages, f"{folder}/advantages", 1e-7)
    (loss, (pg, vf)), (by_logits, by_values) = ppo_losses(advantages, returns, mask, value_mask)
    for found, name in ((loss, "loss"), (pg, "pg_loss"), (vf, "vf_loss"), (by_logits, "grad_logits"),
                        (by_values, "grad_values")):  # fmt: skip
        assert_close(found, f"{folder}/{name}", 1e-7)


def test_advantages_within_groups():
    rewards = of("grpo/rewards") @ of("grpo/reward_weights")
    for scale in groups.SCALES:
        assert_close(align.group_advantages(rewards, 4, scale=scale), f"grpo/advantages_{scale}", 1e-7)
    kl = ((of("grpo/old_logps") - of("grpo/ref_logps")) * of("grpo/mask")).sum(1)
    assert_close(align.leave_one_out_advantages(rewards, 4), "rloo/advantages_plain", 1e-7)
    assert_close(align.leave_one_out_advantages(rewards - 0.05 * kl, 4), "rloo/advantages_kl", 1e-7)
    assert_close(align.leave_one_out_advantages(rewards - 0.05 * kl, 4, normalise=True), "rloo/advantages_norm", 1e-7)
    # A reward that is NaN is left out: the others have the advantages of a group of three.
    some = jnp.array([1.0, 2.0, jnp.nan, 6.0])
    np.testing.assert_allclose(align.group_advantages(some, 4, scale="none"), [-2, -1, 0, 3])
    np.testing.assert_allclose(align.leave_one_out_advantages(some, 4), [-3, -1.5, 0, 4.5])


KL = {"reference": "grpo/ref_logps", "beta": 0.04}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"loss": "grpo"}),
        ("grpo_kl", {"loss": "grpo", "corrected_kl": False, **KL}),
        ("grpo_kl_corrected", {"loss": "grpo", **KL}),
        ("dr_grpo", {"loss": "dr_grpo", "limit": 10}),
        ("dapo", {"loss": "dapo", "clip_high": 0.28}),
        ("dapo_delta", {"loss": "dapo", "clip_high": 0.28, "cap": 1.4}),
        ("gspo", {"loss": "gspo"}),
    ],
)
def test_losses_of_grpo_and_its_relatives(name, options):
    options = {k: of(v) if k == "reference" else v for k, v in options.items()}

    def loss(logprobs):
        return groups.group_policy_loss(
            logprobs, of("grpo/old_logps"), of("grpo/advantages_group"), of("grpo/mask"), **options
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(of("grpo/logps"))
    assert_close(value, f"grpo/loss/{name}", 1e-8)
    assert_close(gradient, f"grpo/grad/{name}", 1e-8)


def test_loss_of_rloo():
    def loss(logprobs):
        return align.sequence_policy_loss(logprobs, of("grpo/old_logps"), of("rloo/advantages_plain"), of("grpo/mask"))

    value, gradient = jax.jit(jax.value_and_grad(loss))(of("grpo/logps"))
    assert_close(value, "rloo/loss", 1e-8)
    assert_close(gradient, "rloo/grad", 1e-8)


def test_unlikelihood():
    logits, targets = of("ul/logits"), of("ul/targets")
    assert_close(-align.logprobs_of(logits, targets).sum(), "ul/mle_sum")
    assert_close(jax.jit(align.unlikelihood)(logits, targets).sum(), "ul/token_penalty_sum_without_pad", 1e-7)

    def original(logits):  # its padding id, 1, is a candidate everywhere: as if it came before the first target
        first = jnp.concatenate([jnp.ones((1, 1), targets.dtype), targets], axis=1)
        shifted = jnp.pad(logits, ((0, 0), (1, 0), (0, 0)))
        return -align.logprobs_of(logits, targets).sum() + align.unlikelihood(shifted, first).sum()

    value, gradient = jax.jit(jax.value_and_grad(original))(logits)
    assert_close(value, "ul/loss_sum_original", 1e-7)
    assert_close(gradient, "ul/grad_original", 1e-7)


def test_unlikelihood_of_packed_documents_is_that_of_each():
    key = jax.random.key(0)
    logits = jax.random.normal(key, (1, 9, 6))
    targets = jnp.array([[1, 2, 1, 2, 1, 2, 2, 1, 5]])
    segment = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, -1]])
    unlikelihood = jax.jit(align.unlikelihood)
    whole = unlikelihood(logits, targets, segment >= 0, segment)
    alone = [unlikelihood(logits[:, s], targets[:, s]) for s in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(whole[:, :8], jnp.concatenate(alone, axis=1), rtol=1e-12)
    assert whole[0, 8] == 0
    assert (np.asarray(whole[0, [2, 3, 5, 7]]) > 0).all()


def test_sequence_level_unlikelihood():
    tokens = of("ul/seq_tokens")
    for n in (2, 4):  # the original never looks at the last n-gram
        found = align.repeated_ngrams(tokens[:, :-1], n)
        np.testing.assert_array_equal(np.asarray(found).astype(int), Z[f"ul/seq_mask_n{n}"][:, :-1])
        assert not Z[f"ul/seq_mask_n{n}"][:, -1].any()

    def loss(logits):
        repeated = jnp.pad(align.repeated_ngrams(tokens[:, :-1], 4), ((0, 0), (0, 1)))
        return align.sequence_unlikelihood(align.logprobs_of(logits, tokens), repeated).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(of("ul/seq_logits"))
    assert_close(value, "ul/seq_loss_sum", 1e-8)
    assert_close(gradient, "ul/seq_grad", 1e-8)


def test_scalegrad():
    logits, targets = of("ul/logits")[:, :8], of("ul/targets")[:, :8]
    value, gradient = jax.jit(jax.value_and_grad(lambda x: align.scalegrad(x, targets).sum()))(logits)
    assert_close(value, "ul/scalegrad_sum", 1e-6)
    assert_close(gradient, "ul/scalegrad_grad", 1e-5)  # the original adds 1e-8 to the probabilities


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation(beta, temperature):
    labels = of("kd/labels")

    def loss(student):
        tokens = align.distillation(student, of("kd/teacher_logits"), beta=beta, temperature=temperature)
        return policy.masked_mean(tokens, labels != -100)

    value, gradient = jax.jit(jax.value_and_grad(loss))(of("kd/student_logits"))
    name = f"kd/gjsd_b{beta:.1f}_t{temperature:.1f}".replace(".", "p")
    assert_close(value, name, 1e-7)
    assert_close(gradient, f"{name}_grad", 1e-7)


def test_fisher_information_of_a_model_and_the_penalty(tmp_path):
    """Made by torch in float64 on tests/peft/llama/base, stored in float32: three rows, four tensors."""
    stored = np.load(FOLDER / "ewc_s0.npz")
    model = gx.load(FOLDER.parent / "peft/llama/base", dtype="float64")

    def loglikelihood(params, row):
        logits, _ = gx.forward(params, row[None, :-1], model.config)
        return align.logprobs_of(logits, row[None, 1:]).sum()

    found = align.fisher(loglikelihood, model.params, jnp.asarray(stored["tokens"]))
    gx.save(model.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), found)), tmp_path / "fisher")
    found = load_file(tmp_path / "fisher" / "model.safetensors")  # under the names of the checkpoint
    wanted, shift = (
        {name.removeprefix(part): jnp.asarray(x, jnp.float64) for name, x in stored.items() if name.startswith(part)}
        for part in ("fisher/", "shift/")
    )
    assert len(wanted) == 4
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-6, atol=1e-6 * float(x.max()), err_msg=name)
    penalty = align.ewc_penalty(shift, jax.tree.map(jnp.zeros_like, shift), wanted, weight=100.0)
    np.testing.assert_allclose(penalty, stored["penalty"], rtol=1e-6)


def test_coverage():
    attention = np.random.default_rng(0).dirichlet(np.ones(5), (2, 4))
    before = [attention[:, :t].sum(axis=1) for t in range(4)]
    wanted = np.stack([np.minimum(attention[:, t], before[t]).sum(-1) for t in range(4)], axis=1)
    np.testing.assert_allclose(align.coverage(jnp.asarray(attention)), wanted, atol=1e-12)
    np.testing.assert_allclose(align.coverage(jnp.full((3, 4), 0.25)), [0, 1, 1], atol=1e-12)
