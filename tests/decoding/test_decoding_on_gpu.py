"""Jacobi decoding on a GPU equals generate there, token for token in fp32."""

import functools
import gc
import json
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import Planted, make_model, make_prompts

from cllm_kernels import JacobiConfig, JacobiGenerator, backends
from cllm_kernels.comparison import load_model
from cllm_kernels.decoding import loop, session
from cllm_kernels.spider import prompt_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
MODEL = Path(__file__).parents[2] / "models" / "spider-cllm"


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("mode", ["window", "block"])
def test_equals_generate(mode, backend):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, tokenizer = load_model(MODEL)
    model.to("cuda")
    questions = [json.loads(line) for line in (MODEL / "held_out_sample.jsonl").read_text().splitlines()]
    generator = JacobiGenerator(model, JacobiConfig(block_size=16, mode=mode, backend=backend))
    for row in questions[:24]:
        inputs = tokenizer(prompt_for(row), return_tensors="pt", return_token_type_ids=False).to("cuda")
        want = model.generate(**inputs, do_sample=False, max_new_tokens=128)
        got = generator.generate(**inputs, do_sample=False, max_new_tokens=128)
        assert torch.equal(got, want), prompt_for(row)
        assert generator.statistics.backend == backend


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_known_families_equal_generate(family):
    """With torch's kernels between the linear layers, and with ours."""
    model = make_model(family, seed=3).cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    want = model.generate(**inputs, **options)
    for optimized in (False, True):
        generator = JacobiGenerator(model, JacobiConfig(block_size=6, optimize=optimized))
        assert torch.equal(generator.generate(**inputs, **options), want), optimized


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "block"}, {"draft": "lookup"}, {"adaptive": True}, {"candidates": 2}, {"draft": "auto", "candidates": 2},
     {"record_trajectory": True}, {"max_batch_size": 3}, {"max_batch_size": 3, "draft": "lookup"}],
    ids=str,
)
def test_rows_that_end_apart_equal_generate(options):
    """A batch of questions of several lengths, on each way through the loop, the second time with what the first one left."""
    model, tokenizer = load_model(MODEL)
    model.to("cuda")
    tokenizer.padding_side = "left"
    questions = [json.loads(line) for line in (MODEL / "held_out_sample.jsonl").read_text().splitlines()]
    prompts = [prompt_for(row) for row in questions[:8]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to("cuda")
    want = model.generate(**inputs, do_sample=False, max_new_tokens=96)
    generator = JacobiGenerator(model, JacobiConfig(16, **options))
    for _ in range(2):
        assert torch.equal(generator.generate(**inputs, do_sample=False, max_new_tokens=96), want)


def test_candidates_equal_generate():
    model = make_model("llama", seed=4).cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(4).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    expected = model.generate(**inputs, **options)
    generator = JacobiGenerator(model, JacobiConfig(block_size=6, candidates=3))
    planted = functools.partial(Planted, expected=expected[:, 12:].tolist(), seed=0)
    with mock.patch.object(loop, "LookupDrafts", planted):
        assert torch.equal(generator.generate(**inputs, **options), expected)
    assert sum(generator.statistics.chosen[1:]) > 4


def test_graphs_are_kept_for_prompts_of_like_length():
    """Captured at the first call, replayed by the following ones, for other prompts, seeds and lengths."""
    model = make_model("llama").cuda()
    generator = JacobiGenerator(model, JacobiConfig(block_size=6))
    for seed in range(4):
        inputs = {name: tensor.cuda() for name, tensor in make_prompts(2, width=8 + seed, seed=seed).items()}
        options = dict(do_sample=False, max_new_tokens=40 + seed)
        assert torch.equal(generator.generate(**inputs, **options), model.generate(**inputs, **options))
        sessions = [value for key, value in generator._memory.items() if key[0] == "session"]
        assert len(sessions) == 1 and sessions[0].replay is not None
        first = sessions[0] if seed == 0 else first
        assert sessions[0] is first
    other = {name: tensor.cuda() for name, tensor in make_prompts(3).items()}
    assert torch.equal(generator.generate(**other, **options), model.generate(**other, **options))
    with torch.no_grad():  # other weights in the same place
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(generator.generate(**other, **options), model.generate(**other, **options))


def test_graphs_are_captured_when_all_earlier_ones_are_gone():
    model = make_model("llama").cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    want = model.generate(**inputs, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of a capture that failed
        for _ in range(3):
            assert torch.equal(JacobiGenerator(model, JacobiConfig(block_size=6)).generate(**inputs, **options), want)
            gc.collect()


def test_a_capture_that_fails_leaves_nothing_behind():
    """A model that reads a value on the host decodes without graphs; then others are captured, and torch is as before."""
    model = make_model("llama").cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    want, stream = model.generate(**inputs, **options), torch.cuda.current_stream()
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output.sum().item() and None)
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        assert torch.equal(JacobiGenerator(model, JacobiConfig(block_size=6)).generate(**inputs, **options), want)
    hook.remove()
    assert torch.cuda.current_stream() == stream
    torch.randn(1, device="cuda")  # raises where the generator still takes itself to be in a capture
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(JacobiGenerator(model, JacobiConfig(block_size=6)).generate(**inputs, **options), want)


def test_an_iteration_does_not_wait_for_the_device(monkeypatch):
    plain = session.make_step

    def guarded(*args):
        step = plain(*args)

        def run():
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(session, "make_step", guarded)
    model = make_model("llama").cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    generator = JacobiGenerator(model, JacobiConfig(block_size=6))
    assert torch.equal(generator.generate(**inputs, **options), model.generate(**inputs, **options))


def test_sampling_is_the_same_in_graphs_and_without():
    model = make_model("llama").cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=True, max_new_tokens=40, temperature=1.2, top_k=0)
    graphs = JacobiGenerator(model, JacobiConfig(block_size=6, seed=3)).generate(**inputs, **options)
    alone = JacobiGenerator(model, JacobiConfig(draft="none", cuda_graph=False, seed=3)).generate(**inputs, **options)
    assert torch.equal(graphs, alone)


