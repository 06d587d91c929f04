"""Draws docs/pictures and writes the tables of docs/attention.md. Run it with `make pictures`."""

from pathlib import Path

import features
import matplotlib
import numpy as np
from gallery import MASKS

from garrulax.kernels.blocks import block_map
from garrulax.kernels.mask import Mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "pictures"
LENGTH, BLOCK = 96, 8
INK = matplotlib.colors.ListedColormap(["white", "#9db7d5", "#1f4e79"])  # none, partial, full


def schedule(mask: Mask) -> np.ndarray:
    """How kernels treat each block of the mask: 0 is skipped, 1 evaluates the rule, 2 is computed without a mask."""
    query, key = mask.read()
    rows, columns = (next(iter(s.values())).shape[1] // BLOCK for s in (query, key))
    some, every = block_map(mask.rule, query, key, BLOCK, BLOCK, (1, rows, columns))
    return np.asarray(some[0], int) + np.asarray(every[0], int)


def draw(masks: tuple[Mask, ...], path: Path) -> None:
    """Draws masks into one picture, each with its pairs on the left and the schedule of its blocks on the right."""
    figure, axes = plt.subplots(1, 2 * len(masks), figsize=(2.6 * 2 * len(masks), 2.9), layout="constrained")
    for left, right, mask in zip(axes[::2], axes[1::2], masks, strict=True):
        allowed, blocks = np.asarray(mask.dense()[0]), schedule(mask)
        left.imshow(2 * allowed, cmap=INK, vmin=0, vmax=2, interpolation="nearest")
        left.set_title(f"{allowed.shape[0]} queries, {allowed.shape[1]} keys", fontsize=8)
        right.imshow(blocks, cmap=INK, vmin=0, vmax=2, interpolation="nearest")
        none, partial, full = (int((blocks == i).sum()) for i in range(3))
        right.set_title(f"blocks: {none} none, {partial} partial, {full} full", fontsize=8)
        right.set_xticks(np.arange(blocks.shape[1] + 1) - 0.5)
        right.set_yticks(np.arange(blocks.shape[0] + 1) - 0.5)
        right.grid(color="0.85", linewidth=0.5)
        for panel in (left, right):
            panel.tick_params(length=0, labelbottom=False, labelleft=False)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, build in MASKS.items():
        mask = build(LENGTH)
        draw(mask if isinstance(mask, tuple) else (mask,), FOLDER / f"{name}.png")
    features.write()
