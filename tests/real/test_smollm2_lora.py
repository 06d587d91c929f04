"""A LoRA adapter of SmolLM2-135M-Instruct, trained on the codes of its GGUF file; and its quantised forms.

As in test_smollm2.py, `make real` installs the file.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from smollm2_texts import PASSAGE

import garrulax as gx
from garrulax.cli import main
from garrulax.hub.converting import convert_folder

pytestmark = pytest.mark.real
PAGES = Path(__file__).parent.parent.parent / "docs"
STEPS, HELD_OUT = 12, "quantisation.md"


@pytest.fixture(scope="module")
def run(path, tmp_path_factory):
    """The folder of a run on the pages of documentation, without the page `HELD_OUT`."""
    place = tmp_path_factory.mktemp("lora")
    (place / "pages").mkdir()
    for page in sorted(PAGES.glob("*.md")):
        if page.name != HELD_OUT:
            shutil.copy(page, place / "pages")
    words = ["batch=4", "window=64", f"steps={STEPS}", f"eval_every={STEPS}", f"checkpoint_every={STEPS // 2}"]
    words += ["eval_tokens=512", f"corpus={place / 'pages'}", "--lora", "rank=8", "--run", str(place / "run")]
    assert main(["train", str(path), *words]) == 0
    return place / "run"


def test_the_loss_of_a_held_out_page_falls(run, path):
    model, text = gx.load(path, dtype="float32"), (PAGES / HELD_OUT).read_text(encoding="utf-8")[:2500]
    before, after = (gx.perplexity(m, text, window=256) for m in (model, gx.load_adapter(model, run / "adapter")))
    print(f"held-out loss {before.nll / before.tokens:.4f} before, {after.nll / after.tokens:.4f} after")
    assert after.nll / after.tokens < before.nll / before.tokens - 0.02


def test_a_resumed_run_ends_at_the_same_adapter(run, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / str(STEPS))
    shutil.rmtree(tmp_path / "again" / "adapter")
    assert main(["train", "--resume", str(tmp_path / "again")]) == 0
    ours, again = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, tmp_path / "again"))
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(again[name], tensor, name)


def test_peft_opens_the_adapter(run, path, tmp_path):
    peft, torch, transformers = map(pytest.importorskip, ("peft", "torch", "transformers"))
    model = gx.load_adapter(gx.load(path, dtype="float32"), run / "adapter")
    ids = model.tokenizer.encode(PASSAGE)[:64]
    ours = jax.jit(gx.forward, static_argnames="config")(model.params, jnp.array([ids]), model.config)[0][0]
    convert_folder(path, tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        before = base(torch.tensor([ids])).logits[0].numpy()
        theirs = peft.PeftModel.from_pretrained(base, run / "adapter")(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(theirs - before).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_codes_give_the_tokens_of_the_plain_weights(path):
    codes, plain = gx.load(path), gx.load(path, dtype="float32")
    ids = codes.tokenizer.encode(PASSAGE)[:48]
    ours, theirs = (gx.generate(m, ids, max_new_tokens=24, temperature=0.0).tokens for m in (codes, plain))
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "most"),
    [({"kind": "int8"}, 1.005), ({"kind": "int4", "group": 32}, 1.6), ({"kind": "nf4"}, 1.6)],
    ids=["int8", "int4", "nf4"],
)
def test_perplexity_of_quantised_weights(options, most, path):
    """docs/quantisation.md has the numbers on a longer text."""
    model = gx.load(path, dtype="float32")
    small, exact = (gx.perplexity(m, PASSAGE).perplexity for m in (gx.quantise(model, **options), model))
    assert small < most * exact
