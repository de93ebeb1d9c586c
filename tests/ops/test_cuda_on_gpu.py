"""The CUDA kernels as a GPU runs them, against the reference on the CPU; test_ops_on_gpu.py has append_kv_ and converge_."""

import math

import pytest
import torch
from helpers import make_model, make_prompts
from test_block_attention import make
from test_converge import agreeable_logits, random_state
from test_ops_on_gpu import check, to_gpu

from cllm_kernels import JacobiConfig, JacobiGenerator, backends
from cllm_kernels.ops import append_kv_, block_attention, converge_

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(backends.available()["cuda"] is not None, reason=str(backends.available()["cuda"])),
]
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("width", [1, 2, 16, 17, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("length", [0, 1, 63, 799, 20000])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_grid(dtype, length, group, width):
    check("cuda", heads=2 * group, kv_heads=2, width=width, lengths=[length, length // 3],
          starts=[0, length // 5], dim=64, dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("dims", [(8, 8), (13, 5), (64, 128), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("width", [2, 8, 16, 64])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_sizes(dtype, width, dims):
    check("cuda", heads=8, kv_heads=2, width=width, lengths=[700, 3], dim=dims[0], value_dim=dims[1], dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"sliding_window": 7}, {"sliding_window": 1000}, {"softcap": 2.0}, {"softcap": 30.0, "sliding_window": 20}],
    ids=str,
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 333])
def test_options(width, dtype, options):
    check("cuda", options, heads=6, kv_heads=2, width=width, lengths=[1300, 40], starts=[0, 3], dim=64, dtype=dtype)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [2, 8, 16])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_later_rows_of_the_window_are_not_read(dtype, width, poison):
    seen = width // 2
    query, keys, values, lengths, starts = (x.cuda() for x in make(8, 2, width, [700, 7], dtype=dtype))
    clean, _ = block_attention(query, keys, values, lengths, starts, backend="cuda")
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, length + seen] = poison
        values[row, :, length + seen] = poison
    out, _ = block_attention(query, keys, values, lengths, starts, backend="cuda")
    assert torch.equal(out[:, :seen], clean[:, :seen])
    assert not out[:, seen:].isfinite().any(-1).any() or not math.isnan(poison)


def test_rows_do_not_depend_on_the_batch():
    arguments = [x.cuda() for x in make(8, 2, 16, [20000, 700, 31], dtype=torch.bfloat16)]
    want, _ = block_attention(*arguments, backend="cuda")
    for row in range(3):
        one = [x[row : row + 1] for x in arguments]
        assert torch.equal(block_attention(*one, backend="cuda")[0], want[row : row + 1])


def test_float32_is_refused_and_auto_takes_triton():
    arguments = [x.cuda() for x in make(8, 2, 4, [30])]
    with pytest.raises(ValueError, match="'cuda' was asked for but the tensors are float32"):
        block_attention(*arguments, backend="cuda")
    auto, triton = (block_attention(*arguments, backend=name)[0] for name in ("auto", "triton"))
    assert torch.equal(auto, triton)


def launch_all(state, logits, tensors, caches, window):
    append_kv_(*caches, *window, state.lengths, backend="cuda")
    out = block_attention(*tensors[:3], state.lengths, tensors[4], backend="cuda")[0]
    converge_(logits, state, backend="cuda")
    return out


def case(device):
    generator = torch.Generator().manual_seed(0)
    state = random_state(generator, 3, 4, 50, limit=200)
    state.limits.fill_(200)
    logits = agreeable_logits(generator, state, 50, torch.bfloat16).to(device)
    tensors = [x.to(device) for x in make(8, 2, 4, [400, 300, 200], spare=300, dtype=torch.bfloat16)]
    for cache in tensors[1:3]:
        cache.nan_to_num_()
    window = [torch.ones(3, 2, 4, 32, dtype=torch.bfloat16, device=device) for _ in range(2)]
    return logits, tensors, tensors[1:3], window, to_gpu(state, device)


def test_streams_do_not_disturb_each_other():
    """Launches on two streams at once, many times: each stream has counters of its own."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    cases = [case("cuda") for _ in streams]
    torch.cuda.synchronize()
    outs = []
    for _ in range(50):
        for stream, (logits, tensors, caches, window, state) in zip(streams, cases, strict=True):
            with torch.cuda.stream(stream):
                outs.append(launch_all(state, logits, tensors, caches, window))
    torch.cuda.synchronize()
    for first, second in zip(outs[::2], outs[1::2], strict=True):
        assert torch.equal(first, second)
    for a, b in zip(cases[0][-1].tensors(), cases[1][-1].tensors(), strict=True):
        assert torch.equal(a, b)


def test_graphs_run_beside_each_other():
    """Two graphs that were captured on one stream have counters of their own, and set them to 0 themselves."""
    cases = [case("cuda") for _ in range(2)]
    eager = case("cuda")
    warm = case("cuda")
    launch_all(warm[-1], *warm[:-1])
    torch.cuda.synchronize()
    graphs, outs = [], []
    for *arguments, state in cases:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs.append(launch_all(state, *arguments))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        want = launch_all(eager[-1], *eager[:-1])
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for out, (*_, state) in zip(outs, cases, strict=True):
        assert torch.equal(out, want)
        for a, b in zip(state.tensors(), eager[-1].tensors(), strict=True):
            assert torch.equal(a, b)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    results = []
    for device in ("cuda:0", "cuda:1"):
        logits, tensors, caches, window, state = case(device)
        results.append((launch_all(state, logits, tensors, caches, window), *state.tensors()))
        assert torch.cuda.current_device() == 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_generate_in_bfloat16():
    """Graphs and eager iterations run the same kernels, so that they give the same tokens."""
    model = make_model("llama", dtype=torch.bfloat16).cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(3).items()}
    tokens = []
    for graph in (True, False):
        generator = JacobiGenerator(model, JacobiConfig(block_size=8, cuda_graph=graph))
        tokens.append(generator.generate(**inputs, do_sample=False, max_new_tokens=40))
        assert generator.statistics.backend == "cuda"
    assert torch.equal(*tokens)
