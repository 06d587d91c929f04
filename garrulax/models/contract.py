"""The contract between a family file and the rest of the library: which names the file must have, and what they mean.

    Config          frozen dataclass; its `__post_init__` refuses what the family cannot compute
    PRESETS         name of a published model -> Config
    parameters      Config -> ParamSpec tree with the parts `tokens`, `blocks`, usually `norm`, and `head` unless tied
    hidden          (params, call, Config) -> (hidden states before the last norm, cache)
    DIALECTS        formats of config.json that the family reads (`core.hf.HFConfig`)
    from_hf, to_hf  parsed config.json -> Config, and back
    tensor_names    Config -> names of tensors in a checkpoint that do not follow from the ParamSpec tree

A file may have these too; otherwise the functions of the same name below stand for them:

    norm, logit_factors, logits, blanks, keys_attended, OBJECTIVE, CONTROL_TOKENS, RELATIVE_POSITIONS
"""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax

from garrulax.core.blanks import Blanks
from garrulax.core.config import ModelConfig
from garrulax.core.einsum import einsum
from garrulax.core.hf import HFConfig, TensorNames
from garrulax.core.leaf import Leaf
from garrulax.core.names import nearest
from garrulax.core.spec import Tree
from garrulax.layers.cache import Cache
from garrulax.layers.call import Call
from garrulax.layers.norms import layer_norm, rms_norm


class FamilyFile(Protocol):
    """The names that a family file must have. Its functions take the file's own Config."""

    __name__: str

    @property
    def Config(self) -> type[Any]:
        """A frozen dataclass that offers what `ModelConfig` says."""

    @property
    def PRESETS(self) -> Mapping[str, Any]:
        """Config of each published model, by name."""

    @property
    def DIALECTS(self) -> tuple[HFConfig, ...]:
        """The formats of config.json that `from_hf` reads."""

    def parameters(self, c: Any, /) -> Tree:
        """The ParamSpec tree of a Config."""

    def hidden(self, params: Tree, call: Call, c: Any, /) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T, D] before the last norm, and the cache."""

    def from_hf(self, raw: dict[str, Any], /) -> Any:
        """The Config of a parsed config.json; ValueError for one that the family cannot compute."""

    def to_hf(self, c: Any, /) -> dict[str, Any]:
        """The config.json of a Config, which `from_hf` turns back into it."""

    def tensor_names(self, c: Any, /) -> TensorNames:
        """Names of tensors in a checkpoint that do not follow from the ParamSpec tree."""


class Family(FamilyFile, Protocol):
    """A registered family, as other packages see it: a family file, with defaults for the names that it leaves out."""

    @property
    def OBJECTIVE(self) -> str:
        """Name of the training objective that the family was made for."""

    @property
    def CONTROL_TOKENS(self) -> Mapping[str, str]:
        """Field of the Config -> the tokenizer's name of the control token whose id it holds."""

    @property
    def RELATIVE_POSITIONS(self) -> bool:
        """Whether positions enter attention only as distances, so that a cache may count them itself."""

    def norm(self, x: jax.Array, p: Tree, c: Any, /) -> jax.Array:
        """x [B, T, D] normalised with the parameters p; `models.forward` applies it to `params["norm"]` at the end."""

    def logit_factors(self, params: Tree, x: jax.Array, c: Any, /) -> tuple[jax.Array, jax.Array | Leaf] | None:
        """States [B, T, E] and matrix [V, E] whose product the logits are; None if they are no product."""

    def logits(self, params: Tree, x: jax.Array, c: Any, /) -> jax.Array:
        """Logits [B, T, V] of normalised hidden states x [B, T, D]."""

    def blanks(self, c: Any, /) -> Blanks | None:
        """How the models of a Config read and fill blanks; None where they only continue texts."""

    def keys_attended(self, c: Any, layer: int, length: int, /) -> int:
        """Number of keys that a late query of a layer attends to, in a text of `length` tokens."""


def norm(x: jax.Array, p: Tree, c: ModelConfig) -> jax.Array:
    """LayerNorm where the parameters have a bias, RMSNorm where they have a scale alone."""
    return (layer_norm if "bias" in p else rms_norm)(x, **p, eps=c.norm_eps)


def logit_factors(params: Tree, x: jax.Array, c: ModelConfig) -> tuple[jax.Array, jax.Array | Leaf]:
    """The hidden states, and the output head, which is the token embedding where the Config ties them."""
    return x, params["tokens" if c.tied else "head"]


def logits(params: Tree, x: jax.Array, c: ModelConfig) -> jax.Array:
    """The product of the hidden states and the output head."""
    return product_of(logit_factors)(params, x, c)


