"""`gx.quantise` and `gx.dequantise`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from garrulax.core import spec
from garrulax.core.coded import Coded
from garrulax.core.dtypes import parameter_dtype
from garrulax.core.leaf import Leaf, check_arrays, map_weights
from garrulax.core.lora import Lora
from garrulax.core.quantised import Quantised
from garrulax.models import parameters, unstack
from garrulax.models.unpack import TokenizerLike, unpack_model
from garrulax.quantisation import awq, gptq, smooth
from garrulax.quantisation.calibrating import Calibrating, windows
from garrulax.quantisation.calibrating import calibrate as read_texts
from garrulax.quantisation.grid import GROUPS, nearest, nearest_table

METHODS = ("rtn", "gptq", "awq", "smoothquant")
#: The kinds of each method; "rtn" makes all.
_MAKES = {"gptq": ("int8", "int4"), "awq": ("int8", "int4"), "smoothquant": ("w8a8", "int8")}
_ROWS = 2048  # of inputs, with which AWQ's search and the reported errors are computed


class MatrixError(NamedTuple):
    """The relative errors of a matrix after quantisation.

    Attributes:
        name: Of the matrix, such as "blocks/3/mlp/up".
        weight: Root mean square of the change, divided by that of the weight.
        output: Likewise of the outputs for the calibration texts; None without texts.
    """

    name: str
    weight: float
    output: float | None


def quantise(
    model: Any,
    kind: str = "int4",
    group: int | None = None,
    method: str = "rtn",
    calibrate: Sequence[str | Sequence[int]] | None = None,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    alpha: float = 0.5,
    tables: str | None = "int8",
    progress: Callable[[MatrixError, int], None] | None = None,
) -> Any:
    """A model whose matrices are quantised, which takes less memory.

    Norms and biases stay as they are. `forward`, `generate`, `stream`, `score` and `save` take the model as before.

    Args:
        model: A `gx.Model`; or a tuple (params, config), of which quantised params are returned as (params, config).
        kind: "int8", "int4", "nf4", "fp8" (float8_e4m3fn) or "mxfp4"; or "w8a8", int8 weights whose activations are
            rounded to int8 too, when they are multiplied, with a scale for each token.
        group: Number of neighbouring inputs that share a scale, -1 for a whole row. None is the usual one: a row for
            int8 and fp8, 128 for int4, 64 for nf4; mxfp4 has always 32, w8a8 a row. The last group of a row may be
            shorter.
        method: "rtn" rounds to nearest, without data. "gptq" and "awq" (int8 and int4), and "smoothquant" (w8a8 and
            int8), need `calibrate`.
        calibrate: Texts or token ids like those that the model will read; some tens of thousands of tokens. They are
            read in one pass, in rows of 512 tokens.
        symmetric: Whether integers have no zero points.
        act_order: For GPTQ, whether the inputs with the largest activations are rounded first.
        damping: For GPTQ, the share of the mean of the Hessian's diagonal that is added to it.
        alpha: For SmoothQuant, the share of large activations that moves into the weights, 0 to 1.
        tables: The form of token embedding and output head: "int8", with a scale a row and a factor a column, or
            another kind; None keeps them.
        progress: Called after each matrix with its errors and the number of all matrices.

    Returns:
        The model with `core.quantised.Quantised` weights, stacked or not as before.

    Raises:
        ValueError: An argument is none of the above, the model is quantised or has adapters, or a weight is not finite.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("llama-tiny")
        >>> model = gx.Model(config, gx.init(config, jax.random.key(0)))
        >>> small = gx.quantise(model, "int4", group=32)
        >>> small.params["blocks"]["mlp"]["up"].codes.shape
        (4, 352, 64)
    """
    group = _check(kind, group, method, calibrate, symmetric, alpha, tables)
    params, config, tokenizer = unpack_model(model)
    check_arrays(params, "quantising")
    specs = parameters(config)
    spec.check_params(specs, params)
    named = spec.named_specs(specs)
    matrices = [path for path, s in named.items() if s.role == "matrix"]
    total = sum(named[path].layers or 1 for path in matrices)

    def done(name: str, w: np.ndarray, coded: Coded, x: np.ndarray | None) -> None:
        change = coded.numbers() - w
        output = None if x is None else _relative(x[:_ROWS] @ change.T, x[:_ROWS] @ w.T)
        if progress is not None:
            progress(MatrixError(name, _relative(change, w), output), total)

    def round_matrix(name: str, w: np.ndarray, x: np.ndarray | None) -> Coded:
        _check_finite(name, w)
        if method == "gptq":
            assert x is not None
            hessian = np.asarray(jnp.matmul(x.T, x)) * np.float32(2 / len(x))
            found = gptq.gptq_coded(w, hessian, int(kind[3:]), group, symmetric, act_order, damping)
        elif method == "awq":
            assert x is not None
            step = max(1, len(x) // _ROWS)
            found = awq.awq_coded(w, x[::step], int(kind[3:]), group, symmetric)
        else:
            found = nearest(w, kind, group, symmetric)
            if name in kept:
                found = dataclasses.replace(found, factors=1 / kept[name])
        done(name, w, found, x)
        return found

    kept: Mapping[str, np.ndarray] = {}
    if calibrate is not None:
        tokens = windows([_ids(text, tokenizer) for text in calibrate], config.max_length)
        if method == "smoothquant":
            params, kept = _smoothed(params, config, tokens, alpha)
        else:
            params = _calibrated(params, config, named, tokens, round_matrix)
    new = _rounded(params, specs, config, round_matrix, tables)
    return (new, config) if isinstance(model, tuple) else model.replace(params=new)


def dequantise(model: Any, dtype: Any = "float32") -> Any:
    """A model with plain weights in place of quantised ones, below adapters too.

    Args:
        model: A `gx.Model`, or a tuple (params, config).
        dtype: Of all parameters.

    Raises:
        ValueError: `dtype` is none of parameters.

    Example:
        >>> import jax, garrulax as gx
        >>> config = gx.preset("llama-tiny")
        >>> model = gx.Model(config, gx.init(config, jax.random.key(0)))
        >>> gx.dequantise(gx.quantise(model, "int8")).params["blocks"]["mlp"]["up"].shape
        (4, 128, 352)
    """
    kind = parameter_dtype(dtype)
    params, config, _ = unpack_model(model)

    def plain_weight(w: Any) -> Any:
        if isinstance(w, Lora):
            return dataclasses.replace(w, base=plain_weight(w.base))
        return _dense(w, kind) if isinstance(w, Quantised) else w.astype(kind)

    plain = map_weights(plain_weight, params)
    return (plain, config) if isinstance(model, tuple) else model.replace(params=plain)


_dense = jax.jit(Quantised.dense, static_argnums=1)


def _check(
    kind: str, group: int | None, method: str, calibrate: Any, symmetric: bool, alpha: float, tables: str | None
) -> int:
    """The group. Raises ValueError for arguments that do not fit."""
    for what, value, known in (("kind", kind, (*GROUPS,)), ("method", method, METHODS)):
        if value not in known:
            raise ValueError(f"{what}={value!r} is none of {', '.join(known)}")
    if tables is not None and tables not in (forms := [name for name in GROUPS if name != "w8a8"]):
        raise ValueError(f"tables={tables!r} is none of {', '.join(forms)} and None")
    makes = _MAKES.get(method, (*GROUPS,))
    if kind not in makes:
        raise ValueError(f"method={method!r} makes {' and '.join(makes)}, not {kind}: use method='rtn'")
    if method != "rtn" and calibrate is None:
        raise ValueError(f"method={method!r} needs texts: give calibrate=[...], or use method='rtn'")
    if method == "rtn" and calibrate is not None:
        raise ValueError("method='rtn' reads no texts: leave calibrate out, or use another method")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a share, 0 to 1")
    if isinstance(calibrate, str):
        raise ValueError("calibrate must be a list of texts, not one string")
    if not symmetric and not kind.startswith("int"):
        raise ValueError(f"symmetric=False is for int8 and int4: {kind} has no zero points")
    if group is None:
        return GROUPS[kind]
    if kind == "mxfp4" and group != 32:
        raise ValueError(f"group={group}: the groups of mxfp4 have 32 inputs")
    if kind == "w8a8" and group != -1:
        raise ValueError(f"group={group}: w8a8 has one scale for each row: leave group out, or give -1")
    if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and (group < 2 or group % 2)):
        raise ValueError(f"group={group!r} must be an even number of inputs, or -1 for a whole row")
    return group


def _ids(text: str | Sequence[int], tokenizer: TokenizerLike | None) -> Sequence[int]:
    if not isinstance(text, str):
        return text
    if tokenizer is None:
        raise ValueError("calibrate has texts, but the model has no tokenizer: give token ids")
    return tokenizer.encode(text)


def _relative(change: np.ndarray, of: np.ndarray) -> float:
    return float(np.sqrt((change.astype(np.float64) ** 2).mean() / max((of.astype(np.float64) ** 2).mean(), 1e-30)))


RoundMatrix = Callable[[str, np.ndarray, np.ndarray | None], Coded]


def _calibrated(
    params: spec.Tree, config: Any, named: Mapping[str, spec.ParamSpec], tokens: np.ndarray, round_matrix: RoundMatrix
) -> spec.Tree:
    """The parameters with all matrices quantised while the model reads the tokens; stacked as before."""
    stacked = not isinstance(params["blocks"], tuple)
    leaves: dict[str, Calibrating] = {}

    def one(path: Any, w: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        s = named[_without_layer(name)]
        if s.role != "matrix":
            return w

        def round_(name: str, matrix: np.ndarray, x: np.ndarray) -> Quantised:
            return _leaf(round_matrix(name, matrix, x), s, np.dtype(w.dtype).name)

        leaves[name] = Calibrating(name, w, s.inputs, round_)
        return leaves[name]

    open_ = jax.tree_util.tree_map_with_path(one, unstack(params))
    read_texts(open_, config, tokens, leaves)
    closed = map_weights(lambda w: w.done if isinstance(w, Calibrating) else w, open_)
    return _stacked_layers(closed) if stacked else closed


def _smoothed(
    params: spec.Tree, config: Any, tokens: np.ndarray, alpha: float
) -> tuple[spec.Tree, Mapping[str, np.ndarray]]:
    """`smooth.smooth` of parameters, stacked as before."""
    moved, kept = smooth.smooth(unstack(params), config, tokens, alpha)
    return (moved if isinstance(params["blocks"], tuple) else _stacked_layers(moved)), kept


def _stacked_layers(params: spec.Tree) -> spec.Tree:
    """The inverse of `unstack`."""
    return {**params, "blocks": map_weights(lambda *layers: _stack(layers), *params["blocks"])}


def _without_layer(name: str) -> str:
    """blocks/mlp/up of blocks/3/mlp/up."""
    parts = name.split("/")
    return "/".join(parts[:1] + parts[2:]) if parts[0] == "blocks" and parts[1].isdigit() else name


def _check_finite(name: str, w: np.ndarray) -> None:
    if not np.isfinite(w).all():
        raise ValueError(f"{name} has numbers that are not finite: it cannot be quantised")


def _rounded(
    params: spec.Tree, specs: spec.Tree, config: Any, round_matrix: RoundMatrix, tables: str | None
) -> spec.Tree:
    """The parameters with tables, and matrices that are still plain, quantised."""
    named = spec.named_specs(specs)
    kept = {"head"} if getattr(config, "normalized_head", False) else set()  # it is divided by its rows' lengths

    def matrix_of(s: spec.ParamSpec, w: Any) -> np.ndarray:
        """float32 [outputs, inputs] of one layer."""
        array = np.asarray(w, np.float32)
        return array.reshape(len(array), -1) if s.role == "embedding" else array.reshape(_inputs(s), -1).T

    def one(path: Any, w: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        s = named[_without_layer(name)]
        if isinstance(w, Leaf) or s.role == "vector" or name in kept or (s.role == "embedding" and tables is None):
            return w
        dtype = np.dtype(w.dtype).name

        def quantised(name: str, w: Any) -> Quantised:
            if s.role == "embedding":
                assert tables is not None
                table = matrix_of(s, w)
                _check_finite(name, table)
                return _leaf(nearest_table(table, tables), s, dtype)
            return _leaf(round_matrix(name, matrix_of(s, w), None), s, dtype)

        if w.ndim == len(s.layer_shape):
            return quantised(name, w)
        host = np.asarray(w)
        top, _, rest = name.partition("/")
        layers = [quantised(f"{top}/{i}/{rest}", layer) for i, layer in enumerate(host)]
        return _stack(layers)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda x: isinstance(x, Leaf))


def _stack(layers: Sequence[Any]) -> Any:
    """The layers on a leading axis. Scales are float16 where those of all layers are."""
    if isinstance(layers[0], Quantised):
        wide = np.result_type(*(layer.scale.dtype for layer in layers))
        layers = [dataclasses.replace(layer, scale=layer.scale.astype(wide)) for layer in layers]
    return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *layers)


def _inputs(s: spec.ParamSpec) -> int:
    return int(np.prod(s.layer_shape[: s.inputs]))


def _leaf(coded: Coded, s: spec.ParamSpec, dtype: str) -> Quantised:
    """The weight of one layer."""
    if s.role == "embedding":
        leaf = coded.leaf(s.layer_shape[1:], s.layer_shape[:1], False, dtype)
    else:
        leaf = coded.leaf(s.layer_shape[: s.inputs], s.layer_shape[s.inputs :], True, dtype)
    return jax.tree.map(jnp.asarray, leaf)
