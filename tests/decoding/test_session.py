"""The loop that CUDA devices run, with a stand-in for the graph: several steps as one launch, its status read later."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from helpers import EOS, Frames, make_model, make_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from cllm_kernels import JacobiConfig, JacobiGenerator
from cllm_kernels.decoding import JacobiCache, loop, session
from cllm_kernels.integrations import generate
from cllm_kernels.ops import JacobiState

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


class HostReads(TorchDispatchMode):
    """Counts operations, and those of them that give the host a value or a shape that is known on the device alone."""

    operations = reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        return func(*args, **(kwargs or {}))


class Launches(list):
    """The steps of each launch.

    Attributes:
        captures: how many graphs were recorded.
    """

    captures = 0


@pytest.fixture
def launches(monkeypatch):
    """Makes the CPU decode in chunks, and keep them for other prompts, as GPUs do."""
    counts = Launches()

    def capture(step, count, running):
        counts.captures += 1

        def replay():
            counts.append(count)
            with no_host_reads(monkeypatch):
                for _ in range(count):
                    step()

        return replay

    monkeypatch.setattr(session, "capture", capture)
    for module in (session, generate):
        monkeypatch.setattr(module, "may_capture", lambda device, config: config.cuda_graph is not False)
    return counts


def test_the_guard_sees_reads(monkeypatch):
    for read in (lambda t: t.item(), lambda t: t.tolist(), bool, int, float, lambda t: [0, 1][t], lambda t: t.numpy()):
        with no_host_reads(monkeypatch), pytest.raises(AssertionError, match="host reads"):
            read(torch.tensor(1))


def test_the_mode_sees_reads():
    x, keep = torch.arange(3), torch.tensor([True, False, True])
    for read in (x.sum().item, x.nonzero, lambda: x[keep], lambda: torch.equal(x, x), lambda: bool(x.sum()), x.unique):
        with HostReads() as seen:
            read()
        assert seen.reads > 0
    with HostReads() as seen:
        x.add_(1).clamp_(0, 2)
    assert seen.operations == 2 and seen.reads == 0


@pytest.mark.parametrize("rows", [1, 3])
def test_no_operation_of_a_step_needs_the_host(rows, launches, monkeypatch):
    plain, modes = session.make_step, []

    def watched(*args):
        step = plain(*args)

        def run():
            with HostReads() as mode:
                step()
            modes.append(mode)

        return run

    monkeypatch.setattr(session, "make_step", watched)
    options = dict(do_sample=True, top_k=9, top_p=0.9, temperature=1.3, max_new_tokens=30)
    JacobiGenerator(MODEL, JacobiConfig(block_size=6, seed=3)).generate(**make_prompts(rows), **options)
    assert len(modes) == 2 + sum(launches)
    assert all(mode.operations > 20 and mode.reads == 0 for mode in modes)


@pytest.mark.parametrize("longest", [1, 3, 16])
@pytest.mark.parametrize("mode", ["window", "block"])
@pytest.mark.parametrize("rows", [1, 4])
def test_equals_generate_without_host_reads(rows, mode, longest, launches, monkeypatch):
    monkeypatch.setattr(session, "_LONGEST_CHUNK", longest)
    monkeypatch.setattr(session, "_CHUNKS", 2)
    inputs = make_prompts(rows)
    options = dict(do_sample=False, max_new_tokens=60, eos_token_id=[EOS, *range(3, 6)])
    expected = MODEL.generate(**inputs, **options)
    reads, send = [], session.Poll.send
    monkeypatch.setattr(session.Poll, "send", lambda poll: reads.append(poll) or send(poll))
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=6, mode=mode))
    assert torch.equal(generator.generate(**inputs, **options), expected)
    assert len(reads) == len(launches)
    run = generator.statistics
    assert launches and set(launches) <= set(range(1, longest + 1))
    assert run.forwards == 3 + sum(launches)  # the prompt's, two steps that compile, the launches
    assert max(row.iterations for row in run.rows) > run.forwards - 3 * longest  # at most the last two were in vain
    assert sum(run.steps.values()) == run.forwards


def test_the_device_of_the_model_is_current(launches, monkeypatch):
    """Streams, events and graphs are those of the current device."""
    inside, seen = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        inside.append(tensor.device)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    plain = session.make_step
    monkeypatch.setattr(session, "make_step", lambda *args: seen.append(tuple(inside)) or plain(*args))
    JacobiGenerator(MODEL, JacobiConfig(block_size=5)).generate(**make_prompts(1), do_sample=False, max_new_tokens=20)
    assert seen == [(torch.device("cpu"),)] and not inside


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
        (dict(cuda_graph=False, draft="lookup"), {}),
        (dict(draft="auto"), {}),
        (dict(adaptive=True, draft="lookup"), {}),
        (dict(candidates=2), {}),
        (dict(draft="lookup"), dict(max_time=60.0)),
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


@pytest.mark.parametrize("config", [dict(draft="lookup"), dict(record_trajectory=True)], ids=str)
@pytest.mark.parametrize("rows", [1, 4])
def test_where_the_host_comes_between_an_iteration_is_a_graph(rows, config, launches):
    """Whose iterations are the same as without it; kept for the next prompt."""
    options = dict(do_sample=False, max_new_tokens=40, eos_token_id=[EOS, *range(3, 6)], return_dict_in_generate=True)
    graphs, alone = (JacobiGenerator(MODEL, JacobiConfig(6, cuda_graph=graph, **config)) for graph in (None, False))
    for seed in range(2):
        inputs = make_prompts(rows, seed=seed)
        commits = ([], []) if rows == 1 else (None, None)
        got, want = (
            generator.generate(**inputs, **options, **({} if kept is None else {"on_commit": kept.append}))
            for generator, kept in zip((graphs, alone), commits, strict=True)
        )
        assert torch.equal(got.sequences, want.sequences) and got.trajectory == want.trajectory
        assert commits[0] == commits[1]
        assert [row.iterations for row in got.statistics.rows] == [row.iterations for row in want.statistics.rows]
        # the prompt's forward and, the first time, the two that run before the capture
        assert len(launches) == got.statistics.forwards - (3 if seed == 0 else 1)
        assert set(launches) == {1} and launches.captures == 1
        launches.clear()


@pytest.mark.parametrize("config", [{}, dict(draft="lookup")], ids=str)
def test_waiting_rows_take_places_between_graphs(config, launches):
    """Graphs of one iteration each, kept for the next prompts."""
    options = dict(do_sample=False, max_new_tokens=40, eos_token_id=[EOS, *range(3, 6)])
    generator = JacobiGenerator(MODEL, JacobiConfig(6, max_batch_size=3, **config))
    for seed in range(2):
        inputs = make_prompts(8, seed=seed)
        assert torch.equal(generator.generate(**inputs, **options), MODEL.generate(**inputs, **options))
        run = generator.statistics
        assert run.prefill_forwards > 2
        assert len(launches) == run.forwards - run.prefill_forwards - (2 if seed == 0 else 0)
        assert set(launches) == {1} and launches.captures == 1
        launches.clear()
    generator.generate(**inputs, **options, max_batch_size=4)
    assert launches.captures == 2  # other shapes


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


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {"record_trajectory": True}), ({"draft": "last"}, {"draft": "lookup"}), ({}, {"optimize": False})],
    ids=str,
)
def test_what_a_graph_was_made_for_decides_who_gets_it(first, second, launches):
    options = dict(do_sample=False, max_new_tokens=100, return_dict_in_generate=True)
    inputs = make_prompts(2)
    generator = JacobiGenerator(MODEL, JacobiConfig(6, **first))
    generator.generate(**inputs, **options)
    assert max(launches) > 1 and launches.captures == 1
    got = generator.generate(**inputs, **options, **second)
    assert launches.captures == 2
    want = JacobiGenerator(MODEL, JacobiConfig(6, cuda_graph=False, **first | second)).generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences) and got.trajectory == want.trajectory
    if second != {"optimize": False}:
        assert got.statistics.steps == want.statistics.steps


def test_finished_rows_see_nothing(launches, monkeypatch):
    """So that attention leaves them at once; the others are what they are alone."""
    inputs, sessions = make_prompts(3), []
    alone = [MODEL.generate(**{k: v[row : row + 1] for k, v in inputs.items()}, do_sample=False, max_new_tokens=40)
             for row in range(3)]  # fmt: skip
    stop = alone[0][0, 15].item()  # ends the first row early
    run = session.run_chunks
    monkeypatch.setattr(loop, "run_chunks", lambda kept, *rest: sessions.append(kept) or run(kept, *rest))
    options = dict(do_sample=False, max_new_tokens=40, eos_token_id=stop, pad_token_id=0)
    generator = JacobiGenerator(MODEL, JacobiConfig(block_size=5))
    got = generator.generate(**inputs, **options)
    assert torch.equal(got, MODEL.generate(**inputs, **options))
    (kept,) = sessions
    counts = [row.tokens for row in generator.statistics.rows]
    assert min(counts) < max(counts)
    ended = torch.tensor(counts) < max(counts)
    assert (kept.bounds[1][ended] == session._BEHIND).all()
    again = generator.generate(**inputs, **options)  # by the same session
    assert torch.equal(again, got) and sessions[1] is kept


def test_a_compiled_forward_is_compiled_and_captured_once(launches):
    """Other prompts, counts of tokens and seeds use what is there; another batch has other shapes."""
    frames, model = Frames(), make_model(seed=5)
    torch.compiler.reset()
    generator = JacobiGenerator(torch.compile(model, backend=frames), JacobiConfig(block_size=6))

    def check(rows, width, tokens):
        inputs = make_prompts(rows, width, seed=width)
        options = dict(do_sample=False, max_new_tokens=tokens)
        assert torch.equal(generator.generate(**inputs, **options), model.generate(**inputs, **options))
        assert frames.runs == runs + generator.statistics.forwards - 1  # all but the prompt's
        return frames.runs

    runs = 0
    for width, tokens in ((8, 40), (9, 60), (12, 45), (8, 41)):
        runs = check(1, width, tokens)
        assert launches.captures == frames.graphs == 1
    runs = check(2, 8, 40)
    assert launches.captures == 2
    graphs = frames.graphs
    for rows in (1, 2):
        runs = check(rows, 9, 50)
    assert launches.captures == 2 and frames.graphs == graphs


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_forward_with_graphs_of_its_own_is_not_captured(mode, launches):
    model, inputs = make_model(seed=5), make_prompts(2)
    options = dict(do_sample=False, max_new_tokens=20)
    expected = model.generate(**inputs, **options)
    generator = JacobiGenerator(torch.compile(model, mode=mode), JacobiConfig(block_size=6))
    with torch.compiler.set_stance("force_eager"), pytest.warns(RuntimeWarning, match="graphs of its own.*no-cudagraphs"):
        assert torch.equal(generator.generate(**inputs, **options), expected)
    assert not launches and not launches.captures


def test_which_forwards_have_graphs_of_their_own():
    model = make_model()
    own = generate._has_graphs_of_its_own
    for mode in ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"):
        assert own(model, torch.compile(model, mode=mode)) is (mode in ("reduce-overhead", "max-autotune"))
    assert not own(model, None) and not own(model, torch.compile(model, backend=Frames()))
    model.model.layers[0].compile(mode="reduce-overhead")
    assert own(model, None)


class Graph:
    """A stand-in for torch's graph that writes down what is captured, and where."""

    log: list

    def pool(self):
        return (0, 1)

    def replay(self):
        self.log.append("replay")


