"""PyTorch's side of benchmarks/attention_cpu.py: `scaled_dot_product_attention` as it comes, causal, grouped queries.

Prints one JSON line: milliseconds of every run by pass and length, after one that is not timed.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F

*sizes, dtype = sys.argv[1:7]
heads, kv_heads, width, threads, runs = map(int, sizes)
torch.set_num_threads(threads)
torch.manual_seed(0)


def timed(function):
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return times[1:]


milliseconds = {}
for length in map(int, sys.argv[7:]):
    query, key, value, cotangent = (
        torch.randn(1, h, length, width).to(getattr(torch, dtype)) for h in (heads, kv_heads, kv_heads, heads)
    )

    def forward():
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)  # noqa: B023

    def both():
        torch.autograd.grad(forward(), (query, key, value), cotangent)  # noqa: B023

    with torch.inference_mode():
        milliseconds[f"{length} forward"] = timed(forward)
    for x in (query, key, value):
        x.requires_grad_()
    milliseconds[f"{length} forward + backward"] = timed(both)
print(json.dumps({"milliseconds": milliseconds, "version": f"torch {torch.__version__}"}))
