"""`fill` and `fill_stream`: a GLM fills the blanks of a text from left to right.

Each answer depends on the text and on the answers before it. All texts of a batch proceed together: in round k the
model writes into blank k of every text.
"""

import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import half
from garrulax.core.auto_mesh import each_using
from garrulax.core.blanks import Blanks
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.models.unpack import ModelLike
from garrulax.sampling.blanks import PartA, answer_prompt, answer_tokens, blanks_of, part_a
from garrulax.sampling.buckets import bucket
from garrulax.sampling.decoder import Decoder
from garrulax.sampling.ends import StopStrings, ends_of
from garrulax.sampling.knobs import knobs_per_prompt
from garrulax.sampling.loop import read
from garrulax.sampling.requests import (
    EncodedPrompt,
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
from garrulax.sampling.search.copies import copied, mean_logprob, repeated
from garrulax.sampling.search.filling import beam_answers, certainties, check_fill, with_slots
from garrulax.sampling.search.kinds import BeamSearch, BestOf, check
from garrulax.sampling.start import size_of, start
from garrulax.sampling.state import State
from garrulax.sampling.transforms import Transform
from garrulax.sampling.writing import Completion, Pieces, Writer, decode_pieces, exhaust, first_row, with_free_slots

#: Arguments of `generate` and `fill_stream` that `fill` lacks: why, and what to do instead.
NOT_IN_FILL = {
    "cache": "it keeps the whole text, so leave cache out",
    "speculate": "it reads one token a step, so leave speculate out",
    "constrain": "it takes no constraint; gx.generate takes one, for a text that goes on at its end",
    "negative_prompts": "guidance goes with gx.generate only, so leave negative_prompts out",
    "adapter": "it writes with one model, so give it that of the adapter, model.adapters[name]",
    "every": "it returns the whole text at once; gx.fill_stream takes every",
}


@dataclasses.dataclass(frozen=True)
class Filled:
    """A text with its blanks filled.

    Attributes:
        tokens: Ids of the text, with the answers in place of their masks, without the tokens that ended the answers.
        text: The whole text; None if the model has no tokenizer.
        spans: The answers, in the order of the text.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("glm-tiny", layers=1, width=32, heads=2)
        >>> params = gx.init(config, jax.random.key(0))
        >>> ids = [config.cls, 50, config.mask, 60, config.eos]
        >>> filled = gx.fill((params, config), ids, max_new_tokens=3)
        >>> filled.tokens[:2], filled.tokens[-2:], filled.text
        ([1, 50], [60, 0], None)
        >>> [isinstance(span, gx.Completion) for span in filled.spans]
        [True]
    """

    tokens: list[int]
    text: str | None
    spans: list[Completion]

    def __str__(self) -> str:
        return str(self.tokens) if self.text is None else self.text


def fill(
    model: ModelLike,
    texts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int | Sequence[int | None] | None = None,
    temperature: float | Sequence[float | None] | None = 1.0,
    top_k: int | Sequence[int | None] | None = 0,
    top_p: float | Sequence[float | None] | None = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    end_tokens: int | Sequence[int] | None = None,
    transform: Transform | None = None,
    search: BeamSearch | BestOf | None = None,
    order: str = "text",
    **knobs: Any,
) -> Filled | list[Filled]:
    """Fills the blanks of texts.

    The model reads the text with bidirectional attention. Then, for each blank in turn, it gets [sop] and writes until
    [eop]. The original GLM reads the text once, and answers stay behind it for the blanks after them (THUDM/GLM
    generate_samples.py). GLM-130B and ChatGLM-6B read the text again for every blank, with the answers so far in place
    of their masks (GLM-130B generate.py).

    Tokens of words begin with their space, so a space before a blank becomes the beginning of the answer. The text gets
    the space back if the answer begins without one.

    The answers in a text depend only on that text, its sampling arguments and its seed.

    Args:
        model: From `gx.load`, or (params, config); of a family that is trained on blanks.
        texts: One text or a list, each with [MASK] for every blank (or [sMASK], [gMASK], for models that distinguish
            blanks of sentences and of the rest of a text). A text may be a list of token ids with the mask ids of the
            config; ids are read as they are.
        max_new_tokens: Greatest number of new tokens for each blank; None is as many as fit into the context, up to
            128. Like the next four, one value, or one a text.
        temperature: Divisor of the logits; 0 is greedy, 1 or None is off.
        top_k: Number of most probable tokens to sample from; 0 or None is off.
        top_p: Probability of the nucleus to sample from; 1 or None is off.
        seed: Seed of the random stream.
        stop: Strings that end an answer and are not part of it; see `generate`.
        end_tokens: Ids of the tokens that end an answer; None takes all that the model's files give, see `generate`.
        transform: Transform of the logits, see `generate`.
        search: `gx.beam` or `gx.diverse_beam`: the answer to each blank is the best sequence that the search finds. Or
            `gx.best_of(n)`: the text is filled n times, and the answers with the greatest mean log-probability are
            kept, all from one of the n; this mean is the `score` of each answer.
        order: "text" fills the blanks from left to right. "confidence" always fills the one next whose answer has the
            most certain first token, that is, whose most probable first token is the most probable of all.
        **knobs: Further sampling parameters, see `generate`.

    Returns:
        The Filled of a single text, or the list of those of a list.

    Raises:
        TypeError: The model is not trained on blanks, or `texts` is neither texts nor token ids.
        ValueError: A text without a blank, or an error of `generate`.
        FloatingPointError: The logits are not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("glm-tiny", layers=1, width=32, heads=2)
        >>> params = gx.unstack(gx.init(config, jax.random.key(0)))
        >>> one = [config.cls, 50, config.mask, 60, config.eos]
        >>> two = [config.cls, config.mask, 70, config.mask, config.eos]
        >>> filled = gx.fill((params, config), [one, two], max_new_tokens=3)
        >>> [len(text.spans) for text in filled]
        [1, 2]
    """
    texts, single = prompt_list(texts)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, **knobs}
    filled = exhaust(_fill(model, texts, max_new_tokens, knobs, stop, end_tokens, None, transform, search, order))
    return filled[0] if single else filled


