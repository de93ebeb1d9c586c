"""Times of the ops against what PyTorch offers for the same work, and the share of the device's floor reached.

    pytest benchmarks/test_kernels.py --benchmark-json=kernels.json

Runs on the GPU where there is one, else on the CPU. How it is timed stands in measure.py. pytest-benchmark's
statistics are ours; the alternatives' medians and all else stand in `extra_info`.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from measure import BACKEND, DEVICE, ON_GPU, compare

from cllm_kernels import backends
from cllm_kernels.ops import JacobiState, append_kv_, block_attention, converge_, lm_head_argmax, window_linear
from cllm_kernels.ops.block_attention import cuda_refusal
from cllm_kernels.ops.append_kv import rotate

DTYPES = {"bf16": torch.bfloat16} if ON_GPU else {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARIES = (32_000, 128_256, 152_064)
WIDTHS = (1, 8, 16, 32, 64, 128)
if ON_GPU:
    # (Hq, Hkv, D): Llama-3-8B, Qwen2.5-7B, Llama-2-7B.
    SHAPES = {"32x8x128": (32, 8, 128), "28x4x128": (28, 4, 128), "32x32x128": (32, 32, 128)}
    # First what decides between our kernels (attention_table.py): each of its sizes once. Then the rest of the plots.
    LENGTHS = (256, 1024, 4096, 16384, 65536)
    SIZES = [(1, width, length) for width in (16, 1, 64) for length in LENGTHS]
    SIZES += [(1, width, 1024) for width in (8, 32, 128)]
    SIZES += [(batch, 16, length) for batch in (4, 16) for length in (1024, 16384)]
else:
    # (Hq, Hkv, D): Llama-3-8B, Qwen2.5-0.5B, and about the bundled model.
    SHAPES = {"32x8x128": (32, 8, 128), "14x2x64": (14, 2, 64), "8x4x32": (8, 4, 32)}
    SIZES = [(1, 16, 256), (1, 16, 1024), (1, 16, 8192), (4, 16, 256), (4, 16, 1024)]
    SIZES += [(1, width, 1024) for width in WIDTHS if width != 16]

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason=f"no kernels for this device: {backends.available()}")


@pytest.fixture(params=["all threads"] if ON_GPU else ["one thread", "all threads"])
def threads(request):
    """On a machine that does other work, only one thread gives ratios to trust: a barrier waits for time slices."""
    before = torch.get_num_threads()
    if request.param == "one thread":
        torch.set_num_threads(1)
    elif before == 1:
        pytest.skip("torch has one thread")
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def in_triton(call, backend):
    """Our Triton kernel as an alternative to our CUDA kernel."""
    return {"triton": call} if backend == "cuda" and backends.available()["triton"] is None else {}


@functools.cache
def flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_alternative(query, keys, values, length):
    """FlexAttention over the window's block mask, compiled. Each shape compiles anew, so only one length has it."""
    from torch.nn.attention.flex_attention import create_block_mask

    width, rows = query.size(2), keys.size(2)
    mask = create_block_mask(lambda b, h, i, j: j <= length + i, 1, 1, width, rows, device=DEVICE)
    return lambda: flex()(query, keys, values, block_mask=mask, enable_gqa=True)


def accept_length(logits, window):
    """What a plain PyTorch loop computes at each step, without commit, stop, shift and refill."""
    predicted = logits.argmax(-1)
    return 1 + (window[:, 1:] == predicted[:, :-1]).cumprod(1).sum(1), predicted


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_converge(benchmark, report, threads, dtype, vocabulary):
    logits = torch.randn(1, 16, vocabulary, device=DEVICE).to(DTYPES[dtype])
    prompt = torch.arange(100, device=DEVICE)[None]
    state = JacobiState.create(prompt, limits=1000, block_size=16, eos=[vocabulary])
    fresh = state.clone()

    def restore():
        state.copy_(fresh)

    alternatives = {
        "torch": lambda: converge_(logits, state, backend="torch"),
        "torch.argmax alone": lambda: logits.argmax(-1),
        "argmax, compare, .item()": lambda: accept_length(logits, state.window)[0].item(),
    } | in_triton(lambda: converge_(logits, state, backend="triton"), BACKEND)
    if ON_GPU:
        compiled = torch.compile(accept_length, dynamic=False)
        alternatives["argmax, compare, compiled"] = lambda: compiled(logits, state.window)
    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: converge_(logits, state, backend=BACKEND),
            alternatives,
            flops=0,
            nbytes=logits.nbytes,
            dtype=logits.dtype,
            before=restore,
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv(benchmark, report, dtype, shape):
    _, kv_heads, dim = SHAPES[shape]
    make = functools.partial(torch.randn, device=DEVICE, dtype=DTYPES[dtype])
    caches = [make(4, kv_heads, 2048, dim) for _ in range(2)]
    window = [make(4, 16, kv_heads, dim).transpose(1, 2) for _ in range(2)]
    lengths = torch.tensor([5, 700, 31, 2000], dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: append_kv_(*caches, *window, lengths, backend=BACKEND),
            {"torch": lambda: append_kv_(*caches, *window, lengths, backend="torch")}
            | in_triton(lambda: append_kv_(*caches, *window, lengths, backend="triton"), BACKEND),
            flops=0,
            nbytes=2 * sum(tensor.nbytes for tensor in window),
            dtype=DTYPES[dtype],
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_kv_with_rope(benchmark, report, dtype, shape):
    """Keys rotated while they are written, against PyTorch's rotation before our op or PyTorch's indexed assignment."""
    _, kv_heads, dim = SHAPES[shape]
    make = functools.partial(torch.randn, device=DEVICE, dtype=DTYPES[dtype])
    caches = [make(4, kv_heads, 2048, dim) for _ in range(2)]
    key, value = (make(4, 16, kv_heads, dim).transpose(1, 2) for _ in range(2))
    cos, sin = (make(4, 16, dim) for _ in range(2))
    lengths = torch.tensor([5, 700, 31, 2000], dtype=torch.int32, device=DEVICE)

    def rotated_before(backend):
        append_kv_(*caches, rotate(key, cos, sin), value, lengths, backend=backend)

    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: append_kv_(*caches, key, value, lengths, cos, sin, backend=BACKEND),
            {
                "rotated in torch, appended by the op": lambda: rotated_before(BACKEND),
                "torch": lambda: rotated_before("torch"),
            }
            | in_triton(lambda: append_kv_(*caches, key, value, lengths, cos, sin, backend="triton"), BACKEND),
            flops=3 * key.numel(),
            nbytes=2 * (key.nbytes + value.nbytes) + cos.nbytes + sin.nbytes,
            dtype=DTYPES[dtype],
        )


