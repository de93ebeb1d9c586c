"""Every attribute of torch and triton that the code names is there, also where only a GPU machine gets to it."""

import ast
import importlib
from pathlib import Path

import pytest

from cllm_kernels import ops  # noqa: F401: registers torch.ops.cllm_kernels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("cllm_kernels", "python", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
    if folder != "tests" or path.stem.endswith("_on_gpu")
)  # fmt: skip
# What builds of torch with CUDA alone have.
CUDA_ALONE = {"torch._C._cuda_getCurrentRawStream", "torch._C._cuda_clearCublasWorkspaces"}


def dotted_names(source: str) -> set[str]:
    """What the source reads as ``torch.a.b`` or ``triton.a.b``, as far as names are plain."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        parts = []
        while isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in ("torch", "triton"):
            found.add(".".join([node.id, *reversed(parts)]))
    return found


def missing(name: str) -> str | None:
    """The first part of a dotted name that is neither an attribute nor a module."""
    module, *parts = name.split(".")
    at, value = module, importlib.import_module(module)
    for part in parts:
        at += "." + part
        if not hasattr(value, part):
            try:
                importlib.import_module(at)
            except ImportError:
                return at
        value = getattr(value, part)
    return None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_there(path):
    wrong = {name: missing(name) for name in dotted_names(path.read_text()) - CUDA_ALONE}
    assert not {name: at for name, at in wrong.items() if at}


def test_a_misspelt_name_is_found():
    assert dotted_names("x = torch.cuda.getdevice_name(d)") == {"torch.cuda.getdevice_name", "torch.cuda"}
    assert missing("torch.cuda.getdevice_name") == "torch.cuda.getdevice_name"
