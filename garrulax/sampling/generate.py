"""`generate` and `stream`: prompts in, completions or pieces of text out."""

from collections.abc import Generator, Sequence

from garrulax import models
from garrulax.core.config import ModelConfig
from garrulax.models.unpack import ModelLike, TokenizerLike
from garrulax.sampling.blanks import last_blank_prompt
from garrulax.sampling.ends import StopStrings, ends_of
from garrulax.sampling.requests import (
    EncodedPrompt,
    Prompt,
    assemble,
    bucket,
    causal_prompt,
    knobs_per_prompt,
    prepare_model,
    prompt_list,
    token_ids,
    without_padding,
)
from garrulax.sampling.state import prefill
from garrulax.sampling.transforms import DEFAULT, Transform
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
    transform: Transform = DEFAULT,
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
    powers of two); while a long prompt is read, also what one layer computes of its tokens. On a CPU nothing else of
    the size of the parameters is allocated; bfloat16 parameters are converted in blocks, which takes about twice the
    time of float32 ones (`gx.load` gives float32 where memory allows). `garrulax info` states all parts.

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
        transform: Transform of the logits (`sampling.transforms`). Each transform is compiled once; other values of the
            arguments above compile nothing.

    Returns:
        The Completion of a single prompt, or the list of those of a list.

    Raises:
        ValueError: An empty prompt, one that does not fit into the context with max_new_tokens, an id outside the
            vocabulary, a text without a tokenizer, or a bad argument. The message says what to do.
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
    knobs = knobs_per_prompt(
        len(prompts), max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    completions = exhaust(
        _generate(model, prompts, knobs, stop, end_tokens, STOP_CHECK_STEPS if stop else None, transform)
    )
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
    transform: Transform = DEFAULT,
    every: int = 4,
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
        transform: Transform of the logits.
        every: Number of tokens between two pieces.

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
    knobs = knobs_per_prompt(
        1, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    return first_row(_generate(model, prompts, knobs, stop, end_tokens, every, transform))


def _generate(
    model: ModelLike,
    prompts: list[Prompt],
    knobs: dict[str, list],
    stop: str | Sequence[str],
    end_tokens: int | Sequence[int] | None,
    every: int | None,
    transform: Transform,
) -> Pieces[list[Completion]]:
    """Checks the arguments at once; returns a generator that decodes, `every` steps at a time (None: all at once)."""
    params, config, tokenizer = prepare_model(model)
    stops = StopStrings(stop, tokenizer)
    ends = ends_of(model, config, tokenizer, end_tokens)
    transform = without_padding(transform, config, tokenizer, ends)
    encoded = [
        _encode(prompt, limit, config, tokenizer, f"prompt {i}")
        for i, (prompt, limit) in enumerate(zip(prompts, knobs["max_new_tokens"], strict=True))
    ]
    limits = [prompt.limit for prompt in encoded]
    requests = assemble(encoded, {**knobs, "max_new_tokens": limits}, config, ends)
    max_new = bucket(max(limits), least=16)

    def steps():
        writers = [Writer(tokenizer, limit, ends, stops) for limit in limits]
        state = prefill(params, requests, config, transform, max_new, max_new)
        yield from decode_pieces(params, state, writers, every or max_new, config, transform)
        return [writer.completion() for writer in writers]

    return steps()


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
