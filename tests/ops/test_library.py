"""Ops skip torch's dispatcher only where nothing else may take the call."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cllm_kernels.ops import _library, append_kv_

OP = torch.ops.cllm_kernels.append_kv_.default


def make(device=None):
    caches = [torch.zeros(1, 2, 8, 4, device=device) for _ in range(2)]
    window = [torch.ones(1, 2, 3, 4, device=device) for _ in range(2)]
    return *caches, *window, torch.tensor([2], dtype=torch.int32, device=device)


class Recorder(TorchDispatchMode):
    """The ops that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(op)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def dispatched(monkeypatch):
    """Counts the calls that go through the dispatcher, of an op that is only registered for this test."""
    calls = []

    def implementation(tensor, number):
        return tensor + number

    with torch.library._scoped_library("cllm_kernels", "FRAGMENT") as library:
        monkeypatch.setattr(_library, "LIBRARY", library)
        call = _library.register("test_dispatch(Tensor tensor, int number) -> Tensor", implementation, implementation)
        overload = torch.ops.cllm_kernels.test_dispatch.default
        monkeypatch.setattr(
            type(overload), "__call__", lambda self, *args: calls.append(self) or self._op(*args), raising=True
        )
        yield call, calls


def test_only_the_first_call_is_dispatched(dispatched):
    call, calls = dispatched
    with torch.no_grad():
        for _ in range(3):
            assert call(torch.ones(2), 2).tolist() == [3, 3]
    assert len(calls) == 1
    with torch.inference_mode():
        assert call(torch.ones(2), 4).tolist() == [5, 5]
    assert len(calls) == 1


def test_autograd_and_profilers_see_every_call(dispatched):
    call, calls = dispatched
    with torch.no_grad():
        call(torch.ones(2), 2)
    call(torch.ones(2), 2)
    assert len(calls) == 2
    with torch.no_grad(), torch.profiler.profile() as profile:
        call(torch.ones(2), 2)
    assert len(calls) == 3 and "cllm_kernels::test_dispatch" in {event.name for event in profile.events()}


@torch.no_grad()
def test_wrong_types_are_refused_every_time(dispatched):
    call, calls = dispatched
    call(torch.ones(2), 2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="number"):
            call(torch.ones(2), 2.5)
        with pytest.raises(RuntimeError, match="tensor"):
            call(1, 2)


@torch.no_grad()
def test_modes_and_transforms_see_the_op():
    append_kv_(*make())
    append_kv_(*make())
    with Recorder() as recorder:
        append_kv_(*make())
    assert OP in recorder.seen
    with FakeTensorMode():
        append_kv_(*make())  # touching the storage of a fake tensor would raise
    append_kv_(*make(device="meta"))

    def write(key, value):
        caches = make()[:2]
        append_kv_(*caches, key, value, make()[4])
        return caches[0]

    traced = torch.fx.experimental.proxy_tensor.make_fx(write)(*make()[2:4])
    assert OP in {node.target for node in traced.graph.nodes}


@torch.no_grad()
def test_direct_and_dispatched_calls_do_the_same():
    direct, dispatched = make(), make()
    append_kv_(*make())
    append_kv_(*direct)
    OP(*dispatched)
    assert direct[0].sum() == 24 and all(torch.equal(a, b) for a, b in zip(direct, dispatched, strict=True))
