"""A family file that lacks something, and arguments of the forward pass that do not fit, are refused by name."""

import dataclasses
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import pytest
from registry import FAMILIES

import garrulax as gx
from garrulax import models
from garrulax.core.einsum import einsum
from garrulax.core.spec import Declare, normal
from garrulax.models import llama
from garrulax.models.contract import register

pytestmark = pytest.mark.usefixtures("quick_compilation")

REQUIRED = {name: getattr(llama, name) for name in (
    "Config", "PRESETS", "DIALECTS", "parameters", "hidden", "from_hf", "to_hf", "tensor_names",
)}  # fmt: skip


def file(**changes):
    names = {name: value for name, value in {**REQUIRED, **changes}.items() if value is not None}
    return types.SimpleNamespace(__name__="garrulax.models.new", **names)


def test_a_file_with_the_required_names_is_a_family_with_the_defaults():
    family = register(file())
    config = gx.preset("llama-tiny")
    assert (family.OBJECTIVE, dict(family.CONTROL_TOKENS), family.blanks(config)) == ("causal", {}, None)
    assert family.keys_attended(dataclasses.replace(config, window=3, dialect="mistral"), 0, 100) == 100


@pytest.mark.parametrize("name", REQUIRED)
def test_a_file_that_lacks_a_name_is_refused(name):
    with pytest.raises(TypeError, match=f"family new lacks {name}: see"):
        register(file(**{name: None}))


@dataclasses.dataclass
class Changeable:
    vocab: int = 10


