"""The config.json of published models (../config_files.json) mean the same to us as to transformers."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
import peer  # noqa: F401 (quiets transformers)
import torch
import transformers

import garrulax as gx
from garrulax import models
from garrulax.core.hf import IRRELEVANT
from garrulax.hub.reading import family_of

FILES = json.loads((Path(__file__).parents[1] / "config_files.json").read_text())
#: Keys for which transformers fills in what the file leaves out, or has another word for the same.
SAID_OTHERWISE = {
    "architectures", "attention_types", "ffn_hidden_size", "max_window_layers", "model_type", "multi_query",
    "num_kv_heads", "rope_parameters",
}  # fmt: skip


def peer_type(raw):
    """The model_type of transformers' class; None for models whose code lies beside their checkpoints."""
    if "model_type" not in raw:
        return "gpt2"
    own = raw["model_type"] != "glm" or "num_key_value_heads" in raw
    return raw["model_type"] if own and raw["model_type"] in transformers.CONFIG_MAPPING else None


NAMES = [name for name, row in FILES.items() if row["expected"] == "read" and peer_type(row["config"])]


@pytest.mark.parametrize("name", NAMES)
def test_published_files_agree(name):
    row = FILES[name]
    raw = row["config"]
    theirs = transformers.CONFIG_MAPPING[peer_type(raw)].from_dict(copy.deepcopy(raw))
    with torch.device("meta"):
        count = transformers.AutoModelForCausalLM.from_config(theirs).num_parameters()
    ours = family_of(raw).from_hf(raw)
    assert count == gx.count(ours) == row["parameters"]
    written, said = json.loads(json.dumps(family_of(raw).to_hf(ours))), theirs.to_dict()
    for key in written.keys() & said.keys() - SAID_OTHERWISE:
        assert written[key] == said[key], key
    again = family_of(said).from_hf(said)  # with what transformers filled in
    if ours.mlp_width is None:  # 4 times the width
        again = dataclasses.replace(again, mlp_width=None)
    assert again == ours


def test_transformers_classes_have_no_key_that_only_a_warning_names():
    """Every setting of the classes is in a table, so that the rule for unknown keys never meets one."""
    for module in models.FAMILIES:
        for dialect in module.DIALECTS:
            if dialect.remote or dialect.model_type not in transformers.CONFIG_MAPPING:
                continue
            known = {name for key in dialect.fields.values() for name in key.names}
            known |= {"model_type", *dialect.fixed, *dialect.ignored, *dialect.pinned, *IRRELEVANT}
            keys = {key for key in transformers.CONFIG_MAPPING[dialect.model_type]().to_dict() if key[0] != "_"}
            assert {key for key in keys - known if not key.endswith("_token_id")} <= {"layer_types"}, dialect.model_type
