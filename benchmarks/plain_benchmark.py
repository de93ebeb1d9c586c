"""Stands in for pytest-benchmark on GPU machines that have neither it nor a registry (benchmarks/conftest.py).

Nothing of what the plugin itself measures is used on a GPU: measure.py times with CUDA events, and its facts are what
goes to the JSON. They are written after every case, so that a run that is stopped loses nothing.
"""

import json
from pathlib import Path

import pytest

CASES = []


class Benchmark:
    def __init__(self, name: str):
        self.name, self.extra_info = name, {}

    def pedantic(self, target, setup=None, rounds: int = 1) -> None:
        for _ in range(rounds):
            if setup is not None:
                setup()
            target()


@pytest.fixture
def benchmark(request):
    made = Benchmark(request.node.name)
    yield made
    callspec = getattr(request.node, "callspec", None)
    CASES.append({"name": made.name, "params": callspec and callspec.params, "extra_info": made.extra_info})
    path = request.config.getoption("--benchmark-json")
    if path:
        Path(path).write_text(json.dumps({"benchmarks": CASES}, indent=1) + "\n")


def pytest_addoption(parser):
    parser.addoption("--benchmark-only", action="store_true", help="what is here are benchmarks")
    parser.addoption("--benchmark-json", help="where the facts of all cases go")
