"""TFLOP/s of PyTorch's scaled_dot_product_attention on a GPU, by backend; run by benchmarks/attention.py.

python torch_attention_gpu.py --lengths 4096 16384 --widths 64 128 256
"""

import argparse
import statistics
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

TOKENS, MODEL = 16384, 2048
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def seconds(call, rounds: int = 7) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--widths", type=int, nargs="+")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for causal in (False, True):
        for width in args.widths:
            for length in args.lengths:
                batch, heads = TOKENS // length, MODEL // width
                q, k, v, c = (
                    torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)
                )
                flops = 4 * batch * heads * length**2 * width * ((length + 1) / 2 / length if causal else 1)
                for name, backend in BACKENDS.items():
                    report(name, backend, (q, k, v, c), causal, flops)


def report(name, backend, arrays, causal, flops) -> None:
    q, k, v, c = arrays
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both():
        out = scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, c)

    title = f"  {'causal' if causal else 'full':8s} D{q.shape[3]:<4d} T{q.shape[2]:<6d} torch {name:9s}"
    try:
        with sdpa_kernel(backend):
            ahead, together = seconds(forward), seconds(both)
    except RuntimeError as error:
        print(f"{title} {str(error).splitlines()[0][:80]}")
        return
    speeds = flops / ahead / 1e12, 2.5 * flops / (together - ahead) / 1e12
    print(f"{title} forward {speeds[0]:6.1f} TFLOP/s, backward {speeds[1]:6.1f}", flush=True)


if __name__ == "__main__":
    main()