class ConditionalGraph(Graph):
    def begin_capture_to_if_node(self, condition):
        self.log.append(("if", condition))

    def end_capture_to_conditional_node(self):
        self.log.append("end")


@pytest.fixture
def graphs(monkeypatch):
    """Stands in for what torch has for graphs; call it with a class of graphs."""
    kept = (session._has_conditions, session._pool)

    def forget():
        for function in kept:
            function.cache_clear()

    forget()
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None, stream=None: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(session, "_graph_stream", lambda device: None)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool"):
        monkeypatch.setattr(torch._C, name, lambda *args: None, raising=False)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)

    def use(kind):
        kind.log = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", kind)
        return kind.log

    yield use
    forget()


@pytest.mark.parametrize("conditions", [True, False])
def test_steps_behind_the_first_are_conditional(conditions, graphs, monkeypatch):
    log = graphs(ConditionalGraph)
    monkeypatch.setattr(session, "_has_conditions", lambda device: conditions)
    replay = session.capture(lambda: log.append("step"), 3, torch.tensor(2))
    one = [("if", torch.tensor(True)), "step", "end"] if conditions else ["step"]
    assert log == ["step", *one, *one]
    replay()
    assert log[-1] == "replay"


def test_graphs_share_memory_that_outlives_them(graphs, monkeypatch):
    """torch refuses the pool of graphs that are all gone."""
    graphs(Graph)
    live, pools = weakref.WeakSet(), []

    def capture(graph, pool=None, stream=None):
        assert pool is None or any(other.pool() == pool for other in live)
        live.add(graph)
        pools.append(pool)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", capture)
    for _ in range(3):
        session.capture(lambda: None, 2, torch.tensor(2))
        gc.collect()
    assert pools == [None, (0, 1), (0, 1), (0, 1)] and len(live) == 1