@pytest.mark.skipif(backends.available()["cuda"] is not None, reason=str(backends.available()["cuda"]))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_generate_in_bfloat16(compiled):
    """Graphs and eager iterations run the same kernels, so that they give the same tokens."""
    model = make_model("llama", dtype=torch.bfloat16).cuda()
    model = torch.compile(model) if compiled else model
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(3).items()}
    tokens = []
    for graph in (True, False):
        generator = JacobiGenerator(model, JacobiConfig(block_size=8, cuda_graph=graph))
        tokens.append(generator.generate(**inputs, do_sample=False, max_new_tokens=40))
        assert generator.statistics.backend == "cuda"
    assert torch.equal(*tokens)


def test_the_loop_allocates_nothing_and_asks_for_one_status_a_graph(monkeypatch):
    """Of a session that is kept: replays with a read of the status behind each, while torch refuses what would wait."""
    model = make_model("llama").cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    generator = JacobiGenerator(model, JacobiConfig(block_size=6))
    options = dict(do_sample=False, max_new_tokens=60)
    want = generator.generate(**inputs, **options)
    counts, plain = [], session.run_chunks

    def watched(kept, *rest):
        replay, sent = kept.replay, []

        def counted():
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            replay()
            counts.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)

        send = session.Poll.send
        monkeypatch.setattr(session.Poll, "send", lambda poll: sent.append(1) or send(poll))
        kept.replay = counted
        torch.cuda.set_sync_debug_mode("error")
        try:
            return plain(kept, *rest)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            kept.replay = replay
            assert len(sent) == len(counts)

    monkeypatch.setattr("cllm_kernels.decoding.loop.run_chunks", watched)
    assert torch.equal(generator.generate(**inputs, **options), want)
    assert counts and not any(counts)


@pytest.mark.parametrize("graph", [None, False], ids=["graphs", "eager"])
def test_on_a_stream_of_the_caller(graph):
    model = make_model("llama").cuda()
    inputs = {name: tensor.cuda() for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    want = model.generate(**inputs, **options)
    generator = JacobiGenerator(model, JacobiConfig(block_size=6, cuda_graph=graph))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = [generator.generate(**inputs, **options) for _ in range(2)]
    torch.cuda.synchronize()
    assert all(torch.equal(tokens, want) for tokens in got)


@pytest.mark.parametrize("graph", [None, False], ids=["graphs", "eager"])
def test_on_another_device_than_the_current_one(graph):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    model = make_model("llama").to("cuda:1")
    inputs = {name: tensor.to("cuda:1") for name, tensor in make_prompts(2).items()}
    options = dict(do_sample=False, max_new_tokens=40)
    generator = JacobiGenerator(model, JacobiConfig(block_size=6, cuda_graph=graph))
    with torch.cuda.device(1):
        want = model.generate(**inputs, **options)
    for _ in range(2):
        assert torch.equal(generator.generate(**inputs, **options), want)
    assert torch.cuda.current_device() == 0
