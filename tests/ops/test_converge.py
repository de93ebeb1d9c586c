"""`converge_` against an oracle of plain loops over Python numbers, bit for bit."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cllm_kernels.ops import JacobiState, converge_
from cllm_kernels.ops.philox import gumbel, noise_words
from cllm_kernels.ops.state_fields import FIELDS, READ_ONLY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def philox(counter, key):
    """Philox4x32-10 with Python's integers."""
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product1 >> 32) ^ counter[1] ^ key[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ counter[3] ^ key[1],
            product0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def oracle(logits, state, mode, refill):
    """The fields after the call, as lists."""
    after = {name: tensor.tolist() for (name, *_), tensor in zip(FIELDS, state.tensors())}
    width = state.width
    for row in range(state.rows):
        if after["done"][row] != 0:
            continue
        window, kept, since = (list(after[name][row]) for name in ("window", "kept", "since"))
        predicted = []
        for position in range(width):
            values = logits[row, position].tolist()
            predicted.append(values.index(max(values)))

        # How many are accepted.
        accept = 1
        while accept < width and window[accept] == predicted[accept - 1]:
            accept += 1
        if mode == "block":
            accept = min(accept, after["block_left"][row])
        accept = min(accept, after["limits"][row] - after["produced"][row])
        done = 0
        for i in range(accept):
            if predicted[i] in after["eos"]:
                accept, done = i + 1, 1
                break
        if done == 0 and after["produced"][row] + accept == after["limits"][row]:
            done = 2

        # Commit them.
        for i in range(accept):
            after["output"][row][after["produced"][row] + i] = predicted[i]
            if i >= 1 and kept[i]:
                after["stationary"][row] += 1
        after["produced"][row] += accept
        after["lengths"][row] += accept
        after["iterations"][row] += 1
        forward = after["iterations"][row]
        for i in range(accept):
            held = i + 1 < width and window[i + 1] == predicted[i]
            first = since[i + 1] if held else forward
            if first < after["front"][row]:
                after["paper_stationary"][row] += 1
            elif first > after["front"][row]:
                after["paper_iterations"][row] += 1
                after["front"][row] = first
        after["accept_histogram"][row][accept] += 1
        after["done"][row] = done
        if done:
            continue

        # What comes next.
        restart = False
        if mode == "block":
            after["block_left"][row] -= accept
            if after["block_left"][row] == 0:
                after["block_left"][row] = width
                restart = True
        for j in range(width):
            source = accept - 1 + j
            usable = source < width
            if mode == "block" and j >= 1 and (restart or j >= after["block_left"][row]):
                usable = False
            after["kept"][row][j] = 0
            after["since"][row][j] = forward + 1
            if usable:
                after["window"][row][j] = predicted[source]
                after["since"][row][j] = forward
                if accept + j < width and window[accept + j] == predicted[source]:
                    after["since"][row][j] = since[accept + j]
                    after["kept"][row][j] = int(j >= 1)
            elif refill == "last":
                after["window"][row][j] = predicted[width - 1]
            else:
                seed = after["seeds"][row] & 0xFFFFFFFFFFFFFFFF
                token = after["produced"][row] + j - 1
                random = philox([token, 0, 0x4A43, after["iterations"][row]], [seed & 0xFFFFFFFF, seed >> 32])[0]
                start = after["context_start"][row]
                after["window"][row][j] = after["context"][row][start + random % (len(after["context"][row]) - start)]
    after["status"] = [after["done"].count(0), 0]
    return after


def assert_state(state, want):
    for (name, *_), tensor in zip(FIELDS, state.tensors()):
        assert tensor.tolist() == want[name], name


def random_state(generator, rows, width, vocabulary, context=5, eos=(), limit=20):
    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    state = JacobiState.create(
        integers(0, vocabulary, (rows, context)),
        starts=integers(0, context, (rows,)),
        limits=integers(0, limit + 1, (rows,)),
        block_size=width,
        eos=eos,
        seeds=integers(-(2**62), 2**62, (rows,)),
        capacity=limit + 2,
    )
    state.kept.copy_(integers(0, 2, (rows, width)))
    state.iterations.copy_(integers(3, 9, (rows,)))
    state.front.copy_(integers(0, 5, (rows,)))
    state.since.copy_(integers(1, 5, (rows, width)))
    return state


def agreeable_logits(generator, state, vocabulary, dtype):
    """Small integers, so that ties abound, where the draft behind is often among the largest."""
    shape = (state.rows, state.width, vocabulary)
    logits = torch.randint(-2, 2, shape, generator=generator).float()
    drafts = state.window.roll(-1, 1)
    lift = (torch.rand(shape[:2], generator=generator) < 0.8).float()
    logits.scatter_add_(2, drafts[..., None], lift[..., None] * 3)
    logits[torch.rand(shape, generator=generator) < 0.1] = -math.inf
    return logits.to(dtype)


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
    dtype=st.sampled_from(DTYPES),
)
def test_equals_the_oracle(backend, seed, rows, width, vocabulary, eos, limit, mode, refill, dtype):
    generator = torch.Generator().manual_seed(seed)
    state = random_state(generator, rows, width, vocabulary, eos=eos, limit=limit)
    for _ in range(2 if backend == "triton" else 6):  # the interpreter is slow
        logits = agreeable_logits(generator, state, vocabulary, dtype)
        want = oracle(logits, state, mode, refill)
        converge_(logits, state, mode, refill, backend=backend)
        assert_state(state, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 7, 1023, 32000, 70001])