@dataclasses.dataclass(frozen=True)
class Small:
    vocab: int = 10
    context: int = 8
    width: int = 4
    layers: int = 1
    heads: int = 1
    eos: int = 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict, "family new must be a dataclass\\(frozen=True\\)"),
        (Changeable, "family new must be a dataclass\\(frozen=True\\)"),
        (Small, "Config of the family new lacks max_length, kv_heads, head_dim, norm_eps, tied: see ModelConfig"),
    ],
)
def test_a_config_that_lacks_something_is_refused(config, message):
    with pytest.raises(TypeError, match=message):
        register(file(Config=config, PRESETS={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PRESETS": [1]}, "PRESETS of the family new must be a dict"),
        ({"DIALECTS": llama.DIALECTS[0]}, "DIALECTS of the family new must be a tuple of HFConfigs"),
        (
            {"hidden": lambda params, tokens, config, mask: None},
            r"hidden of the family new must be a function of \(params",
        ),
        ({"keys_atended": llama.keys_attended}, "has a name keys_atended: did you mean keys_attended"),
        ({"Config": gx.preset("llama-tiny")}, "Config of the family new must be a dataclass"),
    ],
)
def test_a_name_of_another_kind_is_refused(changes, message):
    with pytest.raises(TypeError, match=message):
        register(file(**changes))


def test_a_preset_of_another_config_is_refused():
    with pytest.raises(TypeError, match="presets of the family new are not of its Config: small"):
        register(file(PRESETS={"small": Small()}))


def arguments(family="llama"):
    config = FAMILIES[family].config
    return gx.init(config, jax.random.key(0)), jnp.ones((2, 5), jnp.int32), config


@pytest.mark.parametrize("mask", [jnp.ones((2, 5), bool), [[True] * 5] * 2, jnp.ones((5, 5))])
def test_a_mask_that_is_an_array_is_told_what_to_use(mask):
    params, tokens, config = arguments()
    with pytest.raises(TypeError, match=r"must be a garrulax\.Mask, not \w+: .* garrulax\.kernels\.masks\.padded"):
        gx.forward(params, tokens, config, mask=mask)


@pytest.mark.parametrize(("family", "wanted"), [("llama", r"\[batch, length\]"), ("glm", r"\[batch, 2, length\]")])
@pytest.mark.parametrize("shape", [(2, 4), (5,), (3, 5), (2, 3, 5), (2, 2, 4)])
def test_positions_of_another_shape_are_refused(family, wanted, shape):
    params, tokens, config = arguments(family)
    with pytest.raises(ValueError, match=rf"positions must be {wanted}, not .* for tokens \(2, 5\)"):
        gx.forward(params, tokens, config, positions=jnp.zeros(shape, jnp.int32))
    with pytest.raises(ValueError, match="positions must be integers, not float32"):
        gx.forward(params, tokens, config, positions=jnp.zeros((2, *(2,) * (family == "glm"), 5)))


@pytest.mark.parametrize("unstacked", [False, True])
def test_parameters_that_lack_a_part_or_have_another_are_named(unstacked):
    params, tokens, config = arguments()
    params = gx.unstack(params) if unstacked else params
    with pytest.raises(ValueError, match="do not fit the config: head missing"):
        gx.forward({k: v for k, v in params.items() if k != "head"}, tokens, config)
    with pytest.raises(ValueError, match="do not fit the config: extra unknown"):
        gx.forward({**params, "extra": jnp.ones(3)}, tokens, config)

    def misspelt(layer):
        return {**layer, "mlp": {("upp" if k == "up" else k): v for k, v in layer["mlp"].items()}}

    blocks = params["blocks"]
    wrong = (blocks[0], misspelt(blocks[1])) if unstacked else misspelt(blocks)
    with pytest.raises(ValueError, match=r"config: blocks(/1)?/mlp/up missing, blocks(/1)?/mlp/upp unknown"):
        gx.forward({**params, "blocks": wrong}, tokens, config)


def test_parameters_of_another_shape_or_depth_are_named():
    params, tokens, config = arguments()
    with pytest.raises(ValueError, match=r"blocks has 1 layers, not 2"):
        gx.forward({**params, "blocks": gx.unstack(params)["blocks"][:1]}, tokens, config)
    with pytest.raises(ValueError, match=r"tokens is \(41, 8\), not \(40, 8\)"):
        gx.forward({**params, "tokens": jnp.ones((41, 8))}, tokens, config)
    deeper = gx.init(dataclasses.replace(config, layers=3), jax.random.key(0))
    with pytest.raises(ValueError, match=r"blocks/attention/key is \(3, 8, 2, 4\), not \(2, 8, 2, 4\)"):
        gx.forward(deeper, tokens, config)
    with pytest.raises(
        ValueError, match=r"blocks must be a dict \(stacked\) or a tuple of dicts \(unstacked\), not list"
    ):
        gx.forward({**params, "blocks": list(gx.unstack(params)["blocks"])}, tokens, config)
    with pytest.raises(ValueError, match="a cache of 3 rows does not fit tokens of 2"):
        gx.forward(params, tokens, config, cache=gx.cache_for(params, config, 3, 8))
    with pytest.raises(ValueError, match="tokens must be an array of integers"):
        gx.forward(params, [[1, 2]], config)
    with pytest.raises(ValueError, match="positions must be an array of integers"):
        gx.forward(params, tokens, config, positions=[[0, 1, 2, 3, 4]] * 2)


def test_a_weight_declared_without_its_transposition_is_refused_when_it_is_used():
    """As [outputs, inputs], which PyTorch stores; no reshape puts it right silently."""
    weight = Declare(normal(1.0), F=3, D=4).linear("up", "up", "F D -> F D")["up"]
    with pytest.raises(ValueError, match=r"einsum 'BTD,DF->BTF': D is 4 in .* and 3 in \(3, 4\)"):
        einsum("BTD,DF->BTF", jnp.ones((1, 2, 4)), jnp.ones(weight.shape))


def test_axes_and_roles_follow_from_the_declaration():
    declare = Declare(normal(1.0), D=4, H=2, K=1, C=3, V=7, F=5)
    specs = declare.linear("query", "q", "(H C) D -> D H C", bias=True)
    assert [(s.axes, s.role, s.inputs) for s in specs.values()] == [
        (("embed", "heads", "head"), "matrix", 1),
        (("heads", "head"), "vector", 2),
    ]
    assert declare.linear("out", "o", "D (H C) -> H C D")["out"].inputs == 2
    assert declare.embedding("e").role == "embedding"


def test_a_family_file_imports_no_other_family():
    """Layers between packages, and circles, are the import linter's to check (`make lint`)."""
    names = {family.__name__ for family in models.FAMILIES}
    folder = pathlib.Path(models.__file__).parent
    for name in names:
        for file in folder.glob(f"{name}*.py"):
            lines = re.findall(r"garrulax\.models(?:\.| import )(.+)", file.read_text())
            imported = {word for line in lines for word in re.findall(r"\w+", line)}
            assert not imported & (names - {name}), file
