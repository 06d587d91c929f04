"""The arguments of `generate` and `fill`: checks, and the arrays with which decoding begins. Runs on the host only."""

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax import models
from garrulax.core import auto_mesh, half
from garrulax.core.config import ModelConfig
from garrulax.core.spec import Tree
from garrulax.kernels.mask import PAD
from garrulax.models.unpack import ModelLike, TokenizerLike, unpack_model
from garrulax.sampling.buckets import POWERS_OF_TWO, Buckets, bucket
from garrulax.sampling.ends import end_tokens
from garrulax.sampling.knobs import REQUEST_KNOBS, knob_arrays
from garrulax.sampling.state import Requests
from garrulax.sampling.transforms import DEFAULT, Transform, chain, only, standard_chain

MOST_NEW_TOKENS = 128  # without an explicit number
LONGEST = 2**30  # tokens of a text: their numbers, and sums of these, are int32
Prompt = str | Sequence[int]


class EncodedPrompt(NamedTuple):
    """The token ids of a prompt, and how the model reads them. R is the number of rows of positions (1 or 2).

    Attributes:
        ids: Token ids. The first new token follows the last of them.
        prefix: Number of leading tokens that attend to one another (a text with blanks). Each later token attends to
            the tokens before it.
        positions: int32 [R, len(ids)].
        stride: int32 [R], increase of the position from the last token to the first new one, and from each to the next.
        limit: Greatest number of new tokens.
        random_offset: Offset into the row's random stream: random numbers already used by earlier blanks, besides one
            for each token of `ids`.
        conditional: With classifier-free guidance, of the prompt without the condition: the one with it, which both
            continue with the same tokens.
    """

    ids: list[int]
    prefix: int
    positions: np.ndarray
    stride: np.ndarray
    limit: int = 0
    random_offset: int = 0
    conditional: "EncodedPrompt | None" = None

    @property
    def token(self) -> int:
        """The last token, with which decoding begins."""
        return self.ids[-1]

    @property
    def position(self) -> np.ndarray:
        """Position of the last token: int32 [R]."""
        return self.positions[:, -1]


class Weights(NamedTuple):
    """The parameters of one model in the forms that decoding takes.

    Attributes:
        prefill: As they were given. Stacked ones compile in a time that does not grow with depth.
        step: Unstacked, which decodes fastest. On a CPU they lie in the same memory.
        requests: `prefill` of each request, where requests have different adapters; empty otherwise.
    """

    prefill: Tree
    step: Tree
    requests: tuple[Tree, ...] = ()

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh on which they are, in Auto mode; None on one device."""
        return auto_mesh.mesh_of(self.step)

    def of(self, request: int) -> Tree:
        """The parameters with which a request is read."""
        return self.requests[request] if self.requests else self.prefill


Prepared = tuple[Weights, ModelConfig, TokenizerLike | None]


def prepare_model(model: ModelLike) -> Prepared:
    """Returns the parameters, the configuration and the tokenizer (or None) of a model.

    On CPUs bfloat16 parameters become their bits (`core.half.as_bits`), which `prefill` and `decode_steps` take too.
    Abstract parameters, for which programs can be compiled, give abstract ones.

    Raises:
        TypeError: `model` is neither the result of `garrulax.load` nor (params, config).
        ValueError: The parameters are on several devices, and not on one mesh without the axis `pipeline`.
    """
    params, config, tokenizer = unpack_model(model)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
        step = half.as_bits(jax.eval_shape(models.unstack, params), stacked=False)
        return Weights(half.as_bits(params), step), config, tokenizer
    mesh = auto_mesh.mesh_of(params)
    with auto_mesh.using(mesh):
        params = auto_mesh.in_auto_mode(jax.tree.map(jnp.asarray, params), mesh)
        return Weights(half.as_bits(params), half.as_bits(models.unstack(params), stacked=False)), config, tokenizer


def check_mesh(given: Mapping[str, Any]) -> None:
    """Raises ValueError if there is one of these arguments (name -> value), which do not go with a mesh."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name} runs on one device, but the parameters are on several: leave it out, or gather them with "
                "jax.device_get(params)"
            )


def chain_for(transform: Transform | None, knobs: Iterable[str]) -> Transform:
    """Returns `transform`, or for None the standard chain of the transforms that read these knobs.

    Raises:
        TypeError: `transform` is something else.
        ValueError: A name that no transform reads.
    """
    if transform is not None:
        check_transform(transform)
    return transform or standard_chain(name for name in knobs if name not in REQUEST_KNOBS)


def check_transform(transform: Any) -> None:
    """Raises TypeError unless it is a transform."""
    if not isinstance(transform, Transform):
        raise TypeError(f"transform={transform!r:.60} must be a sampling.transforms.Transform: call its function, and "
                        "make one of several by chain(...)")  # fmt: skip


