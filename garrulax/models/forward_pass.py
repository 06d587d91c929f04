"""Initial parameters and the forward pass of every family."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from garrulax.core import sharding, spec
from garrulax.core.blanks import Blanks
from garrulax.core.config import ModelConfig
from garrulax.core.dtypes import at_least_float32, parameter_dtype
from garrulax.core.einsum import whole_tokens
from garrulax.core.leaf import dtype_of
from garrulax.core.strategies import Strategy
from garrulax.kernels.mask import Mask
from garrulax.layers import host_memory
from garrulax.layers.cache import Cache, make_cache, with_memory_kinds
from garrulax.layers.cache_kinds import FULL, Full, Kind, LayerWindows, Window
from garrulax.layers.call import Call, default_positions, mask_and_cache, slots_of, window_slots_of
from garrulax.models import pipeline
from garrulax.models.registry import family


@functools.lru_cache(maxsize=256)
def parameters(config: ModelConfig) -> spec.Tree:
    """The ParamSpec tree of a Config."""
    return family(config).parameters(config)


def blanks(config: ModelConfig) -> Blanks | None:
    """How the models of a Config read and fill blanks; None for families that only continue texts."""
    return family(config).blanks(config)


def count(config: ModelConfig) -> int:
    """Number of parameters; tied tensors count once. Nothing is allocated.

    Example:
        >>> import garrulax as gx
        >>> gx.count(gx.preset("gpt2"))
        124439808
    """
    return spec.count(parameters(config))


def init(
    config: ModelConfig,
    key: jax.Array,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    strategy: str | Strategy = "fsdp+tp",
    strict: bool = False,
) -> spec.Tree:
    """Initial parameters.

    Args:
        config: The configuration of a model.
        key: PRNG key.
        mesh: Mesh over which the parameters are sharded from the start; None is one device.
        dtype: Of the parameters.
        strategy: A name in `core.strategies.STRATEGIES`, or a strategy of your own; used only with a mesh.
        strict: Whether to refuse what stays whole against the strategy (`core.sharding.unsharded`).

    Returns:
        Nested dicts of arrays; the layers are stacked on the leading axis of everything under `blocks`.

    Raises:
        ValueError: The mesh does not divide a dimension and `strict` is set, or `dtype` is no dtype of parameters.

    Example:
        >>> import jax, garrulax as gx
        >>> params = gx.init(gx.preset("gpt2-tiny"), jax.random.key(0))
        >>> params["tokens"].shape, params["blocks"]["mlp"]["up"].shape
        ((4096, 128), (4, 128, 512))
    """
    dtype = parameter_dtype(dtype)
    if mesh is None:
        return _init_on_one_device(key, config, dtype)
    places = sharding.shardings(parameters(config), mesh, strategy, strict=strict)
    return jax.jit(_init, static_argnums=(1, 2), out_shardings=places)(key, config, dtype)


def _init(key: jax.Array, config: ModelConfig, dtype: Any) -> spec.Tree:
    return spec.init(parameters(config), key, dtype)


_init_on_one_device = jax.jit(_init, static_argnums=(1, 2))  # compiled once a configuration


def forward(
    params: spec.Tree,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: str = "none",
    unroll: bool = False,
    group: int = 0,
    context_parallel: str | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Logits of tokens, and the cache with the tokens in it.

    It works under jit, grad and vmap with `config` static; with a cache in the memory of the host, not under grad.

    Args:
        params: Parameters as from `init` or `load`, or their `unstack`ed form.
        tokens: int32 [B, T]; an id outside the vocabulary gives NaN.
        config: The configuration of the model.
        positions: int32 [B, T]; for the original GLM and ChatGLM-6B [B, 2, T], place in the text and place in the
            answer. Default 0, 1, 2, ..., continued from the cache.
        mask: Who attends to whom (`garrulax.kernels.masks`); default causal. With a cache, it has the streams of the
            new tokens, and of the cache's slots only those that the cache does not keep (`masks.tree`).
        cache: From `cache_for`, or returned by an earlier call; None for a pass without a cache.
        key: PRNG key for dropout; None for no dropout.
        remat: What the backward pass recomputes: "none", "dots" or "full".
        unroll: Whether the loop over layers becomes straight code.
        group: For training on long texts: tokens of a group of LongLoRA's shifted attention; 0 attends to everything.
        context_parallel: On a mesh with the axis `sequence`, how queries get the keys of other devices: "gather" or
            "ring"; None is the cheaper one.

    Returns:
        Logits [B, T, V] in the dtype of the parameters, and the cache (None without one).

    Raises:
        TypeError: `config` is not a Config, or `mask` not a Mask.
        ValueError: Parameters, shapes, cache or remat do not fit.

    Example:
        >>> import jax, jax.numpy as jnp, garrulax as gx
        >>> config = gx.preset("gpt2-tiny")
        >>> params = gx.init(config, jax.random.key(0))
        >>> logits, _ = gx.forward(params, jnp.array([[1, 2, 3]]), config)
        >>> logits.shape
        (1, 3, 4096)
    """
    module = family(config)
    spec.check_params(parameters(config), params)
    x, cache = hidden(
        params, tokens, config, positions=positions, mask=mask, cache=cache, key=key, remat=remat, unroll=unroll,
        group=group, context_parallel=context_parallel,
    )  # fmt: skip
    return module.logits(params, x, config), cache


