"""Writes the tables of docs/attention.md: which requests each implementation supports, by its `unsupported_reason`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from gallery import MASKS

from garrulax.kernels import Mask, attention, decode, masks
from garrulax.kernels.attention import IMPLEMENTATIONS, REGISTRY
from garrulax.kernels.mask import PAD
from garrulax.kernels.relative import t5

PAGE = Path(__file__).parent / "attention.md"
T = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """Takes an implementation's place: records why that does not support the requests, and computes nothing."""

    implementation: Any
    reasons: list[str]

    def unsupported_reason(self, options: Any, operands: Any) -> None:
        """None, after recording the reason of the implementation."""
        reason = self.implementation.unsupported_reason(options, operands)
        self.reasons.extend([reason] if reason else [])

    def __call__(self, options: Any, operands: Any) -> Any:
        """Zeros of the output's shape [B, T, H, Cv]."""
        return jnp.zeros((*operands.query.shape[:3], operands.value.shape[3]), operands.query.dtype)


class DecodeRecorder(Recorder):
    """`Recorder` for decoding attention, which returns output and lse."""

    def __call__(self, options: Any, operands: Any) -> Any:
        """Zeros of the shapes of output and lse."""
        out = super().__call__(options, operands)
        return out, jnp.zeros(out.shape[:3], jnp.float32).swapaxes(1, 2)


def anywhere(implementation: Any) -> Any:
    """The implementation in interpreted form, whose answers depend neither on the machine nor on the version of jax."""
    names = {field.name for field in dataclasses.fields(implementation)}
    return dataclasses.replace(implementation, interpret=True) if "interpret" in names else implementation


def unsupported_reason(
    name: str,
    mask: Callable[[int], Mask | Sequence[Mask] | None] | None = None,
    *,
    length: int = T,
    keys: int | None = None,
    heads: int = 8,
    kv_heads: int = 8,
    width: int = 128,
    values: int | None = None,
    dtype: Any = jnp.bfloat16,
    **options: Callable[[], Any],
) -> str | None:
    """Why the implementation of that name does not support a request, or None where it does.

    Args:
        name: of the implementation.
        mask: builds the mask for a number of keys; causal by default.
        length: number of queries.
        keys: number of keys, by default that of the queries.
        heads: number of query heads.
        kv_heads: number of key/value heads.
        width: of queries and keys.
        values: width of the values, by default that of the keys.
        dtype: of query, key and value.
        options: functions that make further arguments of `attention`.
    """
    recorder = Recorder(anywhere(REGISTRY.implementation(name)), [])

    def request(query, key, value):
        own = (mask or causal)(key.shape[1])
        given = {option: make() for option, make in options.items()}
        return attention(query, key, value, mask=own, implementation=recorder, **given)

    keys = keys or length
    shapes = (length, heads, width), (keys, kv_heads, width), (keys, kv_heads, values or width)
    with jax.enable_x64(dtype == jnp.float64):
        jax.eval_shape(request, *(jax.ShapeDtypeStruct((1, *shape), dtype) for shape in shapes))
    return recorder.reasons[0] if recorder.reasons else None