def without_padding(
    transform: Transform, config: ModelConfig, tokenizer: TokenizerLike | None, ends: Sequence[int]
) -> Transform:
    """Returns `transform` after one that leaves out the rows which only pad the model's embedding.

    A vocabulary may be padded to a round number. The rows from the tokenizer's size on stand for no token; a model that
    was trained never chooses them, but an untrained one does. End tokens stay, wherever they are.
    """
    if tokenizer is None or tokenizer.vocab >= config.vocab:
        return transform
    return chain(only(tokenizer.vocab, tuple(sorted(i for i in ends if i >= tokenizer.vocab))), transform)


def prompt_list(prompts: Any) -> tuple[list[Prompt], bool]:
    """Returns (a list of prompts, whether `prompts` was a single one).

    Raises:
        TypeError: `prompts` is neither a text nor a sequence.
        ValueError: There is no prompt.
    """
    if isinstance(prompts, str):
        return [prompts], True
    ordered = isinstance(prompts, Iterable) and not isinstance(prompts, Mapping | Set)
    if not ordered or getattr(prompts, "ndim", 1) == 0:
        raise TypeError(f"a prompt is a text or a list of token ids, not {prompts!r:.60}: give one, or a list of them")
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else list(prompts)
    if not prompts:
        raise ValueError("there is no prompt: give a text, a list of token ids, or a list of either")
    if not any(isinstance(p, str) or np.ndim(p) for p in prompts):
        return [prompts], True
    return prompts, False