def fill_stream(
    model: ModelLike,
    text: Prompt,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    end_tokens: int | Sequence[int] | None = None,
    transform: Transform | None = None,
    every: int = 4,
    **knobs: Any,
) -> Generator[str, None, Filled]:
    """Fills the blanks of one text and yields the whole text piece by piece, from its beginning.

    The words between two blanks are yielded as soon as the first of the two is filled. The pieces together are the text
    of `fill`.

    Args:
        model: See `fill`.
        text: A text with blanks, or a list of token ids.
        max_new_tokens: See `fill`, like the arguments up to `transform`.
        temperature: Divisor of the logits.
        top_k: Number of most probable tokens to sample from.
        top_p: Probability of the nucleus to sample from.
        seed: Seed of the random stream.
        stop: Strings that end an answer.
        end_tokens: Ids that end an answer.
        transform: Transform of the logits.
        every: Number of tokens between two pieces.
        **knobs: Further sampling parameters.

    Returns:
        A generator of pieces, whose return value is the Filled.

    Raises:
        TypeError: The model is not trained on blanks; raised by the call itself, before the first piece, like
            ValueError.
        ValueError: See `fill`.
        FloatingPointError: The logits are not finite; raised by the generator.

    Example:
        >>> import jax, garrulax as gx
        >>> from garrulax.hub.tokenizers import GLM_SPECIALS, ByteTokenizer
        >>> ids = dict(eos=256, pad=256, cls=257, mask=258, sop=261, eop=262)
        >>> config = gx.preset("glm-tiny", layers=1, width=32, heads=2, vocab=264, **ids)
        >>> model = gx.Model(config, gx.init(config, jax.random.key(0)), ByteTokenizer(GLM_SPECIALS))
        >>> pieces = list(gx.fill_stream(model, "It is [MASK].", max_new_tokens=6, every=2))
        >>> pieces[0], "".join(pieces) == gx.fill(model, "It is [MASK].", max_new_tokens=6).text
        ('It is', True)
    """
    texts, single = prompt_list(text)
    if not single:
        raise ValueError(f"fill_stream takes one text, not {len(texts)}: fill takes several")
    check_every(every)
    if wrong := sorted({"search", "order"} & knobs.keys()):
        raise ValueError(f"fill_stream samples from left to right and has no {wrong[0]}: use fill")
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, **knobs}
    return first_row(_fill(model, texts, max_new_tokens, knobs, stop, end_tokens, every, transform))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def start_next_blank(params: Tree, state: State, position: jax.Array, limit: jax.Array, config: ModelConfig) -> State:
    """Prepares the state for the next blank of each row, whose answer stays behind the answers so far.

    Args:
        params: In the form of the state's cache.
        state: After the answers to the previous blanks, with a free slot in each row. It is donated.
        position: int32 [B, 2], position of the next [sop].
        limit: int32 [B], greatest number of new tokens; 0 for a row without a further blank.
        config: The family's Config.

    Returns:
        The state before the first token of the next answers.
    """
    params = half.from_bits(params)
    # Later tokens do not attend to the token that ended an answer, as in training. The last token of an answer that was
    # cut off belongs to the answer; no step has read it yet, so it is read here.
    cut_off = ~jnp.any(state.token[:, None] == state.ends, axis=1)  # [B]
    _, cache = read(params, state, state.token[:, None], config)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(cache, used=jnp.where(cut_off, cache.used, state.cache.used)),
        token=jnp.full_like(state.token, blanks_of(config).sop),
        position=position,
        length=state.length + 1,
        limit=limit,
        generated=jnp.zeros_like(state.generated),
        done=limit < 1,
    )


