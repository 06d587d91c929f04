"""Fine-tuning in a plain Flax NNX program: the model is an nnx.Module, and the loop is an ordinary NNX loop.

Fine-tunes the model of a folder (`--model runs/quickstart-gpt/model`), or trains a new small LLaMA on bytes. The text
is the source of Python's standard library. Run: python examples/nnx_finetune.py
"""

import argparse
import pathlib

import numpy as np
import optax
from flax import nnx

import garrulax as gx
from garrulax.flax import nnx_module, params_of
from garrulax.hub.tokenizers import ByteTokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", help="folder of a model to fine-tune")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="runs/nnx-finetune", help="folder to save the result in")
args = parser.parse_args()

if args.model:
    loaded = gx.load(args.model)
    config, tokenizer = loaded.config, loaded.tokenizer
    model = nnx_module(config, params=loaded.params)  # it uses the arrays of `params`, not copies
else:
    tokenizer = ByteTokenizer()
    config = gx.preset("llama-tiny", vocab=tokenizer.vocab, layers=2, eos=tokenizer.eos)
    model = nnx_module(config, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(4e-3, b2=0.99), wrt=nnx.Param)


def loss(model, tokens):
    """Cross entropy of the next token, in nats."""
    logits, _ = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, tokens):
    value, gradients = nnx.value_and_grad(loss)(model, tokens)
    optimizer.update(model, gradients)
    return value


library = pathlib.Path(pathlib.__file__).parent
text = "".join(f.read_text("utf-8", "replace") for f in sorted(library.glob("*.py"))[:60])
ids = np.array(tokenizer.encode(text), np.int32)
rng = np.random.default_rng(0)
for i in range(args.steps):
    starts = rng.integers(0, len(ids) - 97, 16)
    value = step(model, optimizer, np.stack([ids[s : s + 97] for s in starts]))
    if i % 25 == 0 or i == args.steps - 1:
        print(f"step {i:4d}  loss {value:.3f} nats per token")

finished = gx.Model(config, params_of(model), tokenizer)  # back from NNX to a tree of parameters
gx.save(finished, args.out)
print(f"saved to {args.out}; it writes:", repr(gx.generate(finished, "def ", max_new_tokens=40, temperature=0.5).text))
