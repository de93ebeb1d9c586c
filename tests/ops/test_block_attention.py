import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from cllm_kernels.ops import append_kv_, block_attention

# The package's attribute of this name is the function.
reference = importlib.import_module("cllm_kernels.ops.block_attention").reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATOL = 1e-5  # where torch's own error is 0


def make(heads, kv_heads, width, lengths, dim=32, value_dim=None, dtype=torch.float32, starts=None, spare=5, seed=0):
    """Arguments of `block_attention`; whatever no query may see is NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, value_dim = len(lengths), dim if value_dim is None else value_dim
    starts = [0] * batch if starts is None else starts
    capacity = max(lengths) + width + spare
    query = torch.randn(batch, width, heads, dim, generator=generator).to(dtype)
    keys = torch.randn(batch, kv_heads, capacity, dim, generator=generator).to(dtype)
    values = torch.randn(batch, kv_heads, capacity, value_dim, generator=generator).to(dtype)
    for row, (start, length) in enumerate(zip(starts, lengths)):
        for cache in (keys, values):
            cache[row, :, :start] = math.nan
            cache[row, :, length + width :] = math.nan
    return query, keys, values, torch.tensor(lengths, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def naive(query, keys, values, lengths, starts, scale=None, sliding_window=0, softcap=0.0, sinks=None):
    """The same attention by torch alone, in the dtype of the arguments; only where every query sees a row."""
    width, heads, kv_heads = query.size(1), query.size(2), keys.size(1)
    columns = torch.arange(keys.size(2))
    positions = (lengths[:, None] + torch.arange(width))[:, :, None]
    visible = (columns >= starts[:, None, None]) & (columns <= positions)
    if sliding_window:
        visible &= columns > positions - sliding_window
    keys, values = (x.nan_to_num().repeat_interleave(heads // kv_heads, 1) for x in (keys, values))
    if not softcap and sinks is None:
        mask = visible[:, None]
        return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, mask, scale=scale).transpose(1, 2)
    scores = query.transpose(1, 2) @ keys.transpose(2, 3) * (query.size(3) ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : keys.size(2)] @ values).transpose(1, 2)


@functools.lru_cache(maxsize=1)  # the backends of one case follow one another
def expected(case, options=()):
    """Arguments, the exact result, and the error that torch makes in the same dtype."""
    arguments, options = make(**dict(case)), dict(options)
    out, lse = reference(*arguments, dtype=torch.float64, **options)
    error = (naive(*arguments, **options).double() - out).abs().max().item()
    return arguments, out, lse, error


def check(backend, options=None, **case):
    options = options or {}
    case = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in case.items())
    arguments, out, lse, error = expected(case, tuple(options.items()))
    got_out, got_lse = block_attention(*arguments, backend=backend, **options)
    assert got_out.dtype == arguments[0].dtype and got_out.is_contiguous()
    assert got_lse.dtype == torch.float32
    assert (got_out.double() - out).abs().max().item() <= 2 * error + ATOL
    assert torch.equal(got_lse.isinf(), lse.isinf())
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("width", [1, 2, 8, 16, 17, 64])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("length", [0, 1, 63, 799, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grid(dtype, length, group, width, backend):
    if backend == "triton" and length == 4096 and width * group > 64:
        pytest.skip("the interpreter takes up to half a minute; shorter caches have these rows, fewer rows this cache")
    if backend == "triton" and length >= 799 and dtype == torch.float16:
        pytest.skip("the interpreter is slow; shorter caches have this dtype, the others this cache")
    # The second row of the ragged batch is shorter, and left padded where it can be.
    lengths = [length, length // 3]
    check(backend, heads=2 * group, kv_heads=2, width=width, lengths=lengths, starts=[0, length // 5],
          dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("dims", [(8, 8), (40, 24), (64, 128), (128, 64), (256, 256), (13, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_sizes(dtype, dims, backend):
    check(backend, heads=4, kv_heads=2, width=9, lengths=[70, 3], dim=dims[0], value_dim=dims[1], dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"sliding_window": 1},
        {"sliding_window": 7},
        {"sliding_window": 100},
        {"softcap": 2.0},
        {"softcap": 30.0, "sliding_window": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 33])
def test_options(width, dtype, options, backend):
    check(backend, options, heads=6, kv_heads=2, width=width, lengths=[130, 40], starts=[0, 3], dtype=dtype)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("length", [5, 1200], ids="L{}".format)
def test_sinks(length, softcap, dtype, backend):
    arguments = make(6, 2, 4, [length, 2], dtype=dtype)
    sinks = torch.tensor([-1.0, 0.0, 3.0, -math.inf, 20.0, 0.5])
    out, lse = reference(*arguments, softcap=softcap, sinks=sinks, dtype=torch.float64)
    error = (naive(*arguments, softcap=softcap, sinks=sinks).double() - out).abs().max().item()
    got_out, got_lse = block_attention(*arguments, softcap=softcap, sinks=sinks, backend=backend)
    assert (got_out.double() - out).abs().max().item() <= 2 * error + ATOL
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=ATOL)


def apart(arguments, branch, attend):
    """What `attend` gives for each branch alone, whose rows stand right behind the shared ones."""
    query, keys, values, lengths, starts = arguments
    outs, sums = [], []
    for first in range(0, query.size(1), branch):
        own = [cache.clone() for cache in (keys, values)]
        for cache, whole in zip(own, (keys, values)):
            for row, length in enumerate(lengths.tolist()):
                cache[row, :, length : length + branch] = whole[row, :, length + first : length + first + branch]
                cache[row, :, length + branch :] = math.nan
        out, lse = attend(query[:, first : first + branch], *own, lengths, starts)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 2)


@functools.lru_cache(maxsize=1)
def expected_branches(heads, width, branch, length, options, dtype):
    arguments = make(heads, 2, width, [length, length // 3], starts=[0, length // 5], dtype=dtype)
    options = dict(options)
    out, lse = apart(arguments, branch, lambda *a: reference(*a, dtype=torch.float64, **options))
    rounded, _ = apart(arguments, branch, lambda *a: (naive(*a, **options), lse[:, :, :branch]))
    return arguments, out, lse, (rounded.double() - out).abs().max().item()


@pytest.mark.parametrize("branches", [(2, 1), (5, 3), (2, 16), (4, 9)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 63, 1300])
@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 2}, {"sliding_window": 12, "softcap": 3.0}, {"sliding_window": 100}],
    ids=["plain", "window-2", "window-12-cap", "window-100"],
)
def test_branches_are_windows_on_one_cache(options, length, group, branches, dtype, backend):
    if backend == "triton" and length == 1300 and (group > 1 or options):
        pytest.skip("the interpreter is slow")
    count, branch = branches
    arguments, out, lse, error = expected_branches(
        2 * group, count * branch, branch, length, tuple(options.items()), dtype
    )
    got_out, got_lse = block_attention(*arguments, branch=branch, backend=backend, **options)
    assert (got_out.double() - out).abs().max().item() <= 2 * error + ATOL
    assert torch.equal(got_lse.isinf(), lse.isinf())
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-6, atol=ATOL)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("length", [3, 700])
def test_branches_do_not_see_each_other(length, window, dtype, backend):
    """Not even what is not finite, on either side; what they share they all see."""
    sinks = torch.tensor([1.0, 0.0, -2.0, 3.0])
    query, keys, values, lengths, starts = make(4, 2, 15, [length, 2], dtype=dtype)

    def attend():
        return block_attention(
            query, keys, values, lengths, starts, sliding_window=window, sinks=sinks, branch=5, backend=backend
        )

    clean, clean_lse = attend()
    for row, first in enumerate(lengths.tolist()):
        for cache in (keys, values):
            cache[row, :, first + 5 : first + 10] = math.nan
    out, lse = attend()
    others = [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert torch.equal(out[:, others], clean[:, others]) and torch.equal(lse[:, :, others], clean_lse[:, :, others])
    assert out[:, 5:10].isnan().all()
    values[0, :, length - 1] = math.inf
    out, _ = attend()
    seen = [i for i in others if not window or i % 5 < window - 1]
    assert not out[0, seen].isfinite().any()
    assert torch.equal(out[0, [i for i in others if i not in seen]], clean[0, [i for i in others if i not in seen]])


@pytest.mark.parametrize("group", [1, 3, 40, 200])
@pytest.mark.parametrize("window", [0, 50])
def test_prompt(window, group, dtype, backend):
    """Many query tiles, and groups that are larger than a tile."""
    width = 333 if group < 40 else 11
    options = {"sliding_window": window}
    check(backend, options, heads=group, kv_heads=1, width=width, lengths=[0, 17], starts=[0, 4], dim=16,
          dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing(dtype, backend):
    """Padding inside the window: queries before the start give 0 and -inf, or the sink."""
    query, keys, values, lengths, starts = make(4, 2, 6, [2, 0], dtype=dtype)
    starts[0], starts[1] = 5, 1 << 30
    keys[0, :, :5], values[0, :, :5] = math.nan, math.nan
    keys[1], values[1] = math.nan, math.nan
    out, lse = block_attention(query, keys, values, lengths, starts, backend=backend)
    assert (out[0, :3] == 0).all() and (out[1] == 0).all()
    assert (lse[0, :, :3] == -math.inf).all() and (lse[1] == -math.inf).all()
    exact, _ = reference(query, keys, values, lengths, starts, dtype=torch.float64)
    torch.testing.assert_close(out[0].double(), exact[0], rtol=1e-2, atol=1e-2)
    sinks = torch.tensor([1.0, 2.0, 3.0, 4.0])
    out, lse = block_attention(query, keys, values, lengths, starts, sinks=sinks, backend=backend)
    assert (out[1] == 0).all()
    assert torch.equal(lse[1], sinks[:, None].expand(4, 6))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [1, 4])
def test_later_rows_of_the_window_are_not_read(group, poison, dtype, backend):
    """Row L + i + 1 has no influence on query i, although query i + 1 sees it."""
    query, keys, values, lengths, starts = make(2 * group, 2, 16, [40, 7], dtype=dtype)
    clean, clean_lse = block_attention(query, keys, values, lengths, starts, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length + 9] = poison
        values[row, :, length + 9] = poison
    out, lse = block_attention(query, keys, values, lengths, starts, backend=backend)
    assert torch.equal(out[:, :9], clean[:, :9])
    assert torch.equal(lse[:, :, :9], clean_lse[:, :, :9])
    assert not out[:, 9:].isfinite().any(-1).any() or not math.isnan(poison)


def test_rows_that_slid_out_are_not_read(dtype, backend):
    query, keys, values, lengths, starts = make(4, 2, 16, [40, 30], dtype=dtype)
    clean, _ = block_attention(query, keys, values, lengths, starts, sliding_window=8, backend=backend)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, : length + 2] = math.nan
        values[row, :, : length + 2] = math.nan
    out, _ = block_attention(query, keys, values, lengths, starts, sliding_window=8, backend=backend)
    assert torch.equal(out[:, 9:], clean[:, 9:])


def test_nan_that_is_seen_shows(dtype, backend):
    query, keys, values, lengths, starts = make(4, 2, 3, [700, 30], dtype=dtype)
    values[0, 0, 10, 5] = math.nan
    out, _ = block_attention(query, keys, values, lengths, starts, backend=backend)
    assert out[0, :, :2, 5].isnan().all() and out.isnan().sum() == 6
    keys[1, 1, 2, 0] = math.nan
    out, lse = block_attention(query, keys, values, lengths, starts, backend=backend)
    assert out[1, :, 2:].isnan().all() and lse[1, 2:].isnan().all() and lse.isnan().sum() == 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, backend):
    """Views as transformers hands them, and caches that are slices of larger ones."""
    query, keys, values, lengths, starts = make(8, 2, 16, [90, 33], dtype=dtype)
    want = block_attention(query, keys, values, lengths, starts, backend=backend)
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((2, 4, keys.size(2) + 3, 80), math.nan, dtype=dtype)
    wide[:, ::2, 2:-1, 7:39] = keys
    wide[:, 1::2, 2:-1, 40:72] = values
    got = block_attention(
        transposed, wide[:, ::2, 2:-1, 7:39], wide[:, 1::2, 2:-1, 40:72], lengths, starts, backend=backend
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    both = torch.stack([lengths, starts], 1)
    got = block_attention(query, keys, values, both[:, 0], both[:, 1], backend=backend)
    assert torch.equal(got[0], want[0])


def test_result_depends_on_neither_threads_nor_batch(dtype, backend):
    if backend == "torch":
        pytest.skip("torch gives no such guarantee")
    query, keys, values, lengths, starts = make(8, 2, 16, [2000, 700, 31], dtype=dtype)
    want = block_attention(query, keys, values, lengths, starts, backend=backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            got = block_attention(query, keys, values, lengths, starts, backend=backend)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    finally:
        torch.set_num_threads(threads)
    for row in range(3):
        one = slice(row, row + 1)
        got = block_attention(query[one], keys[one], values[one], lengths[one], starts[one], backend=backend)
        assert torch.equal(got[0], want[0][one])


def far_rows(device="cpu"):
    """Keys and values of 2^20 rows that lie 4096 elements apart, of which 100 have values; window, length, starts."""
    rows = 1 << 20
    store = torch.empty(rows * 4096, dtype=torch.bfloat16, device=device)
    caches = [store.as_strided((1, 2, rows, 64), (4096, 64, 4096, 1), offset) for offset in (0, 1024)]
    for cache in caches:
        cache[:, :, -100:] = torch.randn(1, 2, 100, 64, generator=torch.Generator().manual_seed(1))
    query, *window = make(8, 2, 5, [95], dim=64, dtype=torch.bfloat16)[:3]
    window = [x[:, :, :5].nan_to_num().contiguous().to(device) for x in window]
    lengths, starts = (torch.tensor([x], dtype=torch.int32, device=device) for x in (rows - 20, 3))
    return query.to(device), caches, window, lengths, starts


def check_far_rows(backend, device="cpu"):
    query, caches, window, lengths, starts = far_rows(device)
    append_kv_(*caches, *window, lengths, backend=backend)
    near = [cache[:, :, -100:].clone().cpu() for cache in caches]
    for cache, new in zip(near, window, strict=True):
        assert torch.equal(cache[:, :, 80:85], new.cpu())
    out, _ = block_attention(query, *caches, lengths, starts, sliding_window=50, backend=backend)
    want, _ = reference(
        query.cpu(), *near, torch.tensor([80]), torch.tensor([0]), sliding_window=50, dtype=torch.float64
    )
    torch.testing.assert_close(out.cpu().double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["cpp-baseline", "triton", "cuda-emulated"], indirect=True)
def test_rows_more_than_2_to_the_31_elements_away(backend, dtype, monkeypatch):
    """A cache of 2^32 elements, of which hardly any page is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    check_far_rows(backend)


