"""The Python code that README and docs show: it runs as it stands, or is an excerpt of a file of the repository.

Only names of files and sizes are other ones, and arrays that a text leaves to the reader are given here.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import gguf_files
import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest
from tiny import byte_model

import garrulax as gx

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parent.parent
#: Meshes, GGUF files, Medusa and plans have tests of their own.
SLOW = ("fsdp=4", ".gguf", "train_medusa", "gx.plan(")
#: test_docs_constraints, test_evaluate, test_search, test_speculate
ELSEWHERE = ("constraints.md", "evaluation.md", "search.md", "speculation.md")


def blocks(page):
    """The blocks of code of a page; of one whose blocks build on one another, all of them as one."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return (
        ["".join(found)]
        if page.name in ("sampling.md", "decoding.md", "medusa.md", "lora.md", "alignment.md")
        else found
    )


CODE = [
    pytest.param(page, code, id=f"{page.name}-{number}", marks=[pytest.mark.slow] * any(part in code for part in SLOW))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.name not in ELSEWHERE
    for number, code in enumerate(blocks(page))
]
SMALLER = {
    'gx.preset("gpt2")': 'gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96)',
    'gx.preset("llama3-8b")': 'gx.preset("llama-tiny", layers=1, width=32, vocab=96, mlp_width=48)',
    "max_new_tokens=64": "max_new_tokens=8",
    "max_new_tokens=100_000, cache=gx.sinks(4, 1020)": "max_new_tokens=8, cache=gx.sinks(4, 20)",
    'gx.preset("llama-tiny", eos=None)': 'gx.preset("llama-tiny", layers=1, width=32, mlp_width=48, eos=None)',
    "max_new_tokens=1000": "max_new_tokens=140",
    "range(1000)": "range(200)",
    'gx.preset("gpt2-tiny", eos=None)': 'gx.preset("gpt2-tiny", layers=1, width=32, heads=2, eos=None)',
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def saved(folder, model, **settings):
    gx.save(gx.Model(model.config, model.params, model.tokenizer), folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def chat_gguf():
    """A LLaMA with a byte-level BPE of 400 tokens and a chat template."""
    model = json.loads(made.byte_level_bpe(specials=("<|im_start|>", "<|im_end|>")).to_str())["model"]
    stored = gguf_files.stored_of("llama_gqa")
    wide = np.random.default_rng(0).normal(size=(400, stored["token_embd.weight"].shape[1])).astype(np.float32)
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].get),
        "tokenizer.ggml.token_type": [3] * 2 + [1] * 398,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "llama.context_length": 96,
    }  # fmt: skip
    embeddings = {"token_embd.weight": wide, "output.weight": wide}
    return gguf_files.file(gguf_files.metadata_of("llama_gqa") | metadata, stored | embeddings)


def files(place, code):
    """The files that a block names."""
    if "path/to/gpt2" in code:
        saved(place / "path/to/gpt2", byte_model("gpt", layers=1))
    if ".gguf" in code:
        (place / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(chat_gguf())
    if "path/to/model" in code:
        saved(place / "path/to/model", byte_model("gpt", layers=1, eos=256))
    for name in ("path/to/adapter", "adapters/french", "adapters/code"):
        if name in code:
            gx.save_adapter(gx.lora(gx.load(place / "path/to/model"), rank=2, alpha=4), place / name)
    if "path/to/glm" in code:
        saved(place / "path/to/glm", byte_model("glm", layers=1))
    if "chatglm3-6b" in code:
        saved(place / "path/to/chatglm3-6b", byte_model("chatglm", layers=1, eos=256), chat_template=TEMPLATE)
    if '"tiny"' in code:
        config = gx.preset("pythia-14m", layers=1, width=32, heads=4, mlp_width=40, vocab=96)
        gx.save(gx.Model(config, gx.init(config, jax.random.key(0))), place / "tiny")


def given(code):
    """What README's sections have from earlier ones, and arrays of the reader: texts of 8 tokens, 2 rows."""
    tokens = np.arange(16).reshape(2, 8) % 7
    config = gx.preset("gpt2-tiny", layers=1, width=32, heads=2, vocab=96)
    numbers = np.random.default_rng(0).normal(size=(3, 1, 8, 2, 8)).astype(np.float32)
    positions = np.broadcast_to(np.arange(8), (2, 8))
    family = "llama" if "gx.sinks" in code else "gpt"
    return {
        "jax": jax, "gx": gx, "tokens": tokens, "config": config,
        "params": gx.init(config, jax.random.key(0)) if "params=params" in code else None,
        "context_lengths": jnp.array([3, 8]), "positions": np.stack([positions, 0 * positions], 1),
        "query": numbers[0], "key": numbers[1], "value": numbers[2], "sinks": jnp.zeros(2),
        "segment": jnp.array([[0, 0, 0, 1, 1, 1, 1, -1]]), "rank": jnp.arange(8)[None],
        "context": jnp.array([[1, 1, 0, 1, 1, 0, 0, 0]]),
        "model": byte_model(family, layers=1, eos=256) if "model, " in code else None,
        "prompts": ["One", "Two"], "prompt": "One",
        "my_loss": lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params)),
    }  # fmt: skip


def excerpt_of(code):
    """The file from which all lines of a block are, up to a "..." for what is left out; None if there is none."""
    parts = [part for line in code.splitlines() if (part := re.split(r"^\.\.\.$|, \.\.\.", line.strip())[0])]
    places = [path for folder in ("garrulax/models", "tests/families") for path in (ROOT / folder).rglob("*.py")]
    return next((path for path in places if all(part in path.read_text("utf-8") for part in parts)), None)


@pytest.mark.parametrize(("page", "code"), CODE)
def test_code_of_the_documents(page, code, tmp_path, monkeypatch):
    names = set(re.findall(r"\bgx\.(\w+)", code))
    assert names <= {*gx.__all__}, names - {*gx.__all__}
    if excerpt_of(code) is not None:
        return
    monkeypatch.chdir(tmp_path)
    files(tmp_path, code)
    for shown, smaller in SMALLER.items():
        code = code.replace(shown, smaller)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, str(page), "exec"), given(code))
