"""Times the import of garrulax, and tracing and lowering a training step of a LLaMA with 70 billion parameters.

    python benchmarks/startup.py

Prints the seconds that `import garrulax`, and the first use of its public names, add to `import jax` (medians of five
new processes each); the seconds to trace and lower one AdamW step of llama2-70b on an abstract state; and the peak
memory of the process, which shows that no parameter is allocated.
"""

import resource
import statistics
import subprocess
import sys
import time


def imports() -> tuple[float, float]:
    """Median seconds that importing garrulax, and importing and using its whole API, add to importing jax."""

    def seconds(code):
        program = f"import time; s = time.perf_counter(); {code}; print(time.perf_counter() - s)"
        runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True) for _ in range(5)]
        return statistics.median(float(run.stdout) for run in runs)

    alone = seconds("import jax")
    names = "gx.forward, gx.load, gx.generate, gx.fill"
    return seconds("import jax, garrulax") - alone, seconds(f"import jax, garrulax as gx; {names}") - alone


def lower() -> tuple[float, str]:
    """Seconds to trace and lower the step, and the first characters of the lowered program."""
    import jax

    import garrulax as gx
    from garrulax.models import llama
    from garrulax.train import objectives, optimizers, settings, state, step

    config = gx.preset("llama2-70b")
    run = settings.Settings(optimizer="adamw", batch=8, window=4096, precision="bfloat16", remat="dots")
    start = time.perf_counter()
    optimizer = optimizers.make_optimizer(run, llama.parameters(config))
    abstract = state.abstract_state(config, optimizer)
    rows = jax.ShapeDtypeStruct((1, run.batch, run.window), "int32")
    batch = {"tokens": rows, "targets": rows, "weights": jax.ShapeDtypeStruct(rows.shape, "float32")}
    update = step.make_train_step(config, run, optimizer, objectives.causal_lm)
    lowered = update.lower(abstract, batch)
    return time.perf_counter() - start, lowered.as_text()[:60]


if __name__ == "__main__":
    imported, used = imports()
    print(f"import garrulax adds {imported:.3f} s to import jax, and first use of its whole API {used:.3f} s")
    seconds, text = lower()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"llama2-70b: train step traced and lowered in {seconds:.1f} s, peak memory of the process {peak:.2f} GiB")
    print(text)
