"""Speculation: the tokens are those without it, whatever proposes them.

tests/parity/test_speculate.py compares with transformers' assisted generation and prompt lookup.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import garrulax as gx
from garrulax import models, sampling
from garrulax.cli import main
from garrulax.core import spec
from garrulax.layers.cache import Cache
from garrulax.sampling import speculate
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.requests import assemble, causal_prompt
from garrulax.sampling.speculate.accept import exact
from garrulax.sampling.speculate.lookup import lookup
from garrulax.sampling.speculate.loop import speculate_steps
from garrulax.sampling.speculate.running import begin

pytestmark = pytest.mark.usefixtures("quick_compilation")
NEW = 24
PROMPTS = [[5, 9, 14, 3, 5, 9, 14, 3, 5, 9], [7], [12, 4, 12]]
#: One value a row: greedy, nucleus, top-k; the texts of small models with a low temperature repeat themselves.
KNOBS = {"temperature": [0, 0.3, 0.5], "top_p": [1, 0.8, 1], "top_k": [0, 0, 4], "repetition_penalty": [1, 1.1, 1]}


def model_of(family, **changes):
    config = dataclasses.replace(tiny.CONFIGS[family], **changes)
    return gx.unstack(tiny.params(config)), config


def slow_but_first(cases):
    return [pytest.param(*case, marks=pytest.mark.slow if i else ()) for i, case in enumerate(cases)]


def tokens(completions):
    return [one.tokens for one in completions]


WAYS = [(family, way) for family in ("llama", "gpt", "glm") for way in ("lookup", "same")] + [("glm", "gpt")]


@pytest.mark.parametrize(("family", "way"), slow_but_first(WAYS))
def test_tokens_are_those_without_speculation(family, way):
    """Rows with other knobs and acceptance, of one batch."""
    model = model_of(family, init_std=0.1, layers=1)
    ways = {"lookup": gx.prompt_lookup(), "same": gx.draft(model, tokens=4)}
    if way == "gpt":  # another family, which counts positions otherwise
        ways["gpt"] = gx.draft(model_of("gpt", vocab=model[1].vocab, layers=1), tokens=2)
    options = {"max_new_tokens": [NEW, NEW - 3, NEW], "seed": [1, 2, 3], **KNOBS}
    plain = gx.generate(model, PROMPTS, **options)
    found = gx.generate(model, PROMPTS, speculate=ways[way], **options)
    assert tokens(found) == tokens(plain)
    for a, b in zip(plain, found, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    assert [one.passes for one in plain] == [None] * 3
    if way == "lookup" and family != "gpt":
        assert found[0].passes < NEW  # the text of these models repeats itself
    if way == "same":  # always right: 4 drafts and one more token a pass
        assert [one.passes for one in found] == [-(-len(one.tokens) // 5) for one in plain]


@pytest.mark.slow
def test_alone_and_in_pieces():
    model = tiny.byte_model("llama", layers=2, bos=None, eos=256)
    options = {"max_new_tokens": NEW, "temperature": 0.6, "seed": 5}
    plain = gx.generate(model, "abcabcab", **options)
    pieces, done = tiny.drained(gx.stream(model, "abcabcab", every=3, speculate=gx.draft(layers=1), **options))
    assert done.tokens == plain.tokens
    assert "".join(pieces) == plain.text
    assert done.passes <= NEW


class Known(speculate.Speculation):
    """Drafts from texts that are known: a tree in which one branch is right as far as the tree goes."""

    def __init__(self, texts, parents, right):
        self.texts, self.parents, self.right = texts, parents, right

    def bind(self, weights, config, transform, requests, size):
        depth = jnp.array(speculate.depths(self.parents))
        right = jnp.array([i in self.right for i in range(len(self.parents))])

        def propose(params, memory, state):
            columns = jnp.minimum(state.generated[:, None] + depth[None] - 1, memory.shape[1] - 1)
            next_tokens = jnp.take_along_axis(memory, columns, axis=1)
            drafts = jnp.where(
                right[None], next_tokens, (next_tokens + 1 + jnp.arange(len(right))[None]) % config.vocab
            )
            valid = jnp.ones_like(drafts, bool)
            return speculate.Proposal(drafts, valid, jnp.arange(len(memory)) % 2 == 0), memory

        def observe(params, memory, outcome):
            return memory

        def begin(state):
            return jnp.pad(jnp.array(self.texts), [(0, len(state.done) - len(self.texts)), (0, 0)])

        return speculate.Bound(speculate.Proposer(self.parents, propose, observe, exact), (), begin)


FAMILIES = [
    ("llama", {"window": 3, "dialect": "mistral", "layers": 1}), ("gpt", {"band": 3}), ("glm", {}), ("falcon", {}),
    ("chatglm", {}), ("glm130b", {}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), slow_but_first(FAMILIES))
def test_trees(family, changes):
    """The right branch of a tree is kept, and nothing of the others: its keys and values move to where they belong."""
    model = model_of(family, **changes)
    texts = np.array(tokens(gx.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0, end_tokens=())))
    parents, right = (-1, -1, 0, 1, 1, 4, 3, 5), {1, 4, 5}  # three right drafts on the branch 1, 4, 5
    known = Known(texts, parents, right)
    found = gx.generate(model, PROMPTS, max_new_tokens=NEW, temperature=0, end_tokens=(), speculate=known)
    assert tokens(found) == texts.tolist()
    assert [one.passes for one in found] == [NEW // 4] * 3


def test_a_tree_needs_no_second_cache():
    """The keys of accepted tokens move within the cache. With one row, XLA:CPU copied all of it if a gather read it."""
    config = dataclasses.replace(tiny.CONFIGS["llama"], width=256, head_dim=64, heads=4, kv_heads=2)
    params = models.unstack(tiny.params(config))
    knobs = knobs_per_prompt(1, max_new_tokens=10, temperature=0, top_k=0, top_p=1.0, seed=0)
    request = assemble([causal_prompt([1, 2, 3], 10, config, "")], knobs, config)
    decoder = sampling.compile((params, config))
    bound = Known([[1] * 8], (-1, -1, 0), {0}).bind(None, config, decoder.transform, None, 0)
    one = jax.eval_shape(lambda: begin(decoder.empty(params, decoder.prefill(params, request, 4096), 1, 4096), bound))
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one.state.cache))
    static = {"config": config, "transform": decoder.transform, "proposer": bound.proposer}
    memory = speculate_steps.lower(params, (), one, 1, **static).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= kept
    assert memory.temp_size_in_bytes < kept / 8  # a layer's keys are a quarter of the cache


def three_rows():
    """A state without keys and values, with six tokens to write, of which 9 ends the text."""
    zero, six = jnp.zeros(3, jnp.int32), jnp.full(3, 6)
    cache = Cache(None, {"segment": jnp.zeros((3, 16), jnp.int32)}, zero + 1, zero + 8)
    return sampling.State(
        cache=cache, token=zero, position=zero, stride=zero + 1, length=zero + 2, seed=zero.astype(jnp.uint32),
        limit=six, generated=zero, done=zero > 0, ends=jnp.full((3, 1), 9), tokens=jnp.zeros((3, 16), jnp.int32),
        logprobs=jnp.zeros((3, 16)), allowed=None, transform_state=(),
    )  # fmt: skip


def test_acceptance_follows_a_tree():
    """Without a model: logits of each node that name the next token."""
    state, transform = three_rows(), sampling.chain()
    parents = (-1, -1, 0, 1)
    drafts = jnp.array([[5, 6, 7, 8], [5, 6, 7, 8], [5, 9, 7, 8]])
    valid = jnp.array([[True] * 4, [True, True, False, True], [True] * 4])
    following = jnp.array([[6, 1, 8, 1, 2], [5, 7, 1, 1, 1], [9, 1, 1, 1, 1]])  # after the last token and each draft
    logits = 1e4 * jax.nn.one_hot(following, 10, dtype=jnp.float32)  # far above the noise
    proposal = speculate.Proposal(drafts, valid, jnp.ones(3, bool))
    after, path = exact(state, proposal, parents, logits, transform)
    # Row 0 takes the branch 6, 8. The draft 7 of row 1 is not there. Row 2 ends with 9, after which nothing comes.
    assert [row[:n].tolist() for row, n in zip(after.tokens, after.generated, strict=True)] == [[6, 8, 2], [5, 7], [9]]
    assert path[0].tolist() == [0, 2, 4]
    assert path[1, :2].tolist() == [0, 1]
    assert (after.cache.used - state.cache.used).tolist() == [3, 2, 1]
    assert after.done.tolist() == [False, False, True]


@pytest.mark.parametrize("seed", range(3))
def test_lookup_finds_what_plain_python_finds(seed):
    rng = np.random.default_rng(seed)
    texts, ends = rng.integers(0, 3, size=(4, 12)), rng.integers(1, 13, size=4)
    found, size = lookup(jnp.asarray(texts, jnp.int32), jnp.asarray(ends, jnp.int32), 3, 5)
    for text, end, drafts, n in zip(texts, ends, found, size, strict=True):
        text = text[:end].tolist()
        matches = [
            (k, i)  # the last k tokens are also those before i
            for k in range(1, 4)
            for i in range(k, end)
            if end > k and text[i - k : i] == text[end - k :]
        ]
        k, i = max(matches, default=(0, 0))
        assert n == k
        if k:
            longer = text[i:] * 5
            assert drafts.tolist() == longer[:5]


@pytest.mark.slow
def test_constraints():
    """The automaton on the device, and the one on the host."""
    model = tiny.byte_model("llama", layers=1, bos=None, eos=256)
    options = {"max_new_tokens": 16, "seed": [1, 2], "constrain": [gx.regex("(ab|ac|abc)+[0-9]*"), None]}
    prompts = ["ababab", "acac"]
    plain = gx.generate(model, prompts, **options)
    found = gx.generate(model, prompts, speculate=gx.prompt_lookup(ngram=2, tokens=3), **options)
    assert tokens(found) == tokens(plain)
    assert re.fullmatch("(ab|ac|abc)+[0-9]*", found[0].text)
    pattern = sampling.regex_transform("(ab|ac)+", model.tokenizer, model.config.vocab, (256,))
    transform = sampling.chain(pattern, sampling.temperature())
    options = {"max_new_tokens": 16, "transform": transform, "temperature": 0.5, "top_k": None, "top_p": None}
    plain = gx.generate(model, prompts[0], **options)
    found = gx.generate(model, prompts[0], speculate=gx.prompt_lookup(ngram=2, tokens=3), **options)
    assert found.tokens == plain.tokens
    assert found.passes < len(plain.tokens)


def abstract(family, **changes):
    config = dataclasses.replace(tiny.CONFIGS[family], **changes)
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), models.parameters(config), is_leaf=spec.is_spec
    )
    return types, config


def test_bad_arguments():
    """Nothing is compiled before: the parameters are abstract."""
    model = abstract("gpt")
    _, config = model
    larger, shorter = abstract("gpt", vocab=config.vocab + 1), abstract("gpt", context=8)
    cases = [
        ({"speculate": gx.draft(larger)}, f"{config.vocab + 1} token ids, the model {config.vocab}"),
        ({"speculate": gx.draft(shorter)}, "the draft model's context is 8"),
        ({"speculate": gx.draft(layers=9)}, "layers=9 must be fewer than"),
        ({"speculate": gx.prompt_lookup(), "search": gx.beam(2)}, "speculate does not go with this search"),
        ({"speculate": gx.prompt_lookup(), "guidance_scale": 2.0}, "speculate does not go with guidance_scale"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            gx.generate(model, [3, 4, 5], max_new_tokens=8, **arguments)
    with pytest.raises(TypeError, match="must be made by gx"):
        gx.generate(model, [3, 4, 5], speculate="lookup")
    for every in (0, 1.5, None, "3", True):
        with pytest.raises(ValueError, match=f"every={every!r} must be a whole number of at least 1"):
            gx.stream(model, [3, 4, 5], every=every)
    with pytest.raises(ValueError, match="leave speculate out"):
        gx.fill(abstract("glm"), [3, 4, 2], speculate=gx.prompt_lookup())
    for wrong in (
        lambda: gx.prompt_lookup(tokens=0),
        lambda: gx.prompt_lookup(ngram=1.5),
        lambda: gx.draft(layers=0),
        lambda: gx.draft(),
        lambda: gx.draft(model, tokens=0),
        lambda: gx.draft(model, tokens=None),
        lambda: gx.draft(model, layers=1),
    ):
        with pytest.raises(ValueError, match=r"prompt_lookup|draft"):
            wrong()


def test_the_command(tmp_path, capsys):
    """Its programs are compiled while the weights are read, when nobody knows yet on which device they will be."""
    model = tiny.byte_model("gpt", layers=2)
    gx.save(gx.Model(model.config, model.params, model.tokenizer), tmp_path)
    words = ["generate", str(tmp_path), "abcab", "--max-new-tokens", "6", "--temperature", "0", "--no-cache"]
    plain = gx.generate(model, "abcab", max_new_tokens=6, temperature=0)
    for way in ("lookup", "layers=1", str(tmp_path)):
        assert main([*words, "--speculate", way]) == 0
        assert capsys.readouterr().out == f"abcab{plain.text}\n"
    away = jax.device_put(model.params, jax.devices()[1]), model.config
    with pytest.raises(ValueError, match="the draft model is on another device"):
        gx.generate(model, "abcab", max_new_tokens=6, speculate=gx.draft(away))


@pytest.mark.slow
def test_the_page_of_the_documentation(capsys):
    page = pathlib.Path(__file__).parents[1] / "docs" / "speculation.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.split() == ["True"] * 3