def unsupported_reason_to_decode(
    name: str,
    mask: Callable[[int], Mask] | None = None,
    *,
    queries: int = 1,
    kv_heads: int = 2,
    width: int = 128,
    values: int | None = None,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    page: int | None = None,
    **options: Callable[[], Any],
) -> str | None:
    """`unsupported_reason` for decoding 4 sequences of 8 heads over `T` slots.

    Args:
        name: of the implementation.
        mask: builds the mask for a number of slots; causal by default.
        queries: of each sequence.
        kv_heads: number of key/value heads.
        width: of queries and keys.
        values: width of the values, by default that of the keys.
        dtype: of the query.
        cache: dtype of keys and values, by default the query's.
        page: slots of a page; None is a contiguous cache.
        options: functions that make further arguments of `decode`.
    """
    recorder = DecodeRecorder(anywhere(decode.REGISTRY.implementation(name)), [])
    cache = cache or dtype
    rows, slots = (4, T) if page is None else (4 * T // page, page)

    def request(query, key, value):
        given = {option: make() for option, make in options.items()}
        if page is not None:
            given["table"] = jnp.zeros((4, T // page), jnp.int32)
        if cache in decode.QUANTISED:
            given |= dict.fromkeys(("key_scales", "value_scales"), jnp.ones(key.shape[:3]))
        whole = (mask or causal)(T)
        query_streams = {n: jnp.tile(s[:, :queries], (4, 1)) for n, s in whole.query.items()}
        key_streams = {n: jnp.tile(s[:, :slots], (rows, 1)) for n, s in whole.key_streams().items()}
        own = Mask(query_streams, key_streams, whole.rule)
        return decode.decode(query, key, value, mask=own, implementation=recorder, **given)

    query = jax.ShapeDtypeStruct((4, queries, 8, width), dtype)
    keys = (jax.ShapeDtypeStruct((rows, kv_heads, slots, size), cache) for size in (width, values or width))
    jax.eval_shape(request, query, *keys)
    return recorder.reasons[0] if recorder.reasons else None


def causal(length: int) -> Mask:
    """Causal, with positions for ALiBi and relative biases."""
    mask = masks.causal(1, length)
    return mask.replace(query={**mask.query, "position": mask.query["rank"]})


def blind(length: int) -> Mask:
    """The first half of the queries is padding, which attends to nothing."""
    return masks.packed(jnp.where(jnp.arange(length) < length // 2, PAD, 0)[None])


def outside(length: int) -> Mask:
    """The pairs that `packed` forbids."""
    mask = MASKS["packed"](length)
    return mask.replace(rule=~mask.rule)


TRAINING: dict[str, dict[str, Any]] = {
    "no mask": {"mask": lambda T: None},
    **{f"`{name}`": {"mask": build} for name, build in MASKS.items() if name != "tree"},
    "`tree`, 90 drafts over a cache": {"mask": MASKS["tree"], "length": 90, "keys": T},
    "a rule of your own, with `~`": {"mask": outside},
    "queries that attend to nothing": {"mask": blind},
    "softcap": {"softcap": lambda: 30.0},
    "ALiBi": {"alibi": lambda: jnp.ones(8)},
    "relative (T5)": {"relative": lambda: t5(jnp.zeros((32, 8)), bidirectional=False)},
    "sinks": {"sinks": lambda: jnp.zeros(8)},
    "bias [B, H, T, S]": {"bias": lambda: jnp.zeros((1, 8, T, T))},
    "bias [1, 1, T, S]": {"bias": lambda: jnp.zeros((1, 1, T, T))},
    "bias [B, 1, 1, S]": {"bias": lambda: jnp.zeros((1, 1, 1, T))},
    "dropout": {"dropout": lambda: 0.1, "dropout_key": lambda: jax.random.key(0)},
    "bfloat16": {},
    "float16": {"dtype": jnp.float16},
    "float32": {"dtype": jnp.float32},
    "float64": {"dtype": jnp.float64},
    **{f"heads of width {width}": {"width": width} for width in (64, 80, 96, 128, 192, 256)},
    "values of another width": {"width": 192, "values": 128},
    "any length (1001)": {"length": 1001},
    "more keys than queries": {"mask": lambda T: None, "keys": 2 * T},
    "grouped queries (GQA)": {"kv_heads": 2},
    "one key/value head (MQA)": {"kv_heads": 1},
}


DECODING: dict[str, dict[str, Any]] = {
    "one token": {},
    "8 drafts": {"queries": 8},
    "`tree`, 90 drafts": {"mask": MASKS["tree"], "queries": 90},
    "`window`": {"mask": MASKS["window"]},
    "`sinks_and_window`": {"mask": MASKS["sinks_and_window"]},
    "a rule of your own, with `~`": {"mask": outside},
    "sequences of different lengths": {"lengths": lambda: jnp.full(4, 9)},
    "pages of 16": {"page": 16},
    "pages of 128": {"page": 128},
    "cache of int8": {"cache": jnp.int8},
    "cache of float8_e4m3fn": {"cache": jnp.float8_e4m3fn},
    "cache of float8_e5m2": {"cache": jnp.float8_e5m2},
    "int8 in pages of 16": {"cache": jnp.int8, "page": 16},
    "int8 in pages of 128": {"cache": jnp.int8, "page": 128},
    "softcap": {"softcap": lambda: 30.0},
    "ALiBi": {"alibi": lambda: jnp.ones(8)},
    "relative (T5)": {"relative": lambda: t5(jnp.zeros((32, 8)), bidirectional=False)},
    "sinks": {"sinks": lambda: jnp.zeros(8)},
    "float16": {"dtype": jnp.float16},
    "float32": {"dtype": jnp.float32},
    **{f"heads of width {width}": {"width": width} for width in (64, 80, 96, 128, 192, 256)},
    "values of another width": {"width": 192, "values": 128},
    "as many key/value heads": {"kv_heads": 8},
    "one key/value head (MQA)": {"kv_heads": 1},
}


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of the page. It stands between two comments with its title.

    Attributes:
        title: of the table.
        names: the implementations, one a column.
        rows: by feature, the arguments of `unsupported_reason`.
        unsupported_reason: why an implementation does not support a request, or None.
    """

    title: str
    names: Sequence[str]
    rows: dict[str, dict[str, Any]]
    unsupported_reason: Callable[..., str | None]

    def text(self) -> str:
        """The table, and below it the reasons, in Markdown."""
        reasons: list[str] = []
        lines = ["| | " + " | ".join(f"`{name}`" for name in self.names) + " |", "|---" * (len(self.names) + 1) + "|"]
        for feature, arguments in self.rows.items():
            cells = []
            for name in self.names:
                reason = self.unsupported_reason(name, **arguments)
                if reason and reason not in reasons:
                    reasons.append(reason)
                cells.append(f"no ({reasons.index(reason) + 1})" if reason else "yes")
            lines.append(f"| {feature} | {' | '.join(cells)} |")
        notes = [f"{i}. {reason}".replace("*", r"\*") for i, reason in enumerate(reasons, 1)]
        return "\n".join([*lines, "", *notes, "", ""])

    def parts(self, page: str) -> tuple[str, str, str]:
        """The page before this table, the present text of the table, and the page after it."""
        begin, end = f"<!-- {self.title}: written by `make pictures` -->\n", f"<!-- end of {self.title} -->\n"
        before, found, rest = page.partition(begin)
        text, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page has no lines {begin.strip()} and {end.strip()}")
        return before + begin, text, end + after


TABLES = (
    Table("table of implementations", tuple(IMPLEMENTATIONS), TRAINING, unsupported_reason),
    Table("table of decoding", tuple(decode.IMPLEMENTATIONS), DECODING, unsupported_reason_to_decode),
)


def write() -> None:
    """Writes the tables into the page."""
    page = PAGE.read_text(encoding="utf-8")
    for table in TABLES:
        before, _, after = table.parts(page)
        page = before + table.text() + after
    PAGE.write_text(page, encoding="utf-8")