def test_a_capture_that_fails_leaves_nothing_behind(graphs, monkeypatch):
    """The caller's stream is current again, and others are captured. In torch 2.11 the end of such a capture raises before
    it lets go of the stream and the pool."""
    graphs(Graph)
    current, under_way = ["caller's"], []

    @contextlib.contextmanager
    def capture(graph, pool=None, stream=None):
        pool = pool or graph.pool()
        assert not under_way
        under_way.append(pool)
        current[:] = ["graph's"]
        yield
        under_way.remove(pool)
        current[:] = ["caller's"]

    def let_go(device, pool):
        if pool not in under_way:
            raise RuntimeError("not currently recording")
        under_way.remove(pool)

    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", let_go, raising=False)
    steps, running = [], torch.tensor(2)

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="not permitted"):
            session.capture(fails, 2, running)
        assert current == ["caller's"] and not under_way
        session.capture(lambda: steps.append(current[0]), 2, running)
    assert steps == ["graph's"] * 4


def test_calls_beside_each_other_are_branches_of_a_graph_alone(monkeypatch):
    """Each begins behind what stood before them all, and what follows waits for all; elsewhere they run in order."""
    log = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} behind {other.name}")

    @contextlib.contextmanager
    def stream(chosen):
        log.append(f"on {chosen.name}")
        yield
        log.append("back")

    current, graph = Stream("main"), Stream("graph")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(session, "_streams", lambda device, thread: (graph, Stream("a"), Stream("b")))
    calls = [lambda n=n: log.append(n) or n for n in range(3)]
    assert session.beside(calls, torch.device("cpu")) == session.beside(calls, torch.device("cuda", 0)) == [0, 1, 2]
    assert log == [0, 1, 2, 0, 1, 2]
    log.clear()
    current = graph
    assert session.beside(calls, torch.device("cuda", 0)) == [0, 1, 2]
    assert log == [
        "a behind graph", "on a", 1, "back", "b behind graph", "on b", 2, "back", 0, "graph behind a", "graph behind b"
    ]  # fmt: skip
    log.clear()
    assert session.beside(calls[:2], torch.device("cuda", 0)) == [0, 1]
    assert log == ["a behind graph", "on a", 1, "back", 0, "graph behind a"]


