"""What one chip can do at most: the numbers that a plan divides by."""

import dataclasses

from garrulax.core.names import nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        name: As it is written before the colon of a topology.
        kind: JAX's `device_kind`.
        platform: "tpu" or "gpu".
        peak: FLOP/s of dense bfloat16 matrix products.
        memory: Bytes of HBM; of v5e those that its compiler leaves to programs, of 16 GiB.
        bandwidth: Bytes/s of HBM.
        link: Bytes/s of one link in one direction; of a GPU, of all its links within a host together.
        pod: Shape of the largest torus, with two links a chip and dimension; () for GPUs, of which every pair in a host
            is connected.
        network: Bytes/s a chip and direction between hosts that no link connects; 0 where a topology has no such hosts.
        products: Multiplications and additions a cycle at the peak, by which the compiler's cycles become seconds; 0
            where the compiler says no cycles.
        kernel: Share of the peak that attention's kernel reaches, with heads of 128.
        wraps_at: A dimension of the torus that is a multiple of this is a ring; a shorter one is a line.
    """

    name: str
    kind: str
    platform: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    pod: tuple[int, ...] = ()
    network: float = 0.0
    products: int = 0
    kernel: float = 1.0
    wraps_at: int = 0

    @property
    def clock(self) -> float | None:
        """Cycles/s; None where the compiler says no cycles."""
        return self.peak / (2 * self.products) if self.products else None


# Peak, HBM and shape of the torus: Google's pages on each chip (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). Links:
# v5e 400 GB/s and v5p 1200 GB/s in both directions together over 4 and 6 links (same pages), v6e 800 GB/s over 4, v4
# 45 GB/s a link (jax-ml.github.io/scaling-book/tpus, which also says which dimensions wrap). Products a cycle: matrix
# units a chip times their size, 128 x 128 or on v6e 256 x 256. GPUs: NVIDIA's data sheets of H100 SXM and H200 SXM
# (dense, not sparse, bfloat16); NVLink has 900 GB/s in both directions; one 400 Gb/s adapter a GPU as in DGX H100.
# Attention's kernels: the static schedules of ours for TPUs (tests/test_aot_tpu.py), cuDNN's as published for H100.
_CHIPS = (
    Chip("v4", "TPU v4", "tpu", 275e12, 32 * GIB, 1228e9, 45e9, (16, 16, 16), 0.0, 8 * 128**2, 0.85, 4),
    Chip("v5e", "TPU v5 lite", "tpu", 197e12, 15.75 * GIB, 819e9, 50e9, (16, 16), 0.0, 4 * 128**2, 0.85, 16),
    Chip("v5p", "TPU v5", "tpu", 459e12, 95 * GIB, 2765e9, 100e9, (16, 20, 28), 0.0, 8 * 128**2, 0.85, 4),
    Chip("v6e", "TPU v6 lite", "tpu", 918e12, 32 * GIB, 1640e9, 100e9, (16, 16), 0.0, 4 * 256**2, 0.45, 16),
    Chip("h100", "NVIDIA H100 80GB HBM3", "gpu", 989e12, 80e9, 3350e9, 450e9, network=50e9, kernel=0.6),
    Chip("h200", "NVIDIA H200", "gpu", 989e12, 141e9, 4800e9, 450e9, network=50e9, kernel=0.6),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


def chip_named(name: str) -> Chip:
    """The chip of a name.

    Raises:
        ValueError: There is none; the message lists those that there are.
    """
    if name not in CHIPS:
        hint = nearest(name, CHIPS)
        meant = f" (did you mean {hint}?)" if hint else ""
        raise ValueError(f"unknown chip {name!r}{meant}: choose from {', '.join(CHIPS)}")
    return CHIPS[name]
