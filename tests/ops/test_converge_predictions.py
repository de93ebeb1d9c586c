"""`converge_predictions_` against the oracle of `converge_`, bit for bit."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_converge import BAD as BAD_STATES
from test_converge import agreeable_logits, assert_state, oracle, random_state

from cllm_kernels import backends
from cllm_kernels.ops import converge_predictions_
from cllm_kernels.ops.state_fields import FIELDS


@pytest.fixture(params=["torch", "cpp"])
def backend(request):
    reason = backends.available()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def predictions_of(logits):
    return logits.argmax(-1), logits.amax(-1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 4),
    width=st.sampled_from([1, 2, 3, 8, 16, 17]),
    vocabulary=st.sampled_from([1, 2, 5, 33]),
    eos=st.lists(st.integers(0, 4), max_size=3),
    limit=st.sampled_from([0, 1, 3, 40]),
    mode=st.sampled_from(["window", "block"]),
    refill=st.sampled_from(["context", "last"]),
)
def test_equals_the_oracle(backend, seed, rows, width, vocabulary, eos, limit, mode, refill):
    generator = torch.Generator().manual_seed(seed)
    state = random_state(generator, rows, width, vocabulary, eos=eos, limit=limit)
    for _ in range(6):
        logits = agreeable_logits(generator, state, vocabulary, torch.float32)
        want = oracle(logits, state, mode, refill)
        converge_predictions_(*predictions_of(logits), state, mode, refill, backend)
        assert_state(state, want)


def test_finished_rows_are_neither_read_nor_written(backend):
    state = random_state(torch.Generator().manual_seed(1), 3, 4, 11)
    state.limits.fill_(20)
    state.done.copy_(torch.tensor([1, 0, 2]))
    for name in ("produced", "block_left", "context_start"):  # not even looked at
        getattr(state, name)[0] = -(2**31)
    before = state.clone()
    logits = torch.full((3, 4, 11), math.nan)
    logits[1] = torch.randn(4, 11)
    converge_predictions_(*predictions_of(logits), state, backend=backend)
    for (name, *_), tensor, old in zip(FIELDS, state.tensors(), before.tensors()):
        if name not in ("status", "eos"):
            assert torch.equal(tensor[[0, 2]], old[[0, 2]]), name
    assert state.iterations[1] == before.iterations[1] + 1 and state.status.tolist() == [1, 0]


def test_nan(backend):
    state = random_state(torch.Generator().manual_seed(2), 4, 3, 5)
    state.limits.fill_(20)
    state.done.copy_(torch.tensor([1, 0, 0, 0]))
    before = state.clone()
    values = torch.zeros(4, 3)
    values[0] = values[3, 1] = values[2, 2] = math.nan
    with pytest.raises(ValueError, match="row 2 at window position 2 hold NaN"):
        converge_predictions_(torch.zeros(4, 3, dtype=torch.int64), values, state, backend=backend)
    for (name, *_), tensor, old in zip(FIELDS, state.tensors(), before.tensors()):
        if name != "status":
            assert torch.equal(tensor, old), name
    assert state.status.tolist() == [3, 2]


def test_strides(backend):
    state = random_state(torch.Generator().manual_seed(3), 3, 5, 9)
    other = state.clone()
    index, value = predictions_of(torch.randn(3, 5, 9))
    wide, wide_values = torch.full((3, 11), -1), torch.full((3, 8), math.nan)
    wide[:, 2:7], wide_values[:, 3:] = index, value
    converge_predictions_(wide[:, 2:7], wide_values[:, 3:], state, backend=backend)
    converge_predictions_(index, value, other, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), other.tensors()))


@pytest.mark.parametrize("mode", ["window", "block"])
def test_opcheck(mode, backend):
    state = random_state(torch.Generator().manual_seed(4), 2, 3, 9, eos=[2])
    arguments = (*predictions_of(torch.randn(2, 3, 9)), *state.tensors(), mode, "context", backend)
    torch.library.opcheck(torch.ops.cllm_kernels.converge_predictions_.default, arguments)


BAD = {
    r"predictions has shape \(2, 4\); it must be \(2, 3\)": lambda s: {"predictions": torch.zeros(2, 4).long()},
    "predictions has dtype torch.int32": lambda s: {"predictions": torch.zeros(2, 3, dtype=torch.int32)},
    "predictions has strides": lambda s: {"predictions": torch.zeros(3, 2).long().T},
    "predictions is on meta": lambda s: {"predictions": torch.zeros(2, 3, device="meta").long()},
    r"values has shape \(2,\)": lambda s: {"values": torch.zeros(2)},
    "values has dtype torch.bfloat16": lambda s: {"values": torch.zeros(2, 3).bfloat16()},
    "values has strides": lambda s: {"values": torch.zeros(3, 2).T},
    "values is on meta": lambda s: {"values": torch.zeros(2, 3, device="meta")},
    **{message: change for message, change in BAD_STATES.items() if message.startswith(("mode", "refill", "row", "backend"))},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, backend):
    state = random_state(torch.Generator().manual_seed(5), 2, 3, 9)
    state.limits.fill_(20)
    state.done.zero_()
    arguments = {
        "predictions": torch.zeros(2, 3).long(), "values": torch.zeros(2, 3), "state": state, "backend": backend
    }  # fmt: skip
    change = BAD[message](state)
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        converge_predictions_(**arguments | (change if isinstance(change, dict) else {}))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backends_that_have_no_such_kernel_are_refused(name):
    state = random_state(torch.Generator().manual_seed(5), 2, 3, 9)
    with pytest.raises(RuntimeError, match=f"'{name}' was asked for but this op has no such kernel; .* 'auto', 'cpp', 'torch'"):
        converge_predictions_(torch.zeros(2, 3).long(), torch.zeros(2, 3), state, backend=name)
