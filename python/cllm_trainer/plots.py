"""Plots of training and of a trajectory. Needs matplotlib: pip install 'cllm_kernels[train]'."""

from __future__ import annotations

from pathlib import Path

from .train import PARTS

# What a position of a trajectory holds in an iteration, and its colour.
KINDS = {
    "wrong": "#d9d9d9",
    "stationary": "#f4a261",
    "fast-forwarded": "#2a9d8f",
    "committed": "#264653",
}


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_training(record: dict, path: str | Path) -> None:
    """The losses of a training record over the steps and, where it was probed, tokens per forward."""
    pyplot = _pyplot()
    probes = record.get("probes", [])
    figure, axes = pyplot.subplots(1 + bool(probes), 1, figsize=(7, 3 + 3 * bool(probes)), sharex=True, squeeze=False)
    steps = [entry["step"] for entry in record["history"]]
    for name in PARTS:
        values = [entry[name] for entry in record["history"]]
        if any(values):
            axes[0, 0].plot(steps, values, label=name.replace("_", " "))
    axes[0, 0].set_ylabel("nats")
    axes[0, 0].legend()
    if probes:
        axes[1, 0].plot(
            [probe["step"] for probe in probes], [probe["tokens_per_forward"] for probe in probes], marker="."
        )
        axes[1, 0].set_ylabel("tokens per forward")
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def classify(row: dict) -> list[list[str]]:
    """For each state of a training row what stood at each output position: a kind of :data:`KINDS`, or "" for nothing.

    Right drafts before the first wrong one are fast-forwarded: this forward commits them, beyond the token that it
    would have committed anyway. A draft is stationary if it is right behind a wrong one and stays so until it is
    committed. The last line is the whole output.
    """
    output, states = row["output_ids"], row["states"]
    grid = []
    for number, (start, drafts) in enumerate(states):
        kinds = ["committed"] * start
        wrong = False
        for place, draft in enumerate(drafts[: len(output) - start], start):
            right = draft == output[place]
            wrong = wrong or not right
            stays = right and all(
                place < first or (place - first < len(later) and later[place - first] == draft)
                for first, later in states[number:]
            )
            kinds.append("fast-forwarded" if not wrong else "stationary" if stays else "wrong")
        grid.append(kinds + [""] * (len(output) - len(kinds)))
    return [*grid, ["committed"] * len(output)]


def plot_trajectory(row: dict, path: str | Path) -> None:
    """Positions by iterations of a training row, coloured by :func:`classify`."""
    pyplot = _pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    grid = classify(row)
    names = ["", *KINDS]
    figure, axis = pyplot.subplots(figsize=(max(7, min(14, 2 + len(grid[0]) / 6)), min(10, 1.5 + len(grid) / 5)))
    colours = ListedColormap(["white", *KINDS.values()])
    axis.imshow(
        [[names.index(kind) for kind in line] for line in grid], cmap=colours, vmin=0, vmax=len(KINDS), aspect="auto"
    )
    axis.set_xlabel("position in the output")
    axis.set_ylabel("iteration")
    figure.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in KINDS.items()], loc="upper center", ncols=4
    )
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