def token_ids(prompt: Prompt, tokenizer: TokenizerLike | None, name: str) -> list[int]:
    """Returns the ids of a text, or the given ids as integers. `name` is the prompt's name in errors.

    Raises:
        ValueError: A text without a tokenizer, or an element that is not an integer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is a text but the model has no tokenizer: give token ids")
        return list(tokenizer.encode(prompt))
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"{name} must be a text or a list of token ids, not {prompt!r:.60}") from None


def check_every(every: Any) -> None:
    """Raises ValueError unless `every`, a number of steps between two pieces, is a whole number of at least 1."""
    if isinstance(every, bool) or not hasattr(every, "__index__") or every < 1:
        raise ValueError(f"every={every!r:.40} must be a whole number of at least 1")


def check_least(knobs: Mapping[str, Sequence[Any]], limits: Sequence[int], name: str = "prompt") -> None:
    """Raises ValueError if more new tokens are demanded than are allowed.

    Args:
        knobs: From `knobs_per_prompt`.
        limits: Greatest number of new tokens of each prompt.
        name: What a prompt is called in errors.
    """
    for i, (least, most) in enumerate(zip(knobs.get("min_new_tokens", ()), limits, strict=False)):
        if least > most:
            raise ValueError(
                f"{name} {i} is to get at least min_new_tokens={least} and at most max_new_tokens={most} new tokens: "
                "lower the first or raise the second"
            )


def check_ids(ids: list[int], config: ModelConfig, name: str) -> None:
    """Raises ValueError for an empty list and for an id outside the vocabulary."""
    if not ids:
        raise ValueError(f"{name} is empty: give at least one token")
    wrong = [token for token in ids if not 0 <= token < config.vocab]
    if wrong:
        raise ValueError(f"{name} has token id {wrong[0]}: this model's ids are 0 to {config.vocab - 1}")


def new_tokens(
    size: int, limit: int | None, config: ModelConfig, name: str, blanks: int = 1, endless: bool = False
) -> int:
    """Returns the greatest number of new tokens, for each of `blanks`, after a prompt of `size` tokens.

    Args:
        size: Number of tokens of the prompt.
        limit: The number that is asked for; None is as many as fit, up to `MOST_NEW_TOKENS`.
        config: The family's Config.
        name: Name of the prompt in errors.
        blanks: Number of blanks that share the context.
        endless: Whether the text may be longer than the context, since the cache counts positions.

    Raises:
        ValueError: The prompt and the new tokens do not fit into the model's context, or are more than `LONGEST`.
    """
    if endless:
        limit = MOST_NEW_TOKENS if limit is None else limit
        if size + limit > LONGEST:
            raise ValueError(
                f"{name} has {size} tokens and {limit} new ones are asked for, but no text may have more than "
                f"{LONGEST:,}: lower max_new_tokens"
            )
        return limit
    if limit is None:
        if size + blanks > config.max_length:
            raise ValueError(
                f"{name} has {size} tokens, which leaves no space in the model's context of {config.max_length}: "
                "shorten the prompt"
            )
        return min(MOST_NEW_TOKENS, (config.max_length - size) // blanks)
    if size + limit * blanks > config.max_length:
        raise ValueError(
            f"{name} has {size} tokens and {limit * blanks} new ones are asked for, but the model's context is "
            f"{config.max_length}: shorten the prompt or lower max_new_tokens"
        )
    return limit


def causal_prompt(
    ids: list[int], limit: int | None, config: ModelConfig, name: str, endless: bool = False
) -> EncodedPrompt:
    """Returns a prompt that is read causally, as `garrulax.forward` does by default.

    Raises:
        ValueError: An id is outside the vocabulary, or the prompt and `limit` new tokens do not fit into the context.
    """
    check_ids(ids, config, name)
    limit = new_tokens(len(ids), limit, config, name, endless=endless)
    blanks = models.blanks(config)
    rows = 1 if blanks is None else blanks.rows
    positions, stride = np.zeros((rows, len(ids)), np.int32), np.zeros(rows, np.int32)
    positions[0], stride[0] = np.arange(len(ids)), 1
    return EncodedPrompt(ids, 0, positions, stride, limit)


def assemble(
    prompts: Sequence[EncodedPrompt],
    knobs: Mapping[str, Sequence[Any]],
    config: ModelConfig,
    ends: Sequence[int] | None = None,
    transform: Transform = DEFAULT,
    buckets: Buckets = POWERS_OF_TWO,
) -> Requests:
    """Puts prompts into the arrays of one batch. The context length is rounded up to a bucket.

    Args:
        prompts: At least one.
        knobs: From `knobs_per_prompt`, with max_new_tokens and seed.
        config: The family's Config.
        ends: Ids of the tokens that end a row; None takes those of the config.
        transform: The transform that will read the knobs.
        buckets: The sizes for which programs are compiled.

    Returns:
        The inputs of `prefill`, as NumPy arrays.

    Raises:
        ValueError: A knob that the transform does not read, or lacks.
    """
    ends = end_tokens(config) if ends is None else ends
    rows = len(prompts)
    texts = [prompt.conditional or prompt for prompt in prompts]
    width = buckets.of("prompt", max(len(prompt.ids) - 1 for prompt in (*prompts, *texts)) or 1)  # P
    R = len(prompts[0].stride)
    axes = (R,) if R > 1 else ()

    def column(values: Iterable[Any], dtype: Any = np.int32) -> Any:
        return np.array(list(values), dtype)

    def position_column(values: Iterable[Any]) -> Any:  # [B] or [B, 2]
        return column(values).reshape(rows, *axes)

    def full(value: int, *shape: int) -> Any:
        return np.full(shape, value, np.int32)

    context, rank, segment = full(0, rows, width), full(0, rows, width), full(PAD, rows, width)
    positions, text = full(0, rows, *axes, width), full(PAD, rows, width + 1)
    for row, prompt in enumerate(prompts):
        size = len(prompt.ids) - 1  # all tokens but the last, which the first step of decoding reads
        context[row, :size] = prompt.ids[:-1]
        segment[row, :size] = 0
        positions[row, ..., :size] = prompt.positions[:, :-1].reshape(*axes, size)
        rank[row, prompt.prefix :] = np.arange(prompt.prefix, width)
        text[row, : len(texts[row].ids)] = texts[row].ids
    return Requests(
        context=context,
        segment=segment,
        rank=rank,
        positions=positions,
        token=column(prompt.token for prompt in prompts),
        position=position_column(prompt.position for prompt in prompts),
        stride=position_column(prompt.stride for prompt in prompts),
        length=column(len(one.ids) + one.random_offset for one in texts),
        limit=column(knobs["max_new_tokens"]),
        seed=column(knobs["seed"], np.uint32),
        ends=column([[*ends, *[PAD] * (bucket(len(ends), least=8) - len(ends))]] * rows),
        prompt=text,
        unconditional=column((prompt.conditional is not None for prompt in prompts), bool),
        knobs=knob_arrays(transform, knobs, rows),
    )


def of_one_context(requests: Requests, rows: Sequence[int], buckets: Buckets = POWERS_OF_TWO) -> Requests:
    """Some rows of a batch, which share a context; it is cut to the bucket of its own length.

    What they are does not depend on the other rows.
    """
    some: Requests = jax.tree.map(lambda x: np.asarray(x)[np.array(rows)], requests)
    P, text = (
        buckets.of("prompt", max(1, int((x != PAD).sum(axis=1).max()) - last))
        for x, last in ((some.segment, 0), (some.prompt, 1))
    )
    return dataclasses.replace(
        some,
        context=some.context[:1, :P],
        segment=some.segment[:1, :P],
        rank=some.rank[:1, :P],
        positions=some.positions[:1, ..., :P],
        prompt=some.prompt[:, : text + 1],
    )


def after(
    requests: Requests, row: int, known: int, prompt: int | None = None, buckets: Buckets = POWERS_OF_TWO
) -> Requests:
    """One row of a batch without the first tokens of its context.

    Args:
        requests: From `assemble`.
        row: The row.
        known: Number of tokens to leave out.
        prompt: Width of `prompt`, so that its shape does not depend on the length; None is its bucket.
        buckets: The sizes for which programs are compiled.
    """
    one = of_one_context(requests, [row], buckets)
    P = buckets.of("prompt", max(1, int((one.segment != PAD).sum()) - known))

    def rest(x: Any, fill: int) -> Any:
        part = np.asarray(x)[..., known : known + P]
        return np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, P - part.shape[-1])], constant_values=fill)

    text: Any = np.asarray(one.prompt)
    width = text.shape[1] if prompt is None else prompt
    text = np.pad(text, [(0, 0), (0, width)], constant_values=PAD)[:, :width]
    return dataclasses.replace(
        one,
        context=rest(one.context, 0),
        segment=rest(one.segment, PAD),
        rank=rest(one.rank, 0),
        positions=rest(one.positions, 0),
        prompt=text,
    )