def test_large_scores(dtype, backend):
    """exp must neither overflow nor lose the sum."""
    query, keys, values, lengths, starts = make(2, 1, 4, [50], dtype=dtype)
    out, lse = block_attention(query * 300, keys, values, lengths, starts, backend=backend)
    exact, exact_lse = reference(query * 300, keys, values, lengths, starts, dtype=torch.float64)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    error = (naive(query * 300, keys, values, lengths, starts).double() - exact).abs().max().item()
    assert (out.double() - exact).abs().max().item() <= 2 * error + ATOL


def test_empty_batch(dtype, backend):
    query, keys, values, lengths, starts = (x[:0] for x in make(2, 1, 4, [50], dtype=dtype))
    out, lse = block_attention(query, keys, values, lengths, starts, backend=backend)
    assert out.shape == (0, 4, 2, 32) and lse.shape == (0, 2, 4)


@pytest.mark.parametrize(("sinks", "branch"), [(None, 0), (torch.randn(4), 2)], ids=["plain", "sinks"])
def test_opcheck(sinks, branch, dtype, backend):
    arguments = make(4, 2, 4, [7, 2], spare=0, dtype=dtype)
    torch.library.opcheck(
        torch.ops.cllm_kernels.block_attention.default, (*arguments, None, 4, 2.0, sinks, branch, backend)
    )


