"""The loop that CUDA devices run, with a stand-in for the graph: several steps as one launch, its status read later."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import EOS, make_model, make_prompts

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.decoding import loop, session

MODEL = make_model("qwen2", seed=4)
READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextlib.contextmanager
def no_host_reads(monkeypatch):
    """Everything by which the host would wait for a device's value raises."""

    def read(*args, **kwargs):
        raise AssertionError("the host reads a value")

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, read)
        yield


@pytest.fixture
def launches(monkeypatch):
    """Makes the CPU decode in chunks; the list holds the steps of each launch."""
    counts = []

    def capture(step, count, running):
        def replay():
            counts.append(count)
            with no_host_reads(monkeypatch):
                for _ in range(count):
                    step()

        return replay

    plain = session.runs_on_device
    monkeypatch.setattr(session, "capture", capture)
    monkeypatch.setattr(loop, "runs_on_device", lambda device, *rest: plain(torch.device("cuda"), *rest))
    return counts


def test_the_guard_sees_reads(monkeypatch):
    for read in (lambda t: t.item(), lambda t: t.tolist(), bool, int, float, lambda t: [0, 1][t], lambda t: t.numpy()):
        with no_host_reads(monkeypatch), pytest.raises(AssertionError, match="host reads"):
            read(torch.tensor(1))


@pytest.mark.parametrize("longest", [1, 3, 16])
@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("rows", [1, 4])
def test_equals_generate_without_host_reads(rows, mode, longest, launches, monkeypatch):
    monkeypatch.setattr(session, "_LONGEST_CHUNK", longest)
    monkeypatch.setattr(session, "_CHUNKS", 2)
    inputs = make_prompts(rows)
    options = dict(do_sample=False, max_new_tokens=60, eos_token_id=[EOS, *range(3, 6)])
    expected = MODEL.generate(**inputs, **options)
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6, mode=mode))
    assert torch.equal(generator.generate(**inputs, **options), expected)
    run = generator.statistics
    assert launches and set(launches) <= set(range(1, longest + 1))
    assert run.forwards == 3 + sum(launches)  # the prompt's, two steps that compile, the launches
    assert max(row.iterations for row in run.rows) > run.forwards - 3 * longest  # at most the last two were in vain
    assert sum(run.steps.values()) == run.forwards


def test_sampling_and_pointwise_processors_stay_on_the_device(launches):
    inputs = make_prompts(3)
    options = dict(do_sample=True, top_k=9, top_p=0.9, temperature=1.3, max_new_tokens=30)
    chunked = JacobiGenerator(MODEL, JacobiConfig(block_size=6, seed=3)).generate(**inputs, **options)
    assert launches
    alone = JacobiGenerator(MODEL, JacobiConfig(draft="none", cuda_graph=False, seed=3)).generate(**inputs, **options)
    assert torch.equal(chunked, alone)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (dict(cuda_graph=False), {}),
        (dict(draft="lookup"), {}),
        (dict(draft="auto"), {}),
        (dict(record_trajectory=True), {}),
        ({}, dict(repetition_penalty=1.2)),
        ({}, dict(min_new_tokens=3)),
        ({}, dict(max_time=60.0)),
        ({}, dict(output_scores=True, return_dict_in_generate=True)),
    ],
)
def test_what_needs_the_host_is_not_captured(config, options, launches):
    JacobiGenerator(MODEL, JacobiConfig(**config)).generate(
        **make_prompts(1), do_sample=False, max_new_tokens=20, **options
    )
    assert not launches


def test_streaming_gets_every_token_once(launches):
    inputs = make_prompts(1)
    commits = []
    got = JacobiGenerator(MODEL, JacobiConfig(block_size=5)).generate(
        **inputs, do_sample=False, max_new_tokens=50, eos_token_id=None, on_commit=commits.append
    )
    assert launches and len(commits) > 2
    assert sum(commits, []) == got[0, 12:].tolist()


def test_nan_logits_end_the_loop(launches, monkeypatch):
    """On a device converge_ cannot raise: it counts the rows, and nothing moves until the host looks."""
    model = make_model("llama", seed=2)
    calls = []

    def poison(module, args, output):
        calls.append(1)
        if len(calls) == 5:
            output.logits[:] = float("nan")

    model.register_forward_hook(poison)
    with pytest.raises(ValueError, match="NaN"):
        JacobiGenerator(model, JacobiConfig(block_size=5)).generate(
            **make_prompts(1), do_sample=False, max_new_tokens=50, eos_token_id=None
        )


def test_a_forward_that_cannot_be_captured_is_reported(launches, monkeypatch):
    def capture(step, count, running):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(session, "capture", capture)
    inputs = make_prompts(2)
    expected = MODEL.generate(**inputs, do_sample=False, max_new_tokens=30)
    with pytest.warns(RuntimeWarning, match="cannot be captured.*not permitted"):
        got = JacobiGenerator(MODEL, JacobiConfig(block_size=5)).generate(**inputs, do_sample=False, max_new_tokens=30)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("conditions", [True, False])
def test_steps_behind_the_first_are_conditional(conditions, monkeypatch):
    """With a stand-in for torch's graph that writes down what is captured, and where."""
    log = []

    class Graph:
        def begin_capture_to_if_node(self, condition):
            log.append(("if", condition))

        def end_capture_to_conditional_node(self):
            log.append("end")

        def pool(self):
            return (0, 1)

        def replay(self):
            log.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(session, "_pools", {})
    monkeypatch.setattr(session, "_HAS_CONDITIONS", conditions)
    replay = session.capture(lambda: log.append("step"), 3, torch.tensor(2))
    one = [("if", torch.tensor(True)), "step", "end"] if conditions else ["step"]
    assert log == ["step", *one, *one] and len(session._pools) == 1
    replay()
    assert log[-1] == "replay"
