"""`generate` and `stream`: prompts in, completions or pieces of text out."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from garrulax.core.auto_mesh import each_using
from garrulax.layers.cache import Cache
from garrulax.layers.cache_kinds import Kind
from garrulax.models.unpack import ModelLike, TokenizerLike
from garrulax.sampling.adapters import Adapter, behind, chosen, weights_by_row, without_prefix
from garrulax.sampling.buckets import ONE_ROW, POWERS_OF_TWO
from garrulax.sampling.caches import choose_kind, kind_for
from garrulax.sampling.constrain import Constraint, Matcher
from garrulax.sampling.constrained import decode_constrained, matchers_of
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.ends import StopStrings, ends_of
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.partners import encode_prompt, with_partners
from garrulax.sampling.requests import (
    Prepared,
    Prompt,
    Weights,
    assemble,
    chain_for,
    check_every,
    check_least,
    check_mesh,
    prepare_model,
    prompt_list,
    without_padding,
)
from garrulax.sampling.search import BestOf, ContrastiveSearch, Search, check
from garrulax.sampling.search.copies import best_samples, copied
from garrulax.sampling.search.running import searched
from garrulax.sampling.speculate import (
    Bound,
    Speculation,
    check_acceptance,
    check_speculation,
    compile_speculation,
    decode_speculating,
)
from garrulax.sampling.start import compile_start, size_of, start
from garrulax.sampling.state import Requests
from garrulax.sampling.transforms import Transform
from garrulax.sampling.writing import Completion, Pieces, Writer, decode_pieces, exhaust, first_row

STOP_CHECK_STEPS = 8  # steps between two checks for stop strings


def generate(
    model: ModelLike,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int | None] | None = None,
    temperature: float | Sequence[float | None] | None = 1.0,
    top_k: int | Sequence[int | None] | None = 0,
    top_p: float | Sequence[float | None] | None = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    end_tokens: int | Sequence[int] | None = None,
    negative_prompts: Prompt | Sequence[Prompt] | None = None,
    constrain: Constraint | Sequence[Constraint | None] | None = None,
    transform: Transform | None = None,
    search: Search | None = None,
    speculate: Speculation | None = None,
    cache: str | Kind = "full",
    adapter: Adapter | Sequence[Adapter] = None,
    **knobs: Any,
) -> Completion | list[Completion] | list[list[Completion]]:
    """Continues texts.

    A completion depends only on its own prompt, sampling arguments and seed; the other prompts, their order and
    streaming do not change it. This holds up to rounding: batches of different sizes are different programs, whose
    logits may differ in the last bits.

    A model that is trained on blanks (GLM) completes a text by filling a blank at its end. A text gets [gMASK] and
    <sop>. Token ids are read in one of three ways:

    * With <sop>: the ids before it are the text with its mask, the ids after it are the answer so far. (For GLM-130B,
      [gMASK] <sop> in front of a text means that it is read from left to right.)
    * Without <sop>, original GLM: they are continued causally.
    * Without <sop>, GLM-130B and ChatGLM-6B: they get [gMASK], unless they have a mask, and <sop>.

    Memory: the parameters in their dtype, and a cache of as many slots as prompt and new tokens have (rounded up to
    powers of two); while a long prompt is read, also what one layer computes of its tokens. On a CPU nothing else of
    the size of the parameters is allocated, and from bfloat16 ones the computation is in float32 (docs/quantisation.md
    says how). `garrulax info` states all parts.

    Args:
        model: From `gx.load`, or (params, config), on one device or a mesh (docs/parallel.md). Stacked parameters are
            unstacked in every call, which copies them unless they are on one CPU: elsewhere, to call often, pass the
            result of `gx.unstack`.
        prompts: A text, a list of token ids, or a list of these. A text gets the tokens that its tokenizer puts around
            a prompt, such as bos; token ids are read as `gx.forward` reads them.
        max_new_tokens: Greatest number of new tokens; None is as many as fit into the context, up to 128. Like the next
            four, one value, or one a prompt.
        temperature: Divisor of the logits; 0 is greedy, 1 or None is off.
        top_k: Number of most probable tokens to sample from; 0 or None is off.
        top_p: Probability of the nucleus to sample from; 1 or None is off. Applied after temperature and top_k.
        seed: Seed of the random stream.
        stop: Strings that end a completion and are not part of it. A control token in them, such as "<|user|>", stands
            for its id, and for its text too.
        end_tokens: Ids of the tokens that end a completion (finish_reason "eos"). None takes all that the model's files
            give: the `eos` of the config, in which `load` puts the ids of generation_config.json, and the tokens that
            end an answer in the tokenizer's chat format (`Tokenizer.answer_ends`), such as "<|im_end|>".
        negative_prompts: With guidance_scale, the prompts from which the texts are to be moved away, one or one a
            prompt; None is the last token of each prompt.
        constrain: What the texts must be (`gx.json_schema`, `gx.regex`, `gx.grammar`, `gx.tool_call`), one constraint
            for all prompts, or one or None a prompt. A text always ends within max_new_tokens.
        transform: Transform of the logits (`sampling.transforms`). None is the standard chain of those that read the
            knobs given: temperature, top_k, top_p and what is in `knobs`. Each transform is compiled once; other values
            of the arguments above compile nothing.
        search: How to look for a good completion in place of sampling one: `gx.beam`, `gx.diverse_beam`,
            `gx.contrastive` or `gx.best_of`; docs/search.md shows them. In a completion, `score` is what it was ranked
            by. Stop strings do not go with beam search, and temperature 0 with none.
        speculate: How to guess several next tokens, which the model then reads in one pass: `gx.prompt_lookup`,
            `gx.draft` or `gx.medusa`; docs/speculation.md shows them. The completions are those without it, and come
            sooner where many guesses are right. In a completion, `passes` is the number of passes.
        cache: What is kept of the text: "full" is all, "int8" all with keys and values in 8 bits, `gx.window(n)` the
            last n tokens, `gx.sinks(4, n)` and `gx.blocks()` what lets a text go on beyond the model's context;
            docs/caches.md shows them. Models with a window keep no more than that in any case.
        adapter: Name of the adapter in `model.adapters` to write with, or one or None a prompt (docs/lora.md).
        **knobs: Further sampling parameters, such as min_p, repetition_penalty or no_repeat_ngram_size; see
            `sampling.transforms`, and docs/sampling.md.

    Returns:
        The Completion of a single prompt, or the list of those of a list. With a search that returns several, each is a
        list of Completions, best first.

    Raises:
        TypeError: `search` or `speculate` is something else, or `prompts` is neither texts nor token ids.
        ValueError: An empty prompt, one that does not fit into the context with max_new_tokens, an id outside the
            vocabulary, a text without a tokenizer, a knob that no transform reads, or a bad argument. The message says
            what to do.
        FloatingPointError: The logits are not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> params = gx.unstack(gx.init(config, jax.random.key(0)))
        >>> short, long = gx.generate((params, config), [[5, 17, 3], [9]], max_new_tokens=[2, 4], temperature=0)
        >>> len(short.tokens), len(long.tokens), long.finish_reason
        (2, 4, 'length')
    """
    prompts, single = prompt_list(prompts)
    if "every" in knobs:
        raise ValueError("there is no knob 'every': gx.stream takes it")
    plan = make_plan(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        end_tokens=end_tokens,
        negative_prompts=negative_prompts,
        constrain=constrain,
        transform=transform,
        search=search,
        speculate=speculate,
        cache=cache,
        adapter=adapter,
        **knobs,
    )
    found = exhaust(plan.run())
    completions: list[Any] = [one if search is not None and search.returned > 1 else one[0] for one in found]
    return completions[0] if single else completions


def stream(
    model: ModelLike,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    end_tokens: int | Sequence[int] | None = None,
    negative_prompts: Prompt | None = None,
    constrain: Constraint | None = None,
    transform: Transform | None = None,
    speculate: Speculation | None = None,
    every: int = 4,
    cache: str | Kind = "full",
    adapter: Adapter = None,
    **knobs: Any,
) -> Generator[str, None, Completion]:
    """Continues one text and yields it piece by piece. The pieces together are the text of `generate`.

    A piece never ends inside a character and never contains the beginning of a stop string.

    Args:
        model: See `generate`.
        prompt: A text or a list of token ids.
        max_new_tokens: See `generate`, like the arguments up to `transform`.
        temperature: Divisor of the logits.
        top_k: Number of most probable tokens to sample from.
        top_p: Probability of the nucleus to sample from.
        seed: Seed of the random stream.
        stop: Strings that end the completion.
        end_tokens: Ids that end the completion.
        negative_prompts: The prompt from which guidance moves the text away.
        constrain: What the text must be.
        transform: Transform of the logits.
        speculate: How to guess several next tokens.
        every: Number of tokens between two pieces; with `speculate` of passes.
        cache: What is kept of the text; see `generate`.
        adapter: Name of the adapter to write with.
        **knobs: Further sampling parameters.

    Returns:
        A generator of pieces, whose return value is the Completion.

    Raises:
        ValueError: See `generate`; raised by the call itself, before the first piece.
        FloatingPointError: The logits are not finite; raised by the generator.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.hub.tokenizers import ByteTokenizer
        >>> config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=257, eos=None)
        >>> model = gx.Model(config, gx.init(config, jax.random.key(0)), ByteTokenizer())
        >>> pieces = list(gx.stream(model, "Once", max_new_tokens=8, seed=1, every=2))
        >>> "".join(pieces) == gx.generate(model, "Once", max_new_tokens=8, seed=1).text
        True
    """
    prompts, single = prompt_list(prompt)
    if not single:
        raise ValueError(f"stream takes one prompt, not {len(prompts)}: generate takes several")
    check_every(every)
    if "search" in knobs:
        raise ValueError("stream cannot search, since a search decides at its end: use generate")
    plan = make_plan(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        end_tokens=end_tokens,
        negative_prompts=negative_prompts,
        constrain=constrain,
        transform=transform,
        speculate=speculate,
        every=every,
        cache=cache,
        adapter=adapter,
        **knobs,
    )
    return _only_one(first_row(plan.run()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A call of `generate` whose arguments have been checked.

    Attributes:
        decoder: The functions of the model.
        weights: Its parameters, which may be abstract.
        requests: One for each row of the state, as NumPy arrays.
        writers: Row -> what collects its tokens.
        matchers: Row -> what follows its constraint; empty without constraints.
        size: Greatest number of tokens that a row may get.
        every: Number of steps between two looks at the tokens.
        search: The search; None samples.
        speculation: What guesses tokens; None does not.
        ends: Tokens that end a text.
        tokenizer: The model's tokenizer, or None.
        stops: Stop strings.
        past: A cache with the prefix of the model; None without.
    """

    decoder: Decoder
    weights: Weights
    requests: Requests
    writers: dict[int, Writer]
    matchers: dict[int, Matcher]
    size: int
    every: int
    search: Search | None
    speculation: Bound | None
    ends: Sequence[int]
    tokenizer: TokenizerLike | None
    stops: StopStrings
    past: Cache | None = None

    def run(self) -> Pieces[list[list[Completion]]]:
        """Decodes; returns a generator, whose result is a list for each prompt: one completion, or what was found."""
        return each_using(self.weights.mesh, self._pieces())

    def _pieces(self) -> Pieces[list[list[Completion]]]:
        decoder, weights, requests = self.decoder, self.weights, self.requests
        if self.search is not None and not isinstance(self.search, BestOf):
            rows = list(self.writers)
            limits = [int(requests.limit[row]) for row in rows]
            return searched(
                self.search,
                decoder,
                weights,
                requests,
                rows,
                limits,
                self.ends,
                self.tokenizer,
                self.stops,
                self.matchers,
            )
        constrained, speculation, passes = bool(self.matchers), self.speculation, dict[int, int]()
        if speculation is not None:
            compile_speculation(decoder, weights, requests, self.size, speculation, constrained)
            state = start(decoder, weights, requests, self.size, steps=False)
            passes = yield from decode_speculating(
                decoder, weights.step, state, self.writers, self.every, self.size, speculation, self.matchers
            )
        elif constrained:
            state = start(decoder, weights, requests, self.size, constrained, steps=False, past=self.past)
            yield from decode_constrained(decoder, weights.step, state, self.writers, self.matchers, self.size)
        else:
            state = start(decoder, weights, requests, self.size, past=self.past)
            yield from decode_pieces(decoder, weights.step, state, self.writers, self.every, self.size)
        completions = [
            dataclasses.replace(writer.completion(), passes=passes.get(row)) for row, writer in self.writers.items()
        ]
        return [[one] for one in completions] if self.search is None else best_samples(self.search, completions)


