"""What a run uses: time, by what it is spent on, floating-point operations and memory."""

import resource
import sys
import time

import jax


class Usage:
    """Measures the use of a run for its log.

    Args:
        tokens: In one step.
        flops: Of one token, forward and backward pass (`flops.train_flops_per_token`).
        peak: FLOP/s of all devices together; None if unknown.
    """

    def __init__(self, tokens: int, flops: int, peak: float | None):
        self._tokens, self._flops, self._peak = tokens, flops, peak
        self._began = time.perf_counter()
        self._training = 0.0  # seconds of training steps
        self._waited = 0.0  # seconds in which the device waited for data
        self._waited_before = 0.0

    def waited(self, seconds: float) -> None:
        """Adds the time of making a batch before whose end the device had nothing to do any more."""
        self._waited += seconds

    def record(self, seconds: float | None, steps: int) -> dict[str, float | None]:
        """Numbers for the log, by name.

        tokens_per_second; flops_per_second, of the model (recomputation is not counted); mfu, that divided by the peak
        (model FLOPs utilisation, Chowdhery et al. 2022, appendix B); data_wait, seconds a step in which the device
        waited for data, at most; goodput, the share of the time since the start that training steps took which did not
        wait (the rest is compiling, saving, evaluating and waiting); peak_memory, bytes; time, seconds since 1970.

        Args:
            seconds: Of a step, a mean over the latest steps; None if not known yet.
            steps: Number of the latest steps.
        """
        self._training += (seconds or 0.0) * steps
        waited, self._waited_before = self._waited - self._waited_before, self._waited
        speed = self._tokens / seconds if seconds else None
        useful = max(0.0, self._training - self._waited)
        return {
            "tokens_per_second": speed,
            "flops_per_second": speed and speed * self._flops,
            "mfu": speed and self._peak and speed * self._flops / self._peak,
            "data_wait": waited / steps if steps else None,
            "goodput": useful / (time.perf_counter() - self._began),
            "peak_memory": peak_memory(),
            "time": time.time(),
        }


def peak_memory() -> int:
    """Bytes that were in use at most: of the first local device, or of this process where devices count none (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # Linux counts in KiB
