import pytest
import torch
from test_converge import philox

from cllm_kernels import backends
from cllm_kernels.ops import JacobiState
from cllm_kernels.ops.philox import philox4x32
from cllm_kernels.ops.state_fields import FIELDS, READ_ONLY

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter, key, result):
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == result
    assert philox(counter, key) == list(result)


def test_cpp_was_compiled_for_these_fields():
    if backends.EXTENSION is None:
        pytest.skip(backends.available()["cpp"])
    assert backends.EXTENSION.state_fields() == [field[:3] for field in FIELDS]
    assert set(READ_ONLY) < {name for name, *_ in FIELDS}


def test_create():
    prompt = torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4], [7, 8, 9, 10]])
    state = JacobiState.create(prompt, [2, 0, 0], [3, 9, 0], 4, [11, 12], seeds=[1, -2, 3])
    assert state.window[:, 0].tolist() == [6, 4, 10]
    assert set(state.window[0, 1:].tolist()) <= {5, 6} and set(state.window[1, 1:].tolist()) <= {1, 2, 3, 4}
    assert state.lengths.tolist() == [3, 3, 3] and state.block_left.tolist() == [4, 4, 4]
    assert state.done.tolist() == [0, 0, 2] and state.status.tolist() == [2, 0]
    assert state.output.shape == (3, 9) and state.eos.tolist() == [11, 12]
    assert state.context_start.tolist() == [2, 0, 0]
    assert [name for name, *_ in FIELDS if getattr(state, name).dtype not in (torch.int32, torch.int64)] == []
    assert "rows=3, width=4, capacity=9" in repr(state)
    assert JacobiState.create(prompt, limits=3, device="meta").device.type == "meta"


def test_first_drafts_follow_the_rule():
    prompt = torch.arange(100, 107)[None].repeat(2, 1)
    state = JacobiState.create(prompt, [0, 3], 9, 5, seeds=[2**40 + 17, -1])
    state.produced.copy_(torch.tensor([0, 6]))
    state.refill_all_()
    for row, (seed, start, produced) in enumerate([(2**40 + 17, 0, 0), (2**64 - 1, 3, 6)]):
        for j in range(1, 5):
            random = philox([produced + j - 1, 0, 0x4A43, 0], [seed & 0xFFFFFFFF, seed >> 32])[0]
            assert state.window[row, j] == 100 + start + random % (7 - start)
    state.kept.fill_(1)
    state.refill_all_("last")
    assert (state.window == state.window[:, :1]).all() and not state.kept.any()


def test_first_drafts_by_either_backend(monkeypatch):
    prompt = torch.randint(0, 1000, (3, 12))
    states = []
    for backend in ("torch", "auto", "cuda", "triton"):  # the latter two run on a GPU, for which a state is made here too
        monkeypatch.setenv("CLLM_BACKEND", backend)
        states.append(JacobiState.create(prompt, [0, 5, 11], limits=5, block_size=9, seeds=[1, 2**63 - 1, -7]))
    assert all(torch.equal(states[0].window, other.window) for other in states[1:])


def test_a_row_alone_starts_as_in_a_batch():
    prompt = torch.randint(0, 1000, (3, 12))
    batch = JacobiState.create(prompt, limits=5, block_size=8, seeds=3)
    alone = JacobiState.create(prompt[1:2], limits=5, block_size=8, seeds=3)
    assert torch.equal(batch.window[1:2], alone.window)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": torch.zeros(3, dtype=torch.int64)}, "prompt is torch.int64 of shape"),
        ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, "P >= 1"),
        ({"prompt": torch.zeros(2, 3)}, "must hold integers"),
        ({"block_size": 0}, "block_size is 0"),
        ({"starts": [0, 3]}, r"starts is \[0, 3\]"),
        ({"starts": [-1, 0]}, r"starts is \[-1, 0\]"),
        ({"starts": [0]}, "starts has shape"),
        ({"limits": [1, -1]}, r"limits is \[1, -1\]"),
        ({"limits": 9, "capacity": 8}, r"in \[0, 8\]"),
        ({"seeds": [1, 2, 3]}, "seeds has shape"),
        ({"eos": 5}, "eos has shape"),
        ({"refill": "x"}, "refill is 'x'"),
    ],
)
def test_bad_input(change, message):
    arguments = {"prompt": torch.zeros(2, 3, dtype=torch.int64), "limits": 4, "block_size": 2}
    with pytest.raises(ValueError, match=message):
        JacobiState.create(**arguments | change)


@pytest.mark.parametrize("name", [name for name, *_ in FIELDS])
def test_a_field_that_does_not_fit(name):
    tensors = dict(zip((field[0] for field in FIELDS), JacobiState.allocate(2, 3, 4, 5, 2).tensors()))
    good = tensors[name]
    longer = good[None] if name == "eos" else good.new_zeros(7, *good.shape[1:])
    for bad in (good.float(), good.to("meta"), longer, torch.stack([good] * 2, -1)[..., 0]):
        with pytest.raises(ValueError, match="has dtype|is on|has shape|has strides"):
            JacobiState(**tensors | {name: bad})