def test_conditional_nodes_are_tried(graphs):
    """torch may have the call and the driver not; and a node that runs whatever its condition is no use."""
    cpu = torch.device("cpu")
    graphs(Graph)
    assert not session._has_conditions(cpu)

    class Refuses(ConditionalGraph):
        def begin_capture_to_if_node(self, condition):
            raise RuntimeError("needs CUDA 12.4")

        def end_capture_to_conditional_node(self):
            raise RuntimeError("not begun")

    session._has_conditions.cache_clear()
    graphs(Refuses)
    assert not session._has_conditions(cpu)
    session._has_conditions.cache_clear()
    graphs(ConditionalGraph)  # at the capture the counter becomes 1, and replays leave it
    assert session._has_conditions(cpu)


def test_a_session_begins_anew():
    prompt = torch.tensor([[5, 6], [7, 8], [9, 3]])

    def make(limits):
        return JacobiState.create(prompt, limits=limits, block_size=4, capacity=9)

    bounds = torch.zeros(2, 3, dtype=torch.int32)
    cache = JacobiCache(bounds[0], 20)
    kept = session.Session(lambda *args: None, dataclasses.replace(make(9), lengths=bounds[0]), bounds, cache=cache)
    kept.state.done.copy_(torch.tensor([1, 0, 2]))
    kept.state.produced.copy_(torch.tensor([9, 4, 6]))
    kept.drop_finished()
    assert kept.state.rows == 1 and kept.order == [1, 0, 2] and kept.whole.produced.tolist() == [4, 9, 6]
    fresh = make([3, 4, 5])
    kept.restart(fresh, torch.tensor([0, 1, 0], dtype=torch.int32))
    assert kept.order == [0, 1, 2] and bounds[1].tolist() == [0, 1, 0]
    for mine, new in zip(kept.state.tensors(), fresh.tensors(), strict=True):
        assert torch.equal(mine, new)