def test_argmax(vocabulary, dtype, backend):
    """Large vocabularies, with ties across blocks and splits; the lowest index wins."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(2, 6, vocabulary, generator=generator).to(dtype)
    for i, places in enumerate([[0], [vocabulary - 1], [vocabulary // 2, vocabulary - 1], [vocabulary // 3] * 2]):
        logits[:, i, places] = 100.0
    logits[0, 4] = -math.inf
    logits[1, 4] = 0.0
    logits[1, 4, ::2] = -0.0
    logits[0, 5] = math.inf
    state = JacobiState.create(torch.ones(2, 3, dtype=torch.int64), limits=50, block_size=6)
    want = oracle(logits, state, "window", "last")
    assert_state_after = state.clone()
    converge_(logits, assert_state_after, refill="last", backend=backend)
    assert_state(assert_state_after, want)
    assert torch.equal(logits.argmax(-1)[:, -1], torch.tensor([r[-1] for r in want["window"]]))


def test_walkthrough(backend):
    """The example that the specification can be read beside."""
    state = JacobiState.create(torch.tensor([[9, 9, 5]]), limits=20, block_size=4, eos=[7])

    def step(*predicted, mode="window"):
        logits = torch.nn.functional.one_hot(torch.tensor([predicted]), 10).float()
        converge_(logits, state, mode, "last", backend=backend)

    state.window.copy_(torch.tensor([[5, 1, 2, 3]]))
    step(1, 4, 3, 8)  # 1 is right, 2 is not: commit 1, 4
    assert state.output[0, :2].tolist() == [1, 4] and state.lengths.tolist() == [4]
    assert state.window.tolist() == [[4, 3, 8, 8]]  # 4, the predictions behind it, the refill
    assert state.kept.tolist() == [[0, 1, 0, 0]]  # 3 stood there already, behind the wrong 2
    step(3, 6, 0, 0)
    assert state.output[0, :4].tolist() == [1, 4, 3, 6] and state.stationary.tolist() == [1]
    step(7, 1, 1, 1)
    assert state.done.tolist() == [1] and state.produced.tolist() == [5] and state.status.tolist() == [0, 0]
    assert state.accept_histogram.tolist() == [[0, 1, 2, 0, 0]]


def test_finished_rows_are_neither_read_nor_written(backend):
    state = random_state(torch.Generator().manual_seed(1), 3, 4, 11)
    state.limits.fill_(20)
    state.done.copy_(torch.tensor([1, 0, 2]))
    for name in ("produced", "block_left", "context_start"):  # not even looked at
        getattr(state, name)[0] = -(2**31)
    before = state.clone()
    logits = torch.full((3, 4, 11), math.nan)
    logits[1] = torch.randn(4, 11)
    converge_(logits, state, backend=backend)
    for (name, *_), tensor, old in zip(FIELDS, state.tensors(), before.tensors()):
        if name not in ("status", "eos"):
            assert torch.equal(tensor[[0, 2]], old[[0, 2]]), name
    assert state.iterations[1] == before.iterations[1] + 1 and state.status.tolist() == [1, 0]


@pytest.mark.parametrize("vocabulary", [5, 40000])
@pytest.mark.parametrize("place", [0, 3, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype, place, vocabulary, backend):
    state = random_state(torch.Generator().manual_seed(2), 4, 3, 5)
    state.limits.fill_(20)
    state.done.copy_(torch.tensor([1, 0, 0, 0]))
    before = state.clone()
    logits = torch.zeros(4, 3, vocabulary, dtype=dtype)
    logits[0] = logits[3, 1, place] = math.nan
    logits[2, 2, place] = math.nan
    logits[2, 2, 1] = math.inf
    with pytest.raises(ValueError, match="row 2 at window position 2 hold NaN"):
        converge_(logits, state, backend=backend)
    for (name, *_), tensor, old in zip(FIELDS, state.tensors(), before.tensors()):
        if name != "status":
            assert torch.equal(tensor, old), name
    assert state.status.tolist() == [3, 2]


def noise_word(seed, token, entry):
    counter = [entry // 64 * 16 + entry % 16, 0, 0x4A47, token]
    return philox(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])[entry // 16 % 4]


def test_noise_is_what_the_specification_says():
    seeds, tokens = torch.tensor([-5, 2**40 + 3]), torch.tensor([[0, 1, 7], [3, 2**20, 0]])
    words = noise_words(seeds, tokens, 150)
    for row in range(2):
        for i in range(3):
            want = [noise_word(seeds[row].item(), tokens[row, i].item(), entry) for entry in range(150)]
            assert words[row, i].tolist() == want
    words = torch.cat((words.flatten(), torch.tensor([0, 1, 2**22 - 1, 2**22, 2**31, 2**32 - 1])))
    exact = (words.double() + 0.5) / 2**32
    # 1 - u is rounded to a multiple of 2^-24, which for u near 2^-10 is some 2^-15 of it.
    assert torch.allclose(gumbel(words).double(), -(-(1 - exact).clamp(min=2.0**-25).log()).log(), atol=5e-5, rtol=0)


def sampled(logits, seeds, produced, temperature, backend):
    """The op's predictions [B, n], drawn out of it by drafts that agree."""
    rows, width, _ = logits.shape
    state = JacobiState.create(torch.ones(rows, 1, dtype=torch.int64), limits=1000, block_size=width, seeds=seeds)
    tokens = torch.full((rows, width), -1)
    for i in range(width):
        # One accepted more each time; the row then goes back.
        for name in ("output", "lengths", "iterations"):
            getattr(state, name).zero_()
        state.produced.fill_(produced)
        state.window[:, 1 : i + 1] = tokens[:, :i]
        state.window[:, i + 1 :] = -1
        converge_(logits, state, "window", "last", temperature, backend)
        assert state.produced.tolist() == [produced + i + 1] * rows
        tokens[:, i] = state.output[:, produced + i]
    return tokens


