"""Prints what the kernel benchmarks put beside their times: the alternatives' medians and the roofline."""

import importlib.util

import pytest

if importlib.util.find_spec("pytest_benchmark") is None:
    from plain_benchmark import benchmark, pytest_addoption  # noqa: F401

ROWS = []


@pytest.fixture
def report(benchmark):
    """Stores a case's facts in the JSON and in the table at the end."""

    def add(**facts):
        benchmark.extra_info.update(facts)
        ROWS.append((benchmark.name, facts))

    return add


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json):
    """The file keeps the statistics of each case, not the time of every round."""
    for case in output_json["benchmarks"]:
        case["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.section("medians of interleaved rounds, in ms; speedup is over the fastest alternative")
    name_width = max(len(name) for name, _ in ROWS)
    for name, facts in ROWS:
        others = "  ".join(f"{other} {1e3 * seconds:.3f}" for other, seconds in facts["alternatives_s"].items())
        terminalreporter.write_line(
            f"{name:{name_width}}  ours {1e3 * facts['ours_s']:.3f}  {others}  speedup {facts['speedup']:.2f}  "
            f"floor {1e3 * facts['floor_s']:.3f} ({facts['of_floor']:.0%} reached)  {facts['gbytes']:.1f} GB/s"
            + (f"  {facts['gflops']:.0f} GFLOP/s" if facts["gflops"] else "")
        )