# (V, H) of Llama-3-8B, Qwen2.5-7B and Llama-2-7B; on the CPU of Qwen2.5-0.5B and the bundled model.
if ON_GPU:
    HEADS = {"128256x4096": (128_256, 4096), "152064x3584": (152_064, 3584), "32000x4096": (32_000, 4096)}
else:
    HEADS = {"151936x896": (151_936, 896), "1024x256": (1024, 256)}


@pytest.mark.parametrize("width", [1, 8, 16, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_lm_head_argmax(benchmark, report, head, dtype, width):
    vocabulary, size = HEADS[head]
    make = functools.partial(torch.randn, device=DEVICE, dtype=DTYPES[dtype])
    hidden, weight = make(1, width, size), make(vocabulary, size)
    backend = "triton" if ON_GPU else "cpp"
    alternatives = {
        "linear, argmax": lambda: F.linear(hidden, weight).argmax(-1),
        "linear alone": lambda: F.linear(hidden, weight),
    }
    if not ON_GPU:
        alternatives["window_linear, argmax"] = lambda: window_linear(hidden, weight).argmax(-1)
    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: lm_head_argmax(hidden, weight, backend=backend),
            alternatives,
            flops=2 * width * vocabulary * size,
            nbytes=weight.nbytes + hidden.nbytes,
            dtype=hidden.dtype,
            backend=backend,
        )


# Last, since its many cases are the first to go where a stage of gpu_check.sh is stopped.
@pytest.mark.parametrize(("batch", "width", "length"), SIZES, ids=lambda value: str(value))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_attention(benchmark, report, threads, dtype, shape, batch, width, length):
    heads, kv_heads, dim = SHAPES[shape]
    backend = backends.resolve("auto", DEVICE, cuda_refusal(DTYPES[dtype], dim, dim))
    rows = length + width
    make = functools.partial(torch.randn, device=DEVICE, dtype=DTYPES[dtype])
    query = make(batch, width, heads, dim)
    keys, values = (make(batch, kv_heads, rows, dim) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    starts = torch.zeros_like(lengths)

    visible = torch.ones(width, rows, dtype=torch.bool, device=DEVICE).tril(length).expand(batch, 1, width, rows)
    added = torch.zeros(batch, 1, width, rows, dtype=query.dtype, device=DEVICE).masked_fill(~visible, -torch.inf)
    wide = [cache.repeat_interleave(heads // kv_heads, 1) for cache in (keys, values)]
    transposed = query.transpose(1, 2)
    sdpa = F.scaled_dot_product_attention
    alternatives = {
        "sdpa, bool mask, gqa": lambda: sdpa(transposed, keys, values, visible, enable_gqa=True),
        "sdpa, float mask, gqa": lambda: sdpa(transposed, keys, values, added, enable_gqa=True),
        "sdpa, float mask, expanded before": lambda: sdpa(transposed, *wide, added),
    }
    alternatives |= in_triton(lambda: block_attention(query, keys, values, lengths, starts, backend="triton"), backend)
    if ON_GPU and width == 16 and batch == 1 and length == 4096:
        alternatives["flex attention"] = flex_alternative(transposed, keys, values, length)
    with torch.inference_mode():
        compare(
            benchmark,
            report,
            lambda: block_attention(query, keys, values, lengths, starts, backend=backend),
            alternatives,
            flops=4 * batch * heads * width * rows * dim,
            nbytes=keys.nbytes + values.nbytes,
            dtype=DTYPES[dtype],
            backend=backend,
        )