SHAPES = {"small": (3, 4, 33), "blocks": (1, 3, 2500), "splits": (1, 2, 70001)}


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype, shape, spread, backend):
    """The largest perturbed logit wins: up to rounding, no other one is larger."""
    rows, width, vocabulary = SHAPES[shape]
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(rows, width, vocabulary, generator=generator) * spread).to(dtype)
    logits[0, 0, ::2] = -math.inf
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    temperature, produced = 0.7, 11
    tokens = sampled(logits, seeds, produced, temperature, backend)
    words = noise_words(seeds, produced + torch.arange(width).expand(rows, -1), vocabulary)
    perturbed = logits.double() / temperature + gumbel(words)
    short = perturbed.amax(-1) - perturbed.gather(-1, tokens[..., None])[..., 0]
    assert short.max() <= 1e-5 * (1 + spread)


def test_sampling_keeps_infinities_and_their_ties(backend):
    logits = torch.zeros(1, 3, 3000)
    logits[0, 0] = -math.inf
    logits[0, 1, [1500, 2999]] = math.inf
    logits[0, 2] = -math.inf
    logits[0, 2, 2049] = -80.0
    assert sampled(logits, 3, 0, 1.0, backend).tolist() == [[0, 1500, 2049]]


def test_samples_are_distributed_as_the_softmax(backend):
    """Chi-square over positions and seeds, against a table: 99.99 % of 7 degrees of freedom lie below 29.9."""
    if backend == "triton":
        pytest.skip("test_samples shows that Triton draws what the reference draws; its interpreter is too slow for more")
    probabilities = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.08, 0.05, 0.015, 0.005])
    rows, width = 400, 16
    logits = (probabilities.log() * 1.5 + 4).expand(rows, width, -1)
    tokens = sampled(logits, torch.arange(rows) * 2**32 + 7, 0, 1.5, backend)
    expected = probabilities * tokens.numel()
    counts = tokens.flatten().bincount(minlength=8)
    assert ((counts - expected) ** 2 / expected).sum() < 29.9
    # Neighbouring positions, and neighbouring rows, are independent: their pairs fill the table of products.
    for pairs in (tokens[:, :-1] * 8 + tokens[:, 1:], tokens[:-1] * 8 + tokens[1:]):
        expected = torch.outer(probabilities, probabilities).flatten() * pairs.numel()
        counts = pairs.flatten().bincount(minlength=64)
        large = expected >= 5
        freedom = int(large.sum())
        statistic = ((counts - expected) ** 2 / expected)[large].sum()
        assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("place", [0, 40, -1])