def _only_one(pieces: Generator[str, None, list[Completion]]) -> Generator[str, None, Completion]:
    (completion,) = yield from pieces
    return completion


def compile_ahead(model: ModelLike, prompt: Prompt, *, max_new_tokens: int | None = None, **arguments: Any) -> None:
    """Begins, in other threads, to compile the programs with which `generate` and `stream` continue a prompt.

    With parameters on several devices it does nothing: they compile when they are called.

    Args:
        model: As for `generate`; its parameters may be abstract (`jax.ShapeDtypeStruct`), since only shapes and dtypes
            are read. `load(while_reading=...)` gives such a model.
        prompt: A prompt; for others whose length falls into the same bucket the programs are the same.
        max_new_tokens: See `generate`.
        **arguments: Further arguments of `generate`.

    Raises:
        ValueError: See `generate`.
    """
    plan = make_plan(model, [prompt], max_new_tokens, **arguments)
    if plan.weights.mesh is not None:
        return
    if plan.speculation is not None:
        constrained = bool(plan.matchers)
        compile_speculation(plan.decoder, plan.weights, plan.requests, plan.size, plan.speculation, constrained)
        return
    if plan.past is not None:  # which is known only when the weights are
        return
    steps = not plan.matchers and (plan.search is None or isinstance(plan.search, BestOf))
    compile_start(plan.decoder, plan.weights, plan.requests, plan.size, steps)


