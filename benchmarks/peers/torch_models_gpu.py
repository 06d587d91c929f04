"""What a user of transformers would run on a GPU: LLaMA and GPT-2 with SDPA; run by benchmarks/gpu.py.

`train`: bfloat16 autocast, torch.compile, fused AdamW, clipping. `decode`: `generate`, bfloat16. The sizes are those of
`accelerator/train.py` and `accelerator/decode.py`; with --tiny it runs on a CPU. Prints lines of JSON like
`accelerator.workers`.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import transformers

SIZES = {"vocab_size": 32000, "num_attention_heads": 32}
LLAMA_1B = {**SIZES, "hidden_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 8, "intermediate_size": 8192}
LLAMA_7B = {
    **SIZES,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
}
TINY = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 64}  # fmt: skip
VERSION = f"torch {torch.__version__}, transformers {transformers.__version__}"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def emit(table, name, text, **values) -> None:
    row = {"table": table, "name": name, "text": f"  {text}", "version": VERSION, **values}
    print(json.dumps(row), flush=True)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def llama(sizes, length):
    config = transformers.LlamaConfig(
        **sizes, max_position_embeddings=length, eos_token_id=None, use_cache=True, attn_implementation="sdpa"
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**drops, attn_implementation="sdpa"))


def on_device(make):
    with torch.device(DEVICE):
        return make()


def train(title, model, batch, length, rounds=3, steps=4) -> None:
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    function = torch.compile(model)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=DEVICE)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = function(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    start = time.perf_counter()
    step()
    wait()
    first = time.perf_counter() - start
    for _ in range(2):
        step()
    wait()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        found.append((time.perf_counter() - start) / steps)
    each = statistics.median(found)
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None
    rate = batch * length / each
    text = f"{title:40s} {1e3 * each:7.1f} ms, {rate:9,.0f} tokens/s, first step {first:.0f} s"
    emit("train", title, text, ms=1e3 * each, tokens_per_s=rate, memory_GiB=peak, compile_s=first)


def decode(title, model, batch, prompt, new) -> None:
    model.eval()
    tokens = torch.randint(0, model.config.vocab_size, (batch, prompt), device=DEVICE)

    def call(count):
        start = time.perf_counter()
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        wait()
        return time.perf_counter() - start

    first, seconds = call(new // 4), {}
    for count in (new, new // 4):
        seconds[count] = statistics.median(call(count) for _ in range(2))
    each = (seconds[new] - seconds[new // 4]) / (new - new // 4)
    text = f"{title:28s} {1e3 * each:6.2f} ms a token, {batch / each:7,.0f} tokens/s"
    emit("decode", title, text, ms=1e3 * each, tokens_per_s=batch / each, first_call_s=first)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "decode"))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny and DEVICE == "cpu":
        raise SystemExit(f"torch {torch.__version__} of {sys.executable} finds no GPU: install its CUDA build")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if args.what == "train":
        print(json.dumps({"ready": True}), flush=True)
        sys.stdin.readline()
        if args.tiny:
            train("tiny:B2:T32 torch.compile", llama(TINY, 32), 2, 32)
            return
        train("llama-1b:B4:T4096 torch.compile", on_device(lambda: llama(LLAMA_1B, 4096)), 4, 4096)
        torch.compiler.reset()
        train("gpt2:B32:T1024 torch.compile", on_device(gpt2), 32, 1024)
        return
    torch.set_default_dtype(torch.bfloat16)
    model = on_device(lambda: llama(TINY if args.tiny else LLAMA_7B, 4096))
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    for batch in (1, 8):
        name = "tiny" if args.tiny else "llama2-7b"
        decode(f"{name} B{batch} torch", model, batch, 16 if args.tiny else 128, 16 if args.tiny else 64)


if __name__ == "__main__":
    main()
