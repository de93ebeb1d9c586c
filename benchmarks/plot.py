"""Draws what test_kernels.py measured; `draw_steps` draws what steps.py did.

    python benchmarks/plot.py benchmarks/results/kernels_cpu.json

Writes one PNG an op beside the JSON file: the times of every implementation over the cache length, the window or the
vocabulary, with the device's floor.
"""

import collections
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def series(cases, x):
    """Microseconds by implementation, as sorted (x, time) pairs."""
    lines = collections.defaultdict(list)
    for parameters, facts in cases:
        times = {f"ours ({facts['backend']})": facts["ours_s"], **facts["alternatives_s"], "floor": facts["floor_s"]}
        for name, seconds in times.items():
            lines[name].append((parameters[x], 1e6 * seconds))
    return {name: sorted(points) for name, points in lines.items()}


def draw(path, panels, x, title):
    """One panel a key of `panels`, which holds (parameters, facts) pairs."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    styles = {}
    for axis, (name, cases) in zip(axes.flat, sorted(panels.items())):
        for label, points in series(cases, x).items():
            style = {"color": "black", "linestyle": ":"} if label == "floor" else {"marker": "o", "markersize": 3}
            (line,) = axis.plot(*zip(*points), label=label, **style)
            styles.setdefault(label, line)
        axis.set(title=name, xscale="log", yscale="log", xlabel=x, ylabel="µs")
        axis.grid(alpha=0.3)
    figure.legend(styles.values(), styles.keys(), loc="lower center", ncols=3, fontsize=8)
    save(figure, path, title, bottom=0.04 + 0.06 / rows)


def save(figure, path, title, bottom=0.0):
    """Writes a figure with its title; panels keep off the share `bottom` of its height. Returns the path."""
    figure.suptitle(title)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def draw_steps(source):
    """Draws what steps.py wrote: for each shape a step over n at its shortest cache, and over L. Returns the path."""
    rows = json.loads(Path(source).read_text())
    shapes = list(dict.fromkeys((row["shape"], row["batch"]) for row in rows))
    figure, axes = plt.subplots(2, len(shapes), figsize=(4.6 * len(shapes), 7.4), squeeze=False)
    for column, (shape, batch) in enumerate(shapes):
        here = [row for row in rows if (row["shape"], row["batch"]) == (shape, batch)]
        over_n, over_length = axes[:, column]
        shortest = min(row["cache_length"] for row in here)
        for row in here:
            if row["method"].startswith("hf") and row["cache_length"] == shortest:
                style = ":" if row["method"] == "hf_eager" else "-."
                over_n.axhline(row["ms"], label=f"{row['method']}, one token", linestyle=style, color="gray")
        for method in dict.fromkeys(row["method"] for row in here if row["method"].startswith("ours")):
            ours = [row for row in here if row["method"] == method]
            points = sorted((row["block_size"], row["ms"]) for row in ours if row["cache_length"] == shortest)
            over_n.plot(*zip(*points), marker="o", markersize=3, label=method)
        ours = [row for row in here if row["method"] in ("ours", "ours_graph")]
        points = sorted((row["block_size"], row["floor_ms"]) for row in ours if row["cache_length"] == shortest)
        over_n.plot(*zip(*points), color="black", linestyle="--", label="floor: memory or arithmetic")
        over_n.set(title=f"{shape}, batch {batch}, L = {shortest}", xlabel="window width n")
        for index, width in enumerate(sorted({row["block_size"] for row in ours})):
            for key, style in (("ms", "o-"), ("floor_ms", "--")):
                points = sorted((row["cache_length"], row[key]) for row in ours if row["block_size"] == width)
                label = f"n = {width}" if key == "ms" else None
                over_length.plot(*zip(*points), style, markersize=3, color=f"C{index}", label=label)
        over_length.set(title=f"{shape}, batch {batch}; dashed: floors", xlabel="cached tokens L")
        for axis in (over_n, over_length):
            axis.set(xscale="log", yscale="log", ylabel="ms a step")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    first = rows[0]
    title = f"{first['dtype']}, {first['device']}, {first['threads']} threads, medians"
    return save(figure, Path(source).with_suffix(".png"), title)


def main(source):
    results = json.loads(Path(source).read_text())["benchmarks"]
    ops = collections.defaultdict(lambda: collections.defaultdict(list))
    for result in results:
        parameters, facts = dict(result["params"] or {}), result["extra_info"]
        if "alternatives_s" not in facts or parameters.get("threads") == "one thread":
            continue
        op = result["name"].split("[")[0].removeprefix("test_")
        fixed = [str(parameters[key]) for key in ("dtype", "shape") if key in parameters]
        if op == "block_attention" and parameters["batch"] == 1:
            if parameters["width"] == 16:
                ops["block_attention over length"][", ".join([*fixed, "n 16"])].append((parameters, facts))
            if parameters["length"] == 1024:
                ops["block_attention over width"][", ".join([*fixed, "L 1024"])].append((parameters, facts))
        elif op == "converge":
            ops["converge_ over vocabulary"][", ".join([*fixed, "n 16"])].append((parameters, facts))
    facts = next(result["extra_info"] for result in results if "alternatives_s" in result["extra_info"])
    device = facts["device"] if "CPU" not in facts["device"] else f"{facts['device']}, {facts['threads']} threads"
    for name, panels in ops.items():
        x = name.rsplit(" ", 1)[1]
        path = Path(source).with_name(f"{Path(source).stem}_{name.replace(' ', '_').replace('__', '_')}.png")
        draw(path, panels, x, f"{name}, {device}, medians")
        print(path)


if __name__ == "__main__":
    main(sys.argv[1])
