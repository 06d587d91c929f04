"""Fine-tunes a model that was trained before, in Python: its weights, its tokenizer, a text of your own.

The command does the same: garrulax train MODEL corpus=my_folder
Run: python examples/finetune.py MODEL my_text.txt --out runs/tuned
"""

import argparse
import pathlib

import garrulax as gx
from garrulax.train import batches, corpus, loop, settings, shards

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a model folder, a GGUF file, or a name on the Hugging Face hub")
parser.add_argument("text", nargs="+", help="files, folders or patterns")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--window", type=int, default=256)
parser.add_argument("--out", default="runs/tuned", help="folder of the run")
args = parser.parse_args()

model = gx.load(args.model, dtype="float32")
low = settings.finetuning(model.config, {"steps": args.steps, "window": args.window})  # defaults for such models
chosen, config = settings.apply_changes(low, config=model.config)
dataset = shards.build_shards(corpus.Corpus(args.text), model.tokenizer)
data = batches.make_data(dataset, chosen, config, model.tokenizer)
run = loop.Run(config, chosen, data, pathlib.Path(args.out), params=model.params)


def export(result):
    """Saves the model in the format that it came from, with its tokenizer, chat template and generation settings."""
    gx.save(model.replace(params=result.params), run.folder / "model")


result = loop.train(run, on_finish=export)
print(f"held-out loss {result.evaluation.loss:.4f} after {result.step} steps; the model is in {run.folder / 'model'}")