def test_compiles(dtype, backend):
    arguments = make(4, 2, 3, [7, 2], dtype=dtype)

    def run(*tensors):
        return block_attention(*tensors, backend=backend)[0] + 1

    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(*arguments), run(*arguments))


BAD = {
    "query has shape": lambda a: {"query": a["query"][0]},
    "Hq a multiple of Hkv": lambda a: {"query": a["query"].new_zeros(2, 3, 5, 32)},
    "key_cache has shape": lambda a: {"key_cache": a["key_cache"][..., :8]},
    "value_cache has shape": lambda a: {"value_cache": a["value_cache"][:, :1]},
    "float64": lambda a: {"query": a["query"].double()},
    "key_cache has dtype torch.float16": lambda a: {"key_cache": a["key_cache"].half()},
    "value_cache has strides": lambda a: {"value_cache": a["value_cache"].transpose(2, 3).contiguous().transpose(2, 3)},
    "lengths has dtype torch.int64": lambda a: {"lengths": a["lengths"].long()},
    "starts has shape": lambda a: {"starts": a["starts"][:1]},
    "lengths is on meta": lambda a: {"lengths": a["lengths"].to("meta")},
    "room for S = 2": lambda a: {"key_cache": a["key_cache"][:, :, :2], "value_cache": a["value_cache"][:, :, :2]},
    "row 1 has length -1": lambda a: {"lengths": torch.tensor([0, -1], dtype=torch.int32)},
    "row 0 has length 13: .* n = 3 .* S = 15": lambda a: {"lengths": torch.tensor([13, 0], dtype=torch.int32)},
    "row 1 has start -2": lambda a: {"starts": torch.tensor([0, -2], dtype=torch.int32)},
    "sliding_window is -1": lambda a: {"sliding_window": -1},
    "softcap is -1.0": lambda a: {"softcap": -1.0},
    "softcap is nan": lambda a: {"softcap": math.nan},
    "branch is 2; .* divide the n = 3": lambda a: {"branch": 2},
    "branch is -3": lambda a: {"branch": -3},
    "sinks has shape": lambda a: {"sinks": torch.zeros(3)},
    "sinks has dtype torch.int64": lambda a: {"sinks": torch.zeros(4, dtype=torch.int64)},
    "backend is 'fast'": lambda a: {"backend": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, dtype, backend):
    names = ("query", "key_cache", "value_cache", "lengths", "starts")
    arguments = dict(zip(names, make(4, 2, 3, [7, 2], dtype=dtype)), backend=backend)
    with pytest.raises(ValueError, match=message):
        block_attention(**arguments | BAD[message](arguments))
