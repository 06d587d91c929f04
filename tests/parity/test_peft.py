"""Adapters that we save open in PEFT, and those that PEFT saves open here: the logits are the same."""

import dataclasses

import pytest

pytest.importorskip("torch", reason="`make parity` installs torch and transformers")
pytest.importorskip("peft", reason="`make parity` installs peft")
import jax
import jax.numpy as jnp
import numpy as np
import peft
import tiny
import torch
import transformers

import garrulax as gx
from garrulax.core.leaf import map_weights
from garrulax.core.lora import Lora

IDS = np.array([[5, 17, 3, 90], [9, 2, 44, 1]])
#: Family -> targets; the query, key and value of Falcon are one tensor for PEFT, and three pairs here.
OURS = {
    "gpt": {"targets": "all", "rslora": True},
    "llama": {"targets": ["query", "up", "head"]},
    "falcon": {"targets": "all"},
    "gpt_neox": {"targets": "all", "dora": True},
    "opt": {"targets": ["fc1", "out"]},
}


def filled(params):
    def one(w):
        if not isinstance(w, Lora):
            return w
        draw = np.random.default_rng(w.a.size).normal
        return dataclasses.replace(w, **{n: jnp.asarray(0.2 * draw(size=getattr(w, n).shape), "float32") for n in "ab"})

    return map_weights(one, params)


def saved(config, folder):
    model = gx.Model(config, tiny.params(config))
    gx.save(model, folder)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def ours(model):
    return np.asarray(gx.forward(model.params, jnp.asarray(IDS, jnp.int32), model.config)[0])


@pytest.mark.parametrize("name", list(OURS))
def test_peft_opens_our_adapters(name, tmp_path):
    model, peer = saved(tiny.CONFIGS[name], tmp_path / "base")
    adapted = gx.lora(model, rank=3, alpha=5, **OURS[name])
    adapted = adapted.replace(params=filled(adapted.params))
    gx.save_adapter(adapted, tmp_path / "adapter")
    wanted = ours(adapted)
    assert np.abs(wanted - ours(model)).max() > 1e-2
    opened = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    np.testing.assert_allclose(theirs(opened), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("falcon", {"target_modules": ["query_key_value"], "r": 3, "lora_alpha": 5}),
        ("falcon", {"target_modules": "all-linear", "r": 2, "use_rslora": True}),
        ("gpt_neox", {"r": 3, "use_dora": True}),
        ("llama", {"target_modules": ["lm_head", "q_proj"], "r": 2}),
        ("gpt", {"target_modules": ["wte", "c_attn"], "r": 2, "fan_in_fan_out": True}),
        ("opt", {"target_modules": ["fc2"], "r": 2, "bias": "all"}),
    ],
)
def test_we_open_adapters_of_peft(name, options, tmp_path):
    model, peer = saved(tiny.CONFIGS[name], tmp_path / "base")
    wrapped = peft.get_peft_model(peer, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for i, (key, p) in enumerate(wrapped.named_parameters()):
            if p.requires_grad:
                torch.manual_seed(i)
                p.add_(0.2 * torch.randn_like(p) * (0.1 if "magnitude" in key else 1))
    wrapped.save_pretrained(tmp_path / "adapter")
    adapted = gx.load_adapter(model, tmp_path / "adapter")
    wanted = theirs(wrapped)
    assert np.abs(wanted - ours(model)).max() > 1e-2
    np.testing.assert_allclose(ours(adapted), wanted, atol=2e-5 * np.abs(wanted).max())
    assert jax.tree.leaves(adapted.params)