def _fill(
    model: ModelLike,
    texts: list[Prompt],
    max_new_tokens: Any,
    knobs: dict[str, Any],
    stop: str | Sequence[str],
    end_tokens: int | Sequence[int] | None,
    every: int | None,
    transform: Transform | None,
    search: BeamSearch | BestOf | None = None,
    order: str = "text",
) -> Pieces[list[Filled]]:
    """Checks the arguments at once; returns a generator that fills, `every` steps at a time (None: all at once)."""
    if without := sorted(NOT_IN_FILL.keys() & knobs.keys()):
        raise ValueError(f"fill has no argument {without[0]!r}: {NOT_IN_FILL[without[0]]}")
    weights, config, tokenizer = prepare_model(model)
    if weights.mesh is not None:
        check_mesh({"search": None if isinstance(search, BestOf) else search})
    blanks = blanks_of(config)
    stops = StopStrings(stop, tokenizer)
    ends = ends_of(model, config, tokenizer, end_tokens)
    transform = without_padding(chain_for(transform, knobs), config, tokenizer, ends)
    decoder = Decoder(config, transform)
    values = knobs_per_prompt(len(texts), vocab=config.vocab, max_new_tokens=max_new_tokens, **knobs)
    check_fill(search, order, values.get("guidance_scale", ()))
    parts = [part_a(text, config, tokenizer, f"text {i}") for i, text in enumerate(texts)]
    limits, first_prompts = [], []
    for i, (part, limit) in enumerate(zip(parts, values["max_new_tokens"], strict=True)):
        count = len(part.mask_indices)
        limits.append(answer_tokens(len(part.ids), 0, limit, config, blanks, f"text {i}", count))
        first_prompts.append(answer_prompt(part.ids, part.mask_indices[0], limits[-1], config, f"text {i}"))
    check_least(values, limits, "text")
    if search is not None:
        check(search, config, values["temperature"], limits, stops, values.get("watermark", ()))
    if isinstance(search, BestOf):
        first_prompts, values = copied(search, first_prompts, values)
        parts, limits = repeated(parts, search.n), repeated(limits, search.n)
    rounds = max(len(part.mask_indices) for part in parts)
    # Where answers stay behind the text, a later answer needs its own slots and one for its [sop].
    more = 0 if blanks.insert_answers else (rounds - 1) * (max(limits) + 1)
    # With stop strings, check after each token: tokens sampled past the stop string must not enter the cache.
    check_every = 1 if stops else every or max(limits)

    def steps():
        answers: list[dict[int, Writer]] = [{} for _ in parts]
        state, size = None, 0
        for number in range(rounds):
            open_blanks = [
                [blank for blank in range(len(part.mask_indices)) if blank not in one]
                for part, one in zip(parts, answers, strict=True)
            ]
            chosen = [blanks_left[0] if blanks_left else None for blanks_left in open_blanks]
            blank_limits = [0 if blank is None else limit for blank, limit in zip(chosen, limits, strict=True)]
            if state is None or blanks.insert_answers:
                prompts = [
                    prompt if blank is None else _prompt_with_answers(part, one, blank, config)
                    for part, one, blank, prompt in zip(parts, answers, chosen, first_prompts, strict=True)
                ]
                requests = assemble(prompts, {**values, "max_new_tokens": blank_limits}, config, ends, transform)
                size = size_of(requests, decoder.buckets, more)
                state = start(decoder, weights, requests, size)
            else:
                position, limit = _next_blanks(parts, blank_limits, chosen, len(state.done), blanks)
                state = start_next_blank(weights.step, with_free_slots(state, 1, size), position, limit, config)
            if order == "confidence":
                chosen, state = _most_certain(weights, state, parts, answers, open_blanks, config)
            yield _literals(parts, number)
            spaces = [blank is not None and part.space_before[blank] for part, blank in zip(parts, chosen, strict=True)]
            if not isinstance(search, BeamSearch):
                writers = {
                    i: Writer(tokenizer, limit, ends, stops, space_before=space)
                    for i, (limit, space) in enumerate(zip(blank_limits, spaces, strict=True))
                }
                state = yield from decode_pieces(decoder, weights.step, state, writers, check_every, size)
            else:
                keep = not blanks.insert_answers and number + 1 < rounds
                found, state = beam_answers(
                    search, decoder, weights, state, blank_limits, ends, tokenizer, spaces, keep
                )
                writers = dict(enumerate(found))
            for i, blank in enumerate(chosen):
                if blank is not None:
                    answers[i][blank] = writers[i]
        yield _literals(parts, rounds)
        filled = [_filled(part, one) for part, one in zip(parts, answers, strict=True)]
        return _best_samples(filled, search.n) if isinstance(search, BestOf) else filled

    return each_using(weights.mesh, steps())