def product_of(factors: Callable) -> Callable:
    """The function `logits` of a function `logit_factors`."""
    return lambda params, x, c: einsum("BTD,VD->BTV", *factors(params, x, c))


def _no_factors(params: Tree, x: jax.Array, c: ModelConfig) -> None:
    """`logit_factors` of a family whose `logits` are its own."""


def blanks(c: ModelConfig) -> Blanks | None:
    """None: a family that only continues texts."""
    return None


def keys_attended(c: ModelConfig, layer: int, length: int) -> int:
    """All of the text: causal masks are not halved (Chowdhery et al. 2022, appendix B)."""
    return length


DEFAULTS: dict[str, Any] = {
    "norm": norm,
    "logit_factors": logit_factors,
    "logits": logits,
    "blanks": blanks,
    "keys_attended": keys_attended,
    "OBJECTIVE": "causal",
    "CONTROL_TOKENS": types.MappingProxyType({}),
    "RELATIVE_POSITIONS": False,
}
_REQUIRED = ("Config", "PRESETS", "DIALECTS", "parameters", "hidden", "from_hf", "to_hf", "tensor_names")
_CONFIG = tuple(name for name in vars(ModelConfig) if isinstance(vars(ModelConfig)[name], property))


class _Registered(types.SimpleNamespace):
    """The names of a family."""

    def __repr__(self) -> str:
        return f"<family {self.__name__}>"


def register(file: FamilyFile) -> Family:
    """A family from its file.

    Raises:
        TypeError: The file, its Config or a preset lacks something; the message says what.
    """
    name = file.__name__.rpartition(".")[2]
    if missing := [required for required in _REQUIRED if not hasattr(file, required)]:
        raise TypeError(f"the family {name} lacks {', '.join(missing)}: see garrulax/models/contract.py")
    check_config_class(file.Config, name)
    _check_kinds(file, name)
    if odd := [preset for preset, c in file.PRESETS.items() if not isinstance(c, file.Config)]:
        raise TypeError(f"presets of the family {name} are not of its Config: {', '.join(odd)}")
    given = {required: getattr(file, required) for required in _REQUIRED}
    defaults = dict(DEFAULTS)
    if hasattr(file, "logits") and hasattr(file, "logit_factors"):
        raise TypeError(f"the family {name} has logits and logit_factors: leave out logits, which follow from those")
    if hasattr(file, "logits"):
        defaults["logit_factors"] = _no_factors
    elif hasattr(file, "logit_factors"):
        defaults["logits"] = product_of(file.logit_factors)
    optional = {option: getattr(file, option, default) for option, default in defaults.items()}
    return cast(Family, _Registered(__name__=name, **given, **optional))


def _check_kinds(file: FamilyFile, family: str) -> None:
    """Raises TypeError for a name of another kind than the contract says, and for a misspelt optional name."""
    if not isinstance(file.PRESETS, Mapping):
        raise TypeError(f"PRESETS of the family {family} must be a dict from names to Configs")
    if not isinstance(file.DIALECTS, tuple) or not all(isinstance(d, HFConfig) for d in file.DIALECTS):
        raise TypeError(f"DIALECTS of the family {family} must be a tuple of HFConfigs")
    for name in (*_REQUIRED, *DEFAULTS):
        model = vars(FamilyFile).get(name, DEFAULTS.get(name))
        function = getattr(file, name, None)
        if function is not None and inspect.isfunction(model):
            wanted = [p for p in inspect.signature(model).parameters if p != "self"]
            if not callable(function) or len(inspect.signature(function).parameters) != len(wanted):
                raise TypeError(f"{name} of the family {family} must be a function of ({', '.join(wanted)})")
    for name in (name for name in vars(file) if name not in DEFAULTS):
        if meant := nearest(name, DEFAULTS, cutoff=0.9):
            raise TypeError(f"the family {family} has a name {name}: did you mean {meant}?")


def check_config_class(kind: type, family: str) -> None:
    """Checks that a class can be the Config of a family.

    Raises:
        TypeError: It is not a frozen dataclass, or lacks a field or property of `ModelConfig`.
    """
    options = getattr(kind, "__dataclass_params__", None)
    if options is None or not options.frozen or not isinstance(kind, type):
        raise TypeError(
            f"Config of the family {family} must be a dataclass(frozen=True): jit takes it as a static argument"
        )
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    if missing := [name for name in _CONFIG if name not in fields and not hasattr(kind, name)]:
        raise TypeError(
            f"Config of the family {family} lacks {', '.join(missing)}: see ModelConfig in garrulax/core/config.py"
        )
