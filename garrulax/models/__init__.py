"""Floor 3: one file a family, with its config.json formats in a second (`llama_hf`) where they are many.

Every family file has the same names:

Config        frozen dataclass
parameters    Config -> ParamSpec tree
hidden        (params, tokens, config, ...) -> (hidden states, cache)
logits        (params, hidden states, config) -> logits
blanks        Config -> core.blanks.Blanks; only in families that are trained on blanks
from_hf, to_hf, layout    config.json and tensor names of its Hugging Face checkpoints
DIALECTS      the config.json formats it reads (core.hf.HFConfig)
PRESETS       name -> Config
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from garrulax.core import sharding, spec
from garrulax.core.blanks import Blanks
from garrulax.core.names import nearest
from garrulax.kernels.mask import Mask
from garrulax.layers.cache import Cache, make_cache
from garrulax.models import chatglm, falcon, glm, glm130b, gpt, llama

FAMILIES: tuple[ModuleType, ...] = (gpt, glm, glm130b, llama, chatglm, falcon)


def family(config: Any) -> ModuleType:
    """The family module of a Config. Raises TypeError for anything else."""
    for module in FAMILIES:
        if isinstance(config, module.Config):
            return module
    raise TypeError(
        f"{type(config).__name__} is not the Config of a family: take gx.preset(name), or model.config of a loaded one"
    )


def blanks(config: Any) -> Blanks | None:
    """How the models of a Config read and fill blanks; None for families that only continue texts."""
    module = family(config)
    return module.blanks(config) if hasattr(module, "blanks") else None


def presets() -> list[str]:
    """Names that `preset` knows."""
    return [name for module in FAMILIES for name in module.PRESETS]


def preset(name: str, **changes: Any) -> Any:
    """The Config of a published model, with fields changed where given.

    Raises ValueError for an unknown name or field, with the nearest known one.
    """
    for module in FAMILIES:
        if name in module.PRESETS:
            config = module.PRESETS[name]
            for field in changes:
                if field not in {f.name for f in dataclasses.fields(config)}:
                    raise ValueError(f"{name} has no field {field!r}{_nearest(field, vars(config))}")
            if "head_dim" in vars(config) and changes.keys() & {"width", "heads"}:
                changes = {"head_dim": 0, **changes}  # follows from the new sizes unless it is given
            return dataclasses.replace(config, **changes)
    raise ValueError(f"unknown preset {name!r}{_nearest(name, presets())}; gx.presets() lists all")


def _nearest(name: str, known: Any) -> str:
    close = nearest(name, known, cutoff=0.3)
    return f"; did you mean {close!r}?" if close else ""


def init(
    config: Any,
    key: jax.Array,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    rules: str | sharding.Rules = "fsdp+tp",
) -> spec.Tree:
    """Initial parameters of `config` from a PRNG key; with a mesh, born sharded by `rules` (`core.sharding`)."""
    dtype = jnp.dtype(dtype)
    if mesh is None:
        return _init_here(key, config, dtype)
    places = sharding.shardings(family(config).parameters(config), mesh, rules)
    return jax.jit(_init, static_argnums=(1, 2), out_shardings=places)(key, config, dtype)


def _init(key: jax.Array, config: Any, dtype: Any) -> spec.Tree:
    return spec.init(family(config).parameters(config), key, dtype)


_init_here = jax.jit(_init, static_argnums=(1, 2))  # compiled once a configuration


def forward(
    params: spec.Tree,
    tokens: jax.Array,
    config: Any,
    *,
    positions: jax.Array | None = None,
    mask: Mask | None = None,
    cache: Cache | None = None,
    key: jax.Array | None = None,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[jax.Array, Any]:
    """Logits of tokens, and the cache with the tokens in it.

    params: as from `init` or `load`, or their `unstack`ed form. tokens: int32 [B, T]; an id outside the vocabulary
    gives NaN. positions: int32 [B, T], for the original GLM and ChatGLM-6B [B, 2, T] (place in the text, place in
    the answer); default 0, 1, ..., counted on from the cache. mask: who attends to whom (`kernels.mask`), default
    causal; with a cache, the streams of the new tokens. cache: from `make_cache`. key: PRNG key; gives dropout.
    remat: what the backward pass recomputes: none, dots, full. unroll: lay the layers out instead of scanning them.

    Returns (logits [B, T, V] in the parameters' dtype, cache or None). Works under jit, grad and vmap with `config`
    static. Raises ValueError for shapes that do not fit.
    """
    module = family(config)
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [batch, length], not {tokens.dtype} {tokens.shape}")
    x, cache = module.hidden(
        params, tokens, config, positions=positions, mask=mask, cache=cache, key=key, remat=remat, unroll=unroll
    )
    return module.logits(params, x, config), cache


def cache_for(params: spec.Tree, config: Any, batch: int, size: int, *, like: jax.Array | None = None) -> Cache:
    """An empty cache of `size` slots for `batch` rows, in the form (stacked or not) and dtype of `params`.

    like: on a mesh, tokens [B, T] whose batch sharding it takes.
    """
    blocks = params["blocks"]
    return make_cache(
        config.layers,
        batch,
        size,
        config.kv_heads,
        config.head_dim,
        jax.tree.leaves(blocks)[0].dtype,
        stacked=not isinstance(blocks, tuple),
        like=like,
    )


def count(config: Any) -> int:
    """Number of parameters; tied tensors count once. Nothing is allocated."""
    return spec.count(family(config).parameters(config))


def unstack(params: spec.Tree) -> spec.Tree:
    """Parameters with the stacked layers as a tuple of one tree a layer: a copy, for decoding (`layers.stack.run`)."""
    blocks = params["blocks"]
    if isinstance(blocks, tuple):
        return params
    layers = jax.tree.leaves(blocks)[0].shape[0]
    return {**params, "blocks": tuple(jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(layers))}
