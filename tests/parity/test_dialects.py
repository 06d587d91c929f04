"""config.json means the same to us as to transformers: the old and the new dialect, what is absent, null or absurd, and
keys that we ignore."""

import collections
import copy
import dataclasses
import json

import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import peer  # noqa: F401 (quiets transformers)
import torch
import transformers
from drawing import Draw
from registry import FAMILIES

from garrulax import models
from garrulax.hub.reading import family_of

ABSENT = "absent"
NATIVE = [drawn for entry in FAMILIES.values() for drawn in entry.draws if not drawn.detour]
families = pytest.mark.parametrize("family", NATIVE, ids=lambda family: family.id)


def configuration(family, number=0):
    return transformers.AutoConfig.for_model(family.name, **family.draw(Draw(family.id, number)))


def written(config):
    """The config.json that transformers writes."""
    return json.loads(config.to_json_string())


def ours(raw):
    """Our Config; None where we refuse."""
    try:
        return family_of(raw).from_hf(copy.deepcopy(raw))
    except ValueError:
        return None


def theirs(raw, weights):
    """(what transformers reads in config.json, logits of a text with `weights`, or of one token where they do not
    fit); None where it refuses, at the latest when the model runs."""
    raw = copy.deepcopy(raw)
    try:
        config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        fits = {k: v.shape for k, v in weights.items()} == {k: v.shape for k, v in model.state_dict().items()}
        if fits:
            model.load_state_dict(weights)
        with torch.no_grad():
            return config, model(torch.arange(20 if fits else 1)[None]).logits
    except Exception:  # of whatever kind: it is not a model
        return None


def dialect_of(family):
    return next(d for module in models.FAMILIES for d in module.DIALECTS if d.model_type == family.name and _native(d))


def _native(dialect):
    return dialect.architecture in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@families
def test_every_field_is_drawn_off_its_default(family):
    """In one case or another; a field that a dialect of ours is given fails here until it has a strategy."""
    cases = [family.draw(Draw(family.id, number)) for number in range(family.cases)]
    default = transformers.CONFIG_MAPPING[family.name]()
    keys = {key for drawn in cases for key in drawn}
    for key in keys:
        usual = getattr(default, key, None)
        assert any(drawn.get(key, usual) != usual for drawn in cases), f"{key} is always at its default"
    dialect = dialect_of(family)
    read = [ours(written(configuration(family, number))) for number in range(family.cases)]
    for field, key in dialect.fields.items():
        assert keys & set(key.names), f"no strategy draws {field}"
        if hasattr(read[0], field):
            assert len({getattr(c, field) for c in [type(read[0])(), *read]}) > 1, f"{field} is always at its default"


def older(raw, kind):
    """The config.json of the same model as transformers 4 wrote it. kind: its name for the kind of RoPE."""
    raw = copy.deepcopy(raw)
    settings = raw.pop("rope_parameters", None)
    if settings:
        names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
        if raw["model_type"] == "gpt_neox":
            names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        raw |= {old: settings.pop(key) for key, old in names.items() if key in settings}
        settings[kind] = settings.pop("rope_type")
        raw["rope_scaling"] = None if settings[kind] == "default" else settings
    return raw | {"torch_dtype": "float32", "transformers_version": "4.40.2"}


def meaning(raw):
    """What transformers reads of a config.json, bookkeeping left out."""
    said = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(copy.deepcopy(raw)).to_dict()
    settings = {k: v for k, v in (said.pop("rope_parameters", None) or {}).items() if k != "type"}
    return {k: v for k, v in said.items() if k not in ("dtype", "transformers_version")} | settings


@families
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_old_and_new_config_json_are_the_same_config(family, kind):
    for number in range(8):
        new = written(configuration(family, number))
        old = older(new, kind)
        assert ours(new) == ours(old) is not None
        assert meaning(old) == meaning(new)


#: Keys with values that transformers refuses and we read: initial weights of a deviation above 1; a width that is no
#: multiple of the heads where head_dim is given; no number of key/value heads for as many as there are heads, which is
#: what its classes mean by it, though some no longer let it pass; max_window_layers beside layer_types, unread; a pad
#: token beyond the vocabulary.
LENIENT = collections.defaultdict(
    set,
    llama={"initializer_range", "hidden_size", "num_attention_heads"},
    mistral={"num_key_value_heads"},
    qwen2={"max_window_layers"},
    glm={"vocab_size", "pad_token_id"},
    glm4={"vocab_size", "pad_token_id"},
)


#: Keys that say nothing about the model. Falcon's scores are wrong where they are asked for: its mask is then of truth
#: values, which are added.
UNSAID = {"model_type", "architectures", "output_attentions"}


@families
def test_config_json_says_to_us_what_it_says_to_transformers(family):
    """Every key with other values: a value that transformers refuses for a key that we read we refuse; an absent or
    null key means what it means there; and what leaves our Config as it was leaves transformers' logits as they
    were."""
    base = configuration(family).to_dict()
    torch.manual_seed(0)
    weights = transformers.AutoModelForCausalLM.from_config(configuration(family)).state_dict()
    before, logits = ours(base), theirs(base, weights)[1]
    read = {name for key in dialect_of(family).fields.values() for name in key.names}
    problems = []
    for key in base.keys() - UNSAID:
        for other in alternatives(base[key]):
            absent = {k: v for k, v in base.items() if k != key}
            raw = absent if other is ABSENT else absent | {key: other}
            mine = ours(raw)
            if mine is None:
                continue
            said = theirs(raw, weights)
            if said is None:  # version 5 refuses many a null that meant the default before
                said = theirs(without_null(raw, key), weights)
            if said is None:
                if key in read - LENIENT[family.name] | {"rope_parameters"}:
                    problems.append(f"{key}={other!r} is refused by transformers, read by us: {changes(before, mine)}")
            elif there := changes(mine, ours(said[0].to_dict())):
                problems.append(f"{key}={other!r} changes {changes(before, mine)}, in transformers also {there}")
            elif mine == before and not torch.allclose(said[1], logits, rtol=0, atol=1e-4):
                problems.append(f"{key}={other!r} changes transformers' logits and not our Config")
    assert not problems, "\n".join(problems)


def without_null(raw, key):
    value = raw.get(key)
    if isinstance(value, dict):
        return raw | {key: {k: v for k, v in value.items() if v is not None}}
    return {k: v for k, v in raw.items() if k != key or v is not None}


def alternatives(value):
    """Other values of a setting; of a dictionary also with one of its settings changed."""
    number = float if isinstance(value, float) else int
    yield from (ABSENT, None, number(-1), number(0), number(3), "x", 0.7, True, False)
    if isinstance(value, dict):
        for key, setting in value.items():
            for other in alternatives(setting):
                yield {k: v for k, v in value.items() if k != key} | ({} if other is ABSENT else {key: other})
    elif isinstance(value, int | float):
        yield from (value + 1, 2 * value)


def changes(before, after):
    """The fields in which two of our Configs differ, with the values of the second."""
    if after is None or type(before) is not type(after):
        return {"config": after}
    first, second = ({f.name: getattr(c, f.name) for f in dataclasses.fields(c)} for c in (before, after))
    for fields in (first, second):
        if "mlp_width" in fields:
            fields["mlp_width"] = fields["mlp_width"] or 4 * fields["width"]
    return {name: value for name, value in second.items() if value != first[name]}