def _most_certain(
    weights: Weights,
    state: State,
    parts: Sequence[PartA],
    answers: Sequence[Mapping[int, Writer]],
    open_blanks: Sequence[Sequence[int]],
    config: ModelConfig,
) -> tuple[list[int | None], State]:
    """The open blank of each text whose answer has the most certain first token, and the state before that token."""
    blanks, width = blanks_of(config), bucket(max(map(len, open_blanks)))
    places = np.zeros((len(state.done), blanks.rows, width, 2), np.int32)  # of the start token and of the next one
    for row, (part, one, numbers) in enumerate(zip(parts, answers, open_blanks, strict=True)):
        ids, masks = _insert_answers(part, one) if blanks.insert_answers else (part.ids, part.mask_indices)
        for column, blank in enumerate(numbers):
            places[row, :, column] = blanks.positions(ids, masks[blank], 2)[:, -2:]
    if blanks.rows == 1:
        places = places[:, 0]
    state = with_slots(state, width)
    values = np.asarray(certainties(weights.step, state, places[..., 0], config))
    chosen: list[int | None] = []
    position, stride = np.array(state.position), np.array(state.stride)
    for row, numbers in enumerate(open_blanks):
        column = int(values[row, : len(numbers)].argmax()) if numbers else 0
        chosen.append(numbers[column] if numbers else None)
        position[row] = places[row, ..., column, 0]
        stride[row] = places[row, ..., column, 1] - position[row]
    return chosen, dataclasses.replace(state, position=jnp.asarray(position), stride=jnp.asarray(stride))


def _literals(parts: list[PartA], blank: int) -> list[str]:
    """The text before blank `blank` of each text, or after its last blank; "" if there is neither."""
    return [part.literals[blank] if blank < len(part.literals) else "" for part in parts]


def _next_blanks(
    parts: Sequence[PartA], limits: Sequence[int], chosen: Sequence[int | None], rows: int, blanks: Blanks
) -> tuple[np.ndarray, np.ndarray]:
    """`position` and `limit` of `start_next_blank`, padded to the rows of the batch."""
    position, limit = np.zeros((rows, blanks.rows), np.int32), np.zeros(rows, np.int32)
    limit[: len(limits)] = limits
    for row, (part, blank) in enumerate(zip(parts, chosen, strict=True)):
        if blank is not None:
            position[row] = blanks.positions(part.ids, part.mask_indices[blank], 1)[:, -1]
    return position, limit


def _prompt_with_answers(part: PartA, answers: Mapping[int, Writer], blank: int, config: ModelConfig) -> EncodedPrompt:
    """The text with the answers so far in place of their masks, followed by the sop of the next answer."""
    ids, masks = _insert_answers(part, answers)
    # An answer of n tokens used n random numbers. It adds n - 1 ids (its mask is gone), or n - 2 if it ended with eop.
    random_offset = sum(1 + (answer.reason == "eos") for answer in answers.values())
    return answer_prompt(ids, masks[blank], 1, config, "the text")._replace(random_offset=random_offset)


def _insert_answers(part: PartA, answers: Mapping[int, Writer]) -> tuple[list[int], list[int]]:
    """Ids of the text with answers, without the tokens that ended them, in place of their masks.

    Returns:
        The ids, and the index in them of each mask, or of the answer that stands there.
    """
    ids, masks, end = [], [], 0
    for blank, index in enumerate(part.mask_indices):
        ids += part.ids[end:index]
        masks.append(len(ids))
        if blank in answers:
            tokens = answers[blank].tokens
            ids += tokens[: len(tokens) - (answers[blank].reason == "eos")]
        else:
            ids.append(part.ids[index])
        end = index + 1
    return ids + part.ids[end:], masks


def _filled(part: PartA, answers: Mapping[int, Writer]) -> Filled:
    text, in_order = part.literals[0], [answers[blank] for blank in range(len(part.mask_indices))]
    for answer, literal in zip(in_order, part.literals[1:], strict=True):
        text += answer.streamed + literal
    spans = [answer.completion() for answer in in_order]
    return Filled(_insert_answers(part, answers)[0], None if spans[0].text is None else text, spans)


def _best_samples(samples: Sequence[Filled], n: int) -> list[Filled]:
    """The best of the n samples of each text, by the mean log-probability of the tokens of all its answers."""
    scored = [
        dataclasses.replace(one, spans=[dataclasses.replace(span, score=mean_logprob(one.spans)) for span in one.spans])
        for one in samples
    ]
    return [max(scored[i : i + n], key=lambda one: one.spans[0].score or 0.0) for i in range(0, len(scored), n)]
