"""`generate` and `stream`: prompts in, completions or pieces of text out."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.models.unpack import ModelLike, TokenizerLike
from garrulax.sampling.blanks import last_blank_prompt
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.ends import StopStrings, ends_of
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.requests import (
    EncodedPrompt,
    Prepared,
    Prompt,
    Weights,
    assemble,
    causal_prompt,
    chain_for,
    prepare_model,
    prompt_list,
    token_ids,
    without_padding,
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
    transform: Transform | None = None,
    **knobs: Any,
) -> Completion | list[Completion]:
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
    powers of two). On a CPU nothing else of the size of the parameters is allocated; bfloat16 parameters are converted
    in blocks, which takes about twice the time of float32 ones (`gx.load` gives float32 where memory allows).

    Args:
        model: From `gx.load`, or (params, config). Stacked parameters are unstacked in every call, which copies them
            unless they are on a CPU: elsewhere, to call often, pass the result of `gx.unstack`.
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
        transform: Transform of the logits (`sampling.transforms`). None is the standard chain of those that read the
            knobs given: temperature, top_k, top_p and what is in `knobs`. Each transform is compiled once; other values
            of the arguments above compile nothing.
        **knobs: Further sampling parameters, such as min_p, repetition_penalty or no_repeat_ngram_size; see
            `sampling.transforms`, and docs/sampling.md.

    Returns:
        The Completion of a single prompt, or the list of those of a list.

    Raises:
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
        transform=transform,
        **knobs,
    )
    completions = exhaust(plan.run())
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
    transform: Transform | None = None,
    every: int = 4,
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
        transform: Transform of the logits.
        every: Number of tokens between two pieces.
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
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
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
        transform=transform,
        every=every,
        **knobs,
    )
    return first_row(plan.run())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A call of `generate` whose arguments have been checked.

    Attributes:
        decoder: The functions of the model.
        weights: Its parameters, which may be abstract.
        requests: One for each row of the state, as NumPy arrays.
        writers: Row -> what collects its tokens.
        size: Greatest number of tokens that a row may get.
        every: Number of steps between two looks at the tokens.
    """

    decoder: Decoder
    weights: Weights
    requests: Requests
    writers: dict[int, Writer]
    size: int
    every: int

    def run(self) -> Pieces[list[Completion]]:
        """Decodes; returns a generator."""
        state = start(self.decoder, self.weights, self.requests, self.size)
        yield from decode_pieces(self.decoder, self.weights.step, state, self.writers, self.every, self.size)
        return [writer.completion() for writer in self.writers.values()]


def compile_ahead(model: ModelLike, prompt: Prompt, *, max_new_tokens: int | None = None, **arguments: Any) -> None:
    """Begins, in other threads, to compile the programs with which `generate` and `stream` continue a prompt.

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
    compile_start(plan.decoder, plan.weights, plan.requests, plan.size)


def make_plan(
    model: ModelLike,
    prompts: list[Prompt],
    max_new_tokens: Any,
    *,
    stop: str | Sequence[str] = (),
    end_tokens: int | Sequence[int] | None = None,
    negative_prompts: Prompt | Sequence[Prompt] | None = None,
    every: int | None = None,
    transform: Transform | None = None,
    prepared: Prepared | None = None,
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
        prepared: What `prepare_model` has made of the model; None makes it.
        **knobs: Sampling parameters.
    """
    weights, config, tokenizer = prepared or prepare_model(model)
    stops = StopStrings(stop, tokenizer)
    ends = ends_of(model, config, tokenizer, end_tokens)
    knobs = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, **knobs}
    transform = without_padding(chain_for(transform, knobs), config, tokenizer, ends)
    values = knobs_per_prompt(len(prompts), vocab=config.vocab, max_new_tokens=max_new_tokens, **knobs)
    encoded = [
        _encode(prompt, limit, config, tokenizer, f"prompt {i}")
        for i, (prompt, limit) in enumerate(zip(prompts, values["max_new_tokens"], strict=True))
    ]
    limits = values["max_new_tokens"] = [prompt.limit for prompt in encoded]
    rows, encoded, values = _with_partners(encoded, values, negative_prompts, config, tokenizer)
    requests = assemble(encoded, values, config, ends, transform)
    writers = {row: Writer(tokenizer, limit, ends, stops) for row, limit in zip(rows, limits, strict=True)}
    decoder = Decoder(config, transform)
    size = size_of(requests, decoder.buckets)
    return Plan(decoder, weights, requests, writers, size, every or (STOP_CHECK_STEPS if stop else max(limits)))


def _with_partners(
    encoded: list[EncodedPrompt],
    values: dict[str, list],
    negative_prompts: Prompt | Sequence[Prompt] | None,
    config: ModelConfig,
    tokenizer: TokenizerLike | None,
) -> tuple[list[int], list[EncodedPrompt], dict[str, list]]:
    """The rows of a batch in which each prompt with guidance is followed by the prompt without its condition.

    Returns:
        The row of each prompt, all rows, and the values of their knobs.
    """
    scales = values.get("guidance_scale", [1.0] * len(encoded))
    guided = [i for i, scale in enumerate(scales) if scale != 1]
    if not guided:
        if negative_prompts is not None:
            raise ValueError("negative_prompts needs guidance_scale, with another value than 1")
        return list(range(len(encoded))), encoded, values
    negative: list[Any] = [[prompt.token] for prompt in encoded]
    if negative_prompts is not None:
        given, single = prompt_list(negative_prompts)
        negative = given * len(encoded) if single else given
        if len(negative) != len(encoded):
            raise ValueError(f"negative_prompts has {len(negative)} prompts for {len(encoded)}: give one, or one each")
    order: list[int] = []  # pairs first, since the first of a pair has an even row
    all_rows: list[EncodedPrompt] = []
    for i in guided:
        partner = _encode(negative[i], encoded[i].limit, config, tokenizer, f"negative prompt {i}")
        all_rows += [encoded[i], partner._replace(conditional=encoded[i])]
        order += [i, i]
    others = [i for i in range(len(encoded)) if i not in guided]
    all_rows += [encoded[i] for i in others]
    order += others
    return (
        [order.index(i) for i in range(len(encoded))],
        all_rows,
        {name: [x[i] for i in order] for name, x in values.items()},
    )


def _encode(
    prompt: Prompt, limit: int | None, config: ModelConfig, tokenizer: TokenizerLike | None, name: str
) -> EncodedPrompt:
    if models.blanks(config) is not None:
        encoded = last_blank_prompt(prompt, limit, config, tokenizer, name)
        if encoded is not None:
            return encoded
    ids = token_ids(prompt, tokenizer, name)
    if isinstance(prompt, str) and tokenizer is not None:
        ids = [*tokenizer.prefix, *ids, *tokenizer.suffix]
    return causal_prompt(ids, limit, config, name)