def test_sampling_refuses_nan(place, backend):
    state = random_state(torch.Generator().manual_seed(2), 2, 3, 5)
    state.limits.fill_(20)
    before = state.clone()
    logits = torch.zeros(2, 3, 5000)
    logits[1, 2, place] = math.nan
    with pytest.raises(ValueError, match="row 1 at window position 2 hold NaN"):
        converge_(logits, state, temperature=0.5, backend=backend)
    assert torch.equal(state.output, before.output) and state.status.tolist() == [2, 1]


def test_strides(backend):
    state = random_state(torch.Generator().manual_seed(3), 2, 5, 9)
    other = state.clone()
    wide = torch.full((7, 3, 14), math.nan)
    view = wide[2:7, 1:, 3:12].transpose(0, 1)
    view.copy_(torch.randn(2, 5, 9))
    converge_(view, state, backend=backend)
    converge_(view.contiguous(), other, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), other.tensors()))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["window", "block"])
def test_opcheck(mode, temperature, backend):
    state = random_state(torch.Generator().manual_seed(4), 2, 3, 9, eos=[2])
    arguments = (torch.randn(2, 3, 9), *state.tensors(), mode, "context", temperature, backend)
    torch.library.opcheck(torch.ops.cllm_kernels.converge_.default, arguments)


BAD = {
    "logits has shape": lambda s: {"logits": torch.zeros(2, 9)},
    r"must be \(2, 3, 9\)": lambda s: {"logits": torch.zeros(2, 4, 9)},
    "at least one token": lambda s: {"logits": torch.zeros(2, 3, 0)},
    "logits has dtype torch.float64": lambda s: {"logits": torch.zeros(2, 3, 9, dtype=torch.float64)},
    "logits has strides": lambda s: {"logits": torch.zeros(2, 9, 3).transpose(1, 2)},
    "logits is on meta": lambda s: {"logits": torch.zeros(2, 3, 9, device="meta")},
    "mode is 'blocks'": lambda s: {"mode": "blocks"},
    "refill is 'random'": lambda s: {"refill": "random"},
    "temperature is -0.5; it must be 0 ": lambda s: {"temperature": -0.5},
    "temperature is inf": lambda s: {"temperature": math.inf},
    "temperature is nan": lambda s: {"temperature": math.nan},
    "temperature is 1e-40": lambda s: {"temperature": 1e-40},
    "backend is 'c'": lambda s: {"backend": "c"},
    "row 1 has produced = 30 and limit = 20": lambda s: s.produced[1].fill_(30),
    "row 0 has produced = -1": lambda s: s.produced[0].fill_(-1),
    "row 1 has produced = 0 and limit = 23; .* <= 22": lambda s: s.limits[1].fill_(23),
    r"row 0 has block_left = 4; it must be in \[1, 3\]": lambda s: s.block_left[0].fill_(4),
    r"row 1 has context_start = 5; it must be in \[0, 5\)": lambda s: s.context_start[1].fill_(5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, backend):
    state = random_state(torch.Generator().manual_seed(5), 2, 3, 9)
    state.limits.fill_(20)
    state.done.zero_()
    change = BAD[message](state)
    arguments = {"logits": torch.zeros(2, 3, 9), "state": state, "backend": backend}
    if isinstance(change, dict):
        arguments |= change
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        converge_(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before.tensors()))


def test_read_only_fields_have_no_alias_in_the_schema():
    schema = torch.ops.cllm_kernels.converge_.default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {name for name, *_ in FIELDS} - set(READ_ONLY)
