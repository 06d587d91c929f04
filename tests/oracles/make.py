"""Makes a reference case: a tiny random model of a class of transformers, run by transformers itself.

    python tests/oracles/make.py NAME MODEL_TYPE SETTINGS [FOLDER]

NAME is the name of the case, MODEL_TYPE that of the class in transformers, and SETTINGS its config as a JSON object or
the path of a file with one. Writes NAME_s0.safetensors (weights), NAME_s0.npz (input_ids, logits) and NAME_s0.json
(class, config) into FOLDER, by default the folder of this script.
"""

import json
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch
import transformers


def make(name, model_type, settings, folder):
    random = np.random.default_rng(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # biases too, and scales around 1: nothing is left at 0 or 1
            scale = parameter.ndim == 1 and key.endswith("weight")
            values = random.normal(float(scale), 0.1 if scale else 0.08, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))
        tokens = random.integers(3, config.vocab_size, (2, 12))
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)  # names the tensors as a checkpoint does
        shutil.copyfile(f"{saved}/model.safetensors", folder / f"{name}_s0.safetensors")
    np.savez(folder / f"{name}_s0.npz", input_ids=tokens, logits=logits)
    described = {"class": type(model).__name__, "config": json.loads(config.to_json_string(use_diff=False))}
    described["config"]["architectures"] = [type(model).__name__]
    (folder / f"{name}_s0.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    name, model_type, settings, *folder = sys.argv[1:]
    text = settings if settings.lstrip().startswith("{") else pathlib.Path(settings).read_text()
    make(name, model_type, json.loads(text), pathlib.Path(*folder) if folder else pathlib.Path(__file__).parent)
