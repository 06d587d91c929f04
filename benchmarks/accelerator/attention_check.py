"""Attention on this device, case by case: output and every gradient, on new random numbers, computed twice.

The reference is the XLA implementation in float32 at the highest precision of products, compiled once for each case;
the tests compare it with the formula in float64 on a CPU.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp

from accelerator import attention_cases as cases
from accelerator import device
from accelerator.comparing import report, report_error
from accelerator.timing import in_threads
from accelerator.workers import plan
from garrulax.kernels.attention import attention

IMPLEMENTATIONS = {"gpu": ("pallas_gpu", "cudnn"), "tpu": ("pallas_tpu",), "cpu": ("xla",)}
LEARNED = ("bias", "sinks", "relative")


def gradients(case: cases.Case, extras: dict[str, Any], implementation: str) -> Any:
    """A function of operands, learned arguments, mask and cotangent: the output and all gradients, jitted."""
    fixed = {name: x for name, x in extras.items() if name not in LEARNED}
    call = functools.partial(attention, implementation=implementation, **fixed)

    @jax.jit
    def both(operands, learned, mask, cotangent):
        out, back = jax.vjp(lambda x, y: call(*x, mask=mask, **y), operands, learned)
        return out, *back(cotangent.astype(out.dtype))

    return both


def check(case: cases.Case, seed: int, length: int, implementations: tuple[str, ...]) -> None:
    """Reports a row for each implementation and dtype."""
    operands, mask, extras, cotangent = cases.request(case, seed, length)
    learned = {name: x for name, x in extras.items() if name in LEARNED}
    reference = gradients(case, extras, "xla")
    for dtype in case.dtypes:
        rounded = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), (operands, cotangent))
        exact = None
        for name in implementations:
            title = f"{case.name} {dtype} {name}"
            row: dict[str, Any] = {"case": case.mask, "extras": case.extras, "implementation": name, "seed": seed}
            start = time.perf_counter()
            try:
                lowered = gradients(case, extras, name).lower(rounded[0], learned, mask, rounded[1])
            except Exception as error:
                report_error(title, error, row)
                continue
            try:
                program = lowered.compile()
                row["compile_s"] = round(time.perf_counter() - start, 1)
                if exact is None:
                    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
                    with jax.default_matmul_precision("highest"):
                        exact = jax.device_get(reference(wide[0], learned, mask, wide[1]))
                got, again = (jax.device_get(program(rounded[0], learned, mask, rounded[1])) for _ in range(2))
            except Exception as error:  # what fails is reported; the other cases are compared
                report_error(title, error, row)
                continue
            report(title, dtype, got, again, exact, row)


def main() -> None:
    """Checks a share of the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", default="0/1", help="i/n: every n-th case from the i-th on")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.tiny:
        device.accelerator()
    first, step = map(int, args.share.split("/"))
    names = IMPLEMENTATIONS[jax.default_backend()]
    length = 96 if args.tiny else 1000  # no multiple of a block
    some = list(enumerate(cases.TINY if args.tiny else cases.CASES))[first::step]
    if args.tiny:
        some = [(i, c) for i, c in some if not c.length]
    plan(len(names) * sum(len(case.dtypes) for _, case in some))
    in_threads(lambda job: check(job[1], args.seed + job[0], length, names), some, threads=2)


if __name__ == "__main__":
    main()