def hidden(
    params: spec.Tree,
    tokens: jax.Array,
    config: ModelConfig,
    *,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: str = "none",
    unroll: bool = False,
    group: int = 0,
    context_parallel: str | None = None,
) -> tuple[jax.Array, Cache | None]:
    """Hidden states [B, T, D] after the last norm, and the cache.

    Arguments and errors as in `forward`; the parameters need no output head.
    """
    module = family(config)
    if not hasattr(tokens, "shape"):
        raise ValueError(f"tokens must be an array of integers [batch, length], not a {type(tokens).__name__}")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [batch, length], not {tokens.dtype} {tokens.shape}")
    spec.check_params(_without_head(parameters(config)), _without_head(params))
    _check_mask(mask)
    rows = _position_rows(config)
    if cache is not None and len(cache.planned) != len(tokens):
        raise ValueError(f"a cache of {len(cache.planned)} rows does not fit tokens of {len(tokens)}")
    cache = None if cache is None else with_memory_kinds(cache)
    positions = default_positions(tokens, cache, rows) if positions is None else positions
    _check_positions(positions, tokens, rows)
    mask, cache_now = mask_and_cache(tokens, positions[:, 0] if rows == 2 else positions, mask, cache)
    mask = jax.tree.map(whole_tokens, mask)
    slot = None if cache is None else slots_of(cache, mask.query)
    window_slot = None if cache is None else window_slots_of(cache, mask.query)
    call = Call(
        tokens, positions, mask, cache_now, slot, key, remat, unroll, group=group, context_parallel=context_parallel,
        window_slot=window_slot,
    )  # fmt: skip
    if pipeline.stages(params) > 1:
        x = pipeline.pipelined(module, params, call, config)
    else:
        x, cache_now = module.hidden(params, call, config)
    return (module.norm(x, params["norm"], config) if "norm" in params else x), cache_now


def _without_head(tree: spec.Tree) -> spec.Tree:
    return {name: part for name, part in tree.items() if name != "head"}


def _position_rows(config: ModelConfig) -> int:
    conventions = blanks(config)
    return 1 if conventions is None else conventions.rows


def _check_mask(mask: Any) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a garrulax.Mask, not {type(mask).__name__}: for an array that is true where tokens are "
            "real, give garrulax.kernels.masks.padded(array)"
        )


def _check_positions(positions: jax.Array, tokens: jax.Array, rows: int) -> None:
    if not hasattr(positions, "shape"):
        raise ValueError(f"positions must be an array of integers, not a {type(positions).__name__}")
    batch, length = tokens.shape
    inner = (2, length) if rows == 2 else (length,)
    if positions.shape not in ((batch, *inner), (1, *inner)):
        wanted = "[batch, 2, length]" if rows == 2 else "[batch, length]"
        raise ValueError(f"positions must be {wanted}, not {positions.shape} for tokens {tokens.shape}")
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers, not {positions.dtype}")


def cache_for(
    params: spec.Tree,
    config: ModelConfig,
    batch: int,
    size: int,
    *,
    like: jax.Array | None = None,
    kind: Kind = FULL,
) -> Cache:
    """An empty cache in the form (stacked or not) and dtype of the parameters; on a CPU at least float32.

    Args:
        params: Parameters of the model.
        config: Its configuration.
        batch: Number of rows.
        size: Number of slots, one a token; a ring has its own number.
        like: On a mesh, tokens [B, T] whose batch sharding the cache takes.
        kind: Which tokens are kept (`gx.window`, `gx.sinks`, `gx.blocks`); the default is all.

    Raises:
        ValueError: The family cannot have a cache of this kind (`check_cache`).

    Example:
        >>> import jax, jax.numpy as jnp, garrulax as gx
        >>> config = gx.preset("gpt2-tiny")
        >>> params = gx.init(config, jax.random.key(0))
        >>> cache = gx.cache_for(params, config, batch=1, size=16)
        >>> logits, cache = gx.forward(params, jnp.array([[1, 2, 3]]), config, cache=cache)
        >>> cache.used.tolist()
        [3]
    """
    blocks = params["blocks"]
    check_cache(config, kind)
    return make_cache(
        config.layers,
        batch,
        kind.slots(size),
        config.kv_heads,
        config.head_dim,
        cache_dtype(dtype_of(blocks)),
        stacked=not isinstance(blocks, tuple),
        like=like,
        kind=kind,
    )


def cache_dtype(dtype: Any) -> np.dtype:
    """The dtype of keys and values for parameters of `dtype`: on a CPU at least float32.

    XLA:CPU multiplies float16 as float32, and to write one token into an array of bfloat16 it converts all of it, with
    several rows to float32 and back. The steps of decoding would hold the whole cache a second time, in float32.
    """
    return at_least_float32(dtype) if jax.default_backend() == "cpu" else jnp.dtype(dtype)


