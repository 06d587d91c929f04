"""Makes search.json: diverse beam search and contrastive search by transformers 4.55.4, the last version that has both.

    python tests/oracles/make_search.py        # needs transformers==4.55.4, "tokenizers<0.22" and torch

The models are those of the cases gpt2 and llama_gqa with all matrices times 5, in float64, so that the texts are no
close calls. Each result has the model, the prompt, the arguments, and tokens and score of each sequence returned. A
group that is done writes the pad token, which the groups after it then avoid; so it is suppressed.
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import load_file

FOLDER = pathlib.Path(__file__).parent
FIELDS = {
    "gpt2": ("GPT2", ["n_embd", "n_head", "n_inner", "n_layer", "n_positions", "vocab_size", "layer_norm_epsilon"]),
    "llama_gqa": (
        "Llama",
        ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings", "vocab_size", "rms_norm_eps", "tie_word_embeddings"],
    ),
}  # fmt: skip
PROMPTS = [[3, 14, 15, 92, 65], [27, 18, 28], [16, 18, 3, 39, 88, 74, 9]]
NEW, PAD = 14, 95
ENDS = [7, 11, 19, 23, 31, 43, 50, 62, 77, 81]
DIVERSE = [
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7, "length_penalty": 0.3, "repetition_penalty": 1.2},
    {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 2.5, "early_stopping": "never", "length_penalty": 2.0},
]
SCORES: list = []
CONTRASTIVE = [{"top_k": 4, "penalty_alpha": 0.6}, {"top_k": 8, "penalty_alpha": 0.3, "repetition_penalty": 1.2}]


def model_of(case):
    kind, fields = FIELDS[case]
    raw = json.loads((FOLDER / f"{case}_s0.json").read_text())["config"]
    theta = (raw.get("rope_parameters") or {}).get("rope_theta")
    config = getattr(transformers, f"{kind}Config")(
        **{name: raw[name] for name in fields}, **({"rope_theta": theta} if theta else {}), pad_token_id=PAD
    )
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    tensors = {k: v * 5 if v.ndim > 1 else v for k, v in load_file(FOLDER / f"{case}_s0.safetensors").items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert all(name == "lm_head.weight" for name in missing), missing
    return model.double()


def trimmed(tokens):
    """The tokens before the first end token, and whether there is one: group beam search writes another end token."""
    end = min((tokens.index(e) for e in ENDS if e in tokens), default=None)
    return tokens[:end], end is not None


def run(case, model, prompt, settings):
    ids = torch.tensor([prompt])
    returned = settings.get("num_beams", 1)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, eos_token_id=ENDS,
        pad_token_id=PAD, suppress_tokens=[PAD], num_return_sequences=returned, **settings,
    )  # fmt: skip
    sequences = [trimmed(row[len(prompt) :].tolist()) for row in out]
    scores = SCORES.pop() if returned > 1 else None
    return {"model": case, "prompt": prompt, "settings": settings, "sequences": sequences, "scores": scores}


def keep_scores(finalize):
    """Keeps the scores, which `generate` returns only together with all logits, and those not in float64."""

    def wrapped(*args, **kwargs):
        out = finalize(*args, **kwargs)
        SCORES.append([round(x, 5) for x in out["sequence_scores"].tolist()])
        return out

    return wrapped


if __name__ == "__main__":
    assert transformers.__version__ == "4.55.4", transformers.__version__
    transformers.BeamSearchScorer.finalize = keep_scores(transformers.BeamSearchScorer.finalize)
    results = []
    for case in FIELDS:
        model = model_of(case)
        results += [run(case, model, prompt, s) for s in DIVERSE + CONTRASTIVE for prompt in PROMPTS]
    lines = ",\n".join(json.dumps(result) for result in results)
    head = json.dumps({"new": NEW, "ends": ENDS, "pad": PAD})
    (FOLDER / "search.json").write_text(f'{{"common": {head}, "results": [\n{lines}\n]}}\n')
