"""TFLOP/s of PyTorch's scaled_dot_product_attention on a GPU, by backend; run by benchmarks/gpu.py.

Prints lines of JSON like `accelerator.workers`; the sizes and the count of FLOPs are those of
`accelerator/attention_speed.py`.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

TOKENS, MODEL = 16384, 2048
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def seconds(call, rounds: int = 5) -> float:
    call()
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / 10)
    return statistics.median(found)


def report(name, backend, arrays, causal, flops) -> None:
    q, k, v, c = arrays
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both():
        out = scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, c)

    (_, _, length, width), case = q.shape, "causal" if causal else "full"
    title = f"{case} D{width} T{length} torch {name}"
    row = {"table": "speed", "name": title}
    try:
        with sdpa_kernel(backend):
            ahead, together = seconds(forward), seconds(both)
    except RuntimeError as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:80]
        print(json.dumps({**row, "text": f"  {title}: {said}", "error": said}), flush=True)
        return
    speeds = flops / ahead / 1e12, 2.5 * flops / (together - ahead) / 1e12
    row |= {"case": case, "width": width, "length": length, "implementation": f"torch {name}", "picked": False}
    row |= {"forward": speeds[0], "backward": speeds[1], "forward_ms": 1e3 * ahead}
    row |= {"backward_ms": 1e3 * (together - ahead), "version": torch.__version__}
    text = f"  {title:36s} forward {speeds[0]:6.1f} TFLOP/s, backward {speeds[1]:6.1f}"
    print(json.dumps({**row, "text": text}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    args = parser.parse_args()
    torch.zeros(1, device="cuda")
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    for width in args.widths:
        for length in args.lengths:
            for causal in (False, True):
                shape = TOKENS // length, MODEL // width, length, width
                arrays = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
                share = (length + 1) / 2 / length if causal else 1
                flops = 4 * shape[0] * shape[1] * length**2 * width * share
                for name, backend in BACKENDS.items():
                    report(name, backend, arrays, causal, flops)


if __name__ == "__main__":
    main()
