"""Models that `gx.save` writes in compressed-tensors' format: the floats of the library, and logits of transformers."""

import jax
import numpy as np
import pytest

import garrulax as gx
from garrulax.hub.quantised.schemes import take_scheme
from garrulax.hub.reading import read_config_json

torch = pytest.importorskip("torch")
forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

CONFIG = gx.preset("llama-tiny", layers=2, width=64, heads=4, kv_heads=2, mlp_width=96, vocab=131, tied=False, eos=None)
MODEL = gx.Model(CONFIG, gx.init(CONFIG, jax.random.key(0)))
IDS = np.random.default_rng(0).integers(0, 131, (2, 9))


def saved(path, **options):
    small = gx.quantise(MODEL, tables=None, **options)
    gx.save(small, path)
    return small


SAME = [{"kind": "int4", "group": 32}, {"kind": "int8"}, {"kind": "fp8"}, {"kind": "w8a8"}]


@pytest.mark.parametrize("options", SAME)
def test_transformers_computes_the_same_logits(options, tmp_path, monkeypatch):
    """For W8A8, compressed-tensors divides the largest activation of a row by 127.5, vLLM and we by 127."""
    their_scales = forward.compute_dynamic_scales_and_zp

    def scales(*args, **kwargs):
        scale, zero = their_scales(*args, **kwargs)
        return scale * (127.5 / 127), zero

    monkeypatch.setattr(forward, "compute_dynamic_scales_and_zp", scales)
    small = saved(tmp_path / "a", **options)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    logits = theirs(torch.tensor(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(gx.forward(small.params, IDS, CONFIG)[0], logits, atol=1e-5)


FORMS = [{"kind": "int4", "group": 16, "symmetric": False}, {"kind": "int8", "symmetric": False}, {"kind": "mxfp4"}]


@pytest.mark.parametrize("options", FORMS)
def test_their_decompressor_gives_the_same_weights(options, tmp_path):
    """transformers cannot load packed zero points with compressed-tensors 0.20 (it expects them unpacked)."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    small = saved(tmp_path / "a", **options)
    raw = read_config_json(tmp_path / "a")
    assert take_scheme(raw, tmp_path)[1] is not None
    group = raw["quantization_config"]["config_groups"]["group_0"]
    stored = safetensors.load_file(tmp_path / "a" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj."
    parts = {key.removeprefix(name): tensor for key, tensor in stored.items() if key.startswith(name)}
    compressor = BaseCompressor.load_from_registry(group["format"])
    theirs = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
    ours = np.asarray(small.params["blocks"]["mlp"]["up"].dense())[1].T
    np.testing.assert_allclose(theirs.float().numpy(), ours, rtol=2**-8 if options["kind"] == "mxfp4" else 1e-6)