def check_cache(config: ModelConfig, kind: Kind) -> None:
    """Checks that a model can have a cache of this kind.

    Raises:
        ValueError: It cannot; the message says why.
    """
    name = family(config).__name__.rpartition(".")[2]
    if kind.name != "full" and blanks(config) is not None:
        raise ValueError(
            f"{name} fills blanks, whose tokens attend to later ones: it has no cache of kind {kind.name!r}: use 'full'"
        )
    if isinstance(kind, LayerWindows):
        _check_windows(config, kind)
    if kind.room is None:
        return
    if not family(config).RELATIVE_POSITIONS:
        raise ValueError(
            f"{name} has learned positions, which cannot be counted in a cache of kind {kind.name!r}: use gx.window, "
            "whose texts end with the context"
        )
    if kind.room > config.max_length:
        raise ValueError(
            f"a cache of kind {kind.name!r} with {kind.room:,} positions is larger than the model's context of "
            f"{config.max_length:,}: keep fewer tokens"
        )
    _check_offload(config, kind)


def _check_windows(config: ModelConfig, kind: LayerWindows) -> None:
    """Raises ValueError where layers keep fewer tokens than they attend to: the texts would be wrong."""
    own = default_cache(config)
    if not isinstance(own, LayerWindows) or own.windowed != kind.windowed or own.window.size > kind.window.size:
        raise ValueError(
            f"a cache of kind {kind.name!r} must have the windows of the model's layers: leave it out, or take "
            "models.default_cache(config)"
        )


def _check_offload(config: ModelConfig, kind: Kind) -> None:
    """Raises ValueError for arrays in the memory of the host that XLA:TPU does not read and write there.

    It fails to compile heads of other widths, and moves int8 to the device and back in each step to change its layout.
    """
    if not kind.on_host or jax.default_backend() != "tpu":
        return
    if not host_memory.COMPILES_FOR_TPUS:
        raise ValueError(
            f"offload: jax {jax.__version__} does not compile it for TPUs: take a jax below 0.12, or leave offload out"
        )
    if kind.dtype is not None or config.head_dim % 128:
        raise ValueError(
            f"offload with dtype={kind.dtype!r} and heads of {config.head_dim} entries: on a TPU keys and values must "
            "have the dtype of the parameters, and heads a multiple of 128 entries: leave offload out"
        )


def default_cache(config: ModelConfig, dtype: str | None = None) -> Kind:
    """A window in the layers that have one, since they attend to no token further back; else a full cache.

    Args:
        config: The configuration of a model.
        dtype: Of the cache, see `cache_kinds.Kind`.
    """
    windows = [_window_of(config, layer) for layer in range(config.layers)]
    sizes = {size for size in windows if size is not None}
    if blanks(config) is not None or len(sizes) != 1:  # in no family do windows have several sizes
        return Full(dtype=dtype)
    window = Window(sizes.pop(), dtype=dtype)
    return window if None not in windows else LayerWindows(window, tuple(w is not None for w in windows), dtype=dtype)


def _window_of(config: ModelConfig, layer: int) -> int | None:
    """Number of tokens that a layer attends to if it does not depend on the length of the text, else None."""
    attended = family(config).keys_attended
    short, long = (attended(config, layer, length) for length in (2**29, 2**30))
    return short if short == long else None


def unstack(params: spec.Tree) -> spec.Tree:
    """Parameters with the stacked layers as a tuple of one tree a layer: the faster form to decode in.

    On a CPU the layers lie in the memory of the stacked arrays: nothing is copied. Elsewhere, and under `jit`, they are
    new arrays.

    Example:
        >>> import jax, garrulax as gx
        >>> params = gx.unstack(gx.init(gx.preset("gpt2-tiny"), jax.random.key(0)))
        >>> len(params["blocks"])
        4
    """
    blocks = params["blocks"]
    if isinstance(blocks, tuple):
        return params
    leaves, tree = jax.tree.flatten(blocks)
    layers = zip(*map(_layers_of, leaves), strict=True)
    return {**params, "blocks": tuple(jax.tree.unflatten(tree, layer) for layer in layers)}


def _layers_of(stacked: Any) -> list[Any]:
    """`stacked[i]` for each layer, without a copy if the array lies in the memory of one CPU."""
    if isinstance(stacked, jax.Array) and not isinstance(stacked, jax.core.Tracer):
        (device, *more) = stacked.devices()
        if device.platform == "cpu" and not more:
            # A layer is copied only if its memory is not aligned as XLA needs it. The view keeps the stack alive.
            view = np.asarray(stacked)
            place = device if stacked.committed else None
            return [jax.device_put(layer, place, may_alias=True) for layer in view]
        if more and isinstance(stacked.sharding, NamedSharding):  # each layer is split as the stack is
            take = jax.jit(
                functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False),
                out_shardings=NamedSharding(stacked.sharding.mesh, P(*stacked.sharding.spec[1:])),
            )
            return [take(stacked, np.int32(i)) for i in range(len(stacked))]
    return [stacked[i] for i in range(stacked.shape[0])]