def make_plan(
    model: ModelLike,
    prompts: list[Prompt],
    max_new_tokens: Any,
    *,
    stop: str | Sequence[str] = (),
    end_tokens: int | Sequence[int] | None = None,
    negative_prompts: Prompt | Sequence[Prompt] | None = None,
    constrain: Constraint | Sequence[Constraint | None] | None = None,
    every: int | None = None,
    transform: Transform | None = None,
    search: Search | None = None,
    speculate: Speculation | None = None,
    prepared: Prepared | None = None,
    cache: str | Kind = "full",
    adapter: Adapter | Sequence[Adapter] = None,
    **knobs: Any,
) -> Plan:
    """Checks the arguments of `generate`.

    Args:
        model: Like the arguments up to `transform`, see `generate`.
        prompts: The prompts.
        max_new_tokens: One value, or one a prompt.
        stop: Strings that end a completion.
        end_tokens: Ids that end a completion.
        negative_prompts: One, or one a prompt.
        every: Steps between two looks at the tokens; None is as few looks as possible.
        transform: Transform of the logits.
        search: The search.
        speculate: What guesses tokens.
        prepared: What `prepare_model` has made of the model; None makes it.
        cache: What is kept of the text.
        adapter: Names of adapters.
        **knobs: Sampling parameters.
    """
    if prepared and adapter is not None:
        raise ValueError("a session has one model: begin it with that of the adapter, model.adapters[name]")
    model, trees = chosen(model, adapter, len(prompts))
    model, prefix = without_prefix(model)
    weights, config, tokenizer = prepared or prepare_model(model)
    on_mesh = weights.mesh is not None
    if on_mesh:
        one_device = {
            "speculate": speculate,
            "constrain": constrain,
            "a prefix": prefix,
            "an adapter a prompt": trees or None,
        }
        check_mesh(one_device | {"search": None if isinstance(search, BestOf) else search})
    kind = kind_for(cache, config)
    stops = StopStrings(stop, tokenizer)
    ends = ends_of(model, config, tokenizer, end_tokens)
    knobs = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, **knobs}
    transform = without_padding(chain_for(transform, knobs), config, tokenizer, ends)
    values = knobs_per_prompt(len(prompts), vocab=config.vocab, max_new_tokens=max_new_tokens, **knobs)
    encoded = [
        encode_prompt(prompt, limit, config, tokenizer, f"prompt {i}", kind.room is not None)
        for i, (prompt, limit) in enumerate(zip(prompts, values["max_new_tokens"], strict=True))
    ]
    values["max_new_tokens"] = [prompt.limit for prompt in encoded]
    check_least(values, values["max_new_tokens"])
    values |= {"adapter": list(trees)} if trees else {}
    if search is not None:
        check(search, config, values["temperature"], values["max_new_tokens"], stops, values.get("watermark", ()))
    copies = search.n if isinstance(search, BestOf) else 1
    if isinstance(search, BestOf):
        encoded, values = copied(search, encoded, values)
    limits = values["max_new_tokens"]
    endless = kind.room is not None
    rows, encoded, values = with_partners(encoded, values, negative_prompts, copies, config, tokenizer, endless)
    trees = values.pop("adapter", [])
    requests = assemble(encoded, values, config, ends, transform)
    writers = {row: Writer(tokenizer, limit, ends, stops) for row, limit in zip(rows, limits, strict=True)}
    followed = zip(rows, matchers_of(constrain, limits, copies, config, tokenizer, ends), strict=True)
    matchers = {row: matcher for row, matcher in followed if matcher is not None}
    if matchers and len(encoded) > len(rows):
        raise ValueError("constrain does not go with guidance_scale: leave one of them out")
    if isinstance(search, ContrastiveSearch) and len(encoded) > len(rows):
        raise ValueError("guidance_scale does not go with gx.contrastive: use gx.beam or gx.best_of")
    if matchers and isinstance(search, ContrastiveSearch):
        raise ValueError("constrain does not go with gx.contrastive: use gx.beam or gx.best_of")
    buckets = POWERS_OF_TWO if speculate is None else ONE_ROW
    size, every = size_of(requests, buckets), every or (STOP_CHECK_STEPS if stop else max(limits))
    compared = search is not None and not isinstance(search, BestOf)
    if trees:
        if compared or speculate is not None:
            raise ValueError("several adapters in one call go with sampling only: call once for each adapter")
        weights = weights_by_row(trees, buckets.of("rows", len(encoded)))
    full_only = "search" if compared else "speculate" if speculate is not None else "a prefix" if prefix else None
    full_only = "parameters on several devices" if on_mesh else full_only
    past = None
    if prefix is not None:
        if compared or speculate is not None or trees:
            raise ValueError("a prefix goes with sampling of one adapter only: leave search and speculate out")
        requests, past = behind(prefix, weights, requests, config)
    decoder = Decoder(config, transform, buckets, choose_kind(kind, config, size, full_only))
    speculation = None
    if speculate is not None:
        check_speculation(speculate, search, len(encoded) > len(rows))
        speculation = speculate.bind(weights, config, transform, requests, size)
        check_acceptance(speculation, bool(matchers))
    return Plan(
        decoder, weights, requests, writers, matchers, size, every, search, speculation, ends, tokenizer, stops, past
    )
