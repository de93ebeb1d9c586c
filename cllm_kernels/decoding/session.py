"""The buffers of a decode, and its iteration as a step that reads nothing on the host and can be replayed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from .. import backends
from ..ops import JacobiState, converge_
from ..ops.state_fields import FIELDS
from .cache import JacobiCache
from .config import JacobiConfig
from .processing import Processing

Forward = Callable[..., torch.Tensor]
"""``forward(input_ids [B, m], position_ids [B, m], keep, branch=0) -> logits of the last positions [B, keep, V]``;
branch: of ``block_attention``."""

# Iterations that one graph holds at most, and how many graphs a decode should take at least: of the last one, on
# average half is in vain, and one more that was launched before its status was read.
_LONGEST_CHUNK = 16
_CHUNKS = 12
# A first visible row behind every cache; lengths can be subtracted from it.
_BEHIND = 1 << 30


@dataclasses.dataclass
class Session:
    """What the iterations of a decode work on. Nothing in it moves, so that a graph can hold its addresses.

    Attributes:
        forward: the model. It writes its keys and values at the cache rows behind ``bounds[0]``. It takes the first
            rows alone too.
        state: made by ``JacobiState.create``.
        bounds: int32 ``[2, B]``: valid cache rows (the storage of ``state.lengths``) and padding tokens before each
            row's prompt.
        max_position: highest position id that the model can take; drafts behind it never get committed, so their
            positions are clamped. None for no limit.
        cache: of the forward; without it finished rows stay in the batch.
        most: how many rows are decoded at once, and the cache holds; the others wait. None: all.
        chunk, replay: iterations of the captured graph and what launches it; 0 and None before there is one.
        capturable: False once the forward could not be captured.
    """

    forward: Forward
    state: JacobiState
    bounds: torch.Tensor
    max_position: int | None = None
    cache: JacobiCache | None = None
    most: int | None = None
    chunk: int = 0
    replay: Callable[[], None] | None = None
    capturable: bool = True

    def __post_init__(self):
        self.columns: dict[tuple[int, int], torch.Tensor] = {}
        # the state of all rows, and which row of the batch each of its rows is
        self.whole = self.state
        self.most = self.whole.rows if self.most is None else self.most
        self.order = list(range(self.whole.rows))
        self._take_first(self.most)
        self.limit = torch.iinfo(torch.int64).max if self.max_position is None else self.max_position

    def window_positions(self, width: int, count: int = 1) -> torch.Tensor:
        """int64 ``[B, count * width]``: the position ids of the window, ``count`` times."""
        columns = self.columns.get((width, count))
        if columns is None:
            columns = self.columns[width, count] = torch.arange(width, device=self.bounds.device).repeat(count)
        return torch.add(columns, (self.state.lengths - self.starts)[:, None]).clamp_(0, self.limit)

    def drop_finished(self, others: Sequence[torch.Tensor] = ()) -> JacobiState:
        """Goes on with the running rows alone, moved to the front; returns their state, which shares memory with `whole`.

        others: tensors with a row for each of the batch, besides those of `whole`, whose rows move alike.
        """
        done = self.state.done.tolist()
        count = done.count(0)
        holes = [row for row in range(count) if done[row]]
        movers = [row for row in range(count, len(done)) if not done[row]]
        self._move(movers, holes, others)
        self._take_first(count)
        return self.state

    def admit(self, others: Sequence[torch.Tensor] = ()) -> int:
        """Gives the places of finished rows to rows that wait; returns how many, which are the first ones then.

        others: as of :meth:`drop_finished`.
        """
        done, most = self.whole.done.tolist(), self.most
        waiting = [row for row in range(most, len(done)) if not done[row]][: most - done[:most].count(0)]
        count = len(waiting)
        movers = [row for row in range(count) if not done[row]]
        holes = [row for row in range(count, most) if done[row]][: len(movers)]
        self._move(movers, holes, others)
        self._exchange(list(range(count)), waiting, others)
        self._take_first(most)
        return count

    def _move(self, movers: list[int], holes: list[int], others: Sequence[torch.Tensor]) -> None:
        """Moves running rows, with what the cache has of them, to the places of finished ones."""
        for hole, mover in zip(holes, movers, strict=True):
            self.cache.move_row(mover, hole)
        self._exchange(holes, movers, others)

    def _exchange(self, first: list[int], second: list[int], others: Sequence[torch.Tensor]) -> None:
        """Rows change places, in all that is kept by rows but the cache."""
        if not first:
            return
        for one, two in zip(first, second, strict=True):
            self.order[one], self.order[two] = self.order[two], self.order[one]
        by_row = (getattr(self.whole, name) for name, _, shape, _ in FIELDS if shape.startswith("B"))
        tensors = (self.bounds[1], *by_row, *others)
        device = self.bounds.device
        if device.type == "cpu" and backends.resolve("auto", device) == "cpp":
            rows = [(tensor.data_ptr(), tensor.nbytes // tensor.shape[0]) for tensor in tensors]  # all contiguous
            backends.EXTENSION.exchange_rows(rows, first, second)
            return
        places, sources = torch.tensor([first + second, second + first], device=device)
        for tensor in tensors:
            tensor.index_copy_(0, places, tensor.index_select(0, sources))

    def _take_first(self, count: int) -> None:
        """Goes on with the first rows alone."""
        self.state = self.whole.first(count)
        self.starts = self.bounds[1, :count]

    def restart(self, state: JacobiState, starts: torch.Tensor) -> None:
        """Begins with another prompt of the same shapes."""
        self.order = list(range(self.whole.rows))
        self._take_first(self.most)
        self.whole.copy_(state)
        self.bounds[1].copy_(starts)


def may_capture(device: torch.device, config: JacobiConfig) -> bool:
    """Whether graphs are wanted on a device that has them."""
    return device.type == "cuda" and config.cuda_graph is not False


def runs_on_device(device: torch.device, config: JacobiConfig, processing: Processing) -> bool:
    """Whether iterations can be captured: one window of a fixed width, processors of scores alone."""
    return may_capture(device, config) and not config.adapts and config.candidates == 1 and processing.on_device


def waits_for_host(config: JacobiConfig) -> bool:
    """Whether the host has something to do between two iterations."""
    return config.record_trajectory or config.looks_up


def capture(step: Callable[[], None], count: int, running: torch.Tensor) -> Callable[[], None]:
    """Records ``count`` steps as one CUDA graph without running them; returns what launches it.

    Each step but the first is a conditional node where there are such: it is left out once ``running``, an integer on the
    device, is 0. Where a step cannot be captured it raises, mostly RuntimeError, and later graphs can be captured.
    """
    device, thread = running.device, threading.get_ident()
    conditions = _has_conditions(device)
    pool = _pool(device, thread).pool()
    graph = torch.cuda.CUDAGraph()
    try:
        with _recording(graph, device, pool):
            for turn in range(count):
                with _where(running > 0, graph) if turn and conditions else contextlib.nullcontext():
                    step()
    except BaseException:
        # The host's part of the pool stays taken, and random generators stay as in a capture until one succeeds.
        _pool.cache_clear()
        _pool(device, thread)
        raise
    return graph.replay


@contextlib.contextmanager
def _recording(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int] | None = None) -> Iterator[None]:
    """``torch.cuda.graph`` on the thread's graph stream, which goes back to the caller's stream and lets go of the pool
    where the capture fails too: torch 2.11 raises before it does either.

    cuBLAS gets new workspaces inside: of those it has, torch's own graph trees take the memory away.
    """
    before = torch.cuda.current_stream(device)
    with _recorder:
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=_graph_stream(device)):
                yield
        except BaseException:
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):  # let go already
                torch._C._cuda_endAllocateToPool(device.index, pool or graph.pool())
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()


_recorder = threading.Lock()  # torch captures one graph at a time


@functools.cache
def _pool(device: torch.device, thread: int) -> torch.cuda.CUDAGraph:
    """A graph that is never launched, whose memory the graphs of a thread share, since they never run at the same time.

    It is kept, because torch takes no graph into the memory of graphs that are all gone.
    """
    graph = torch.cuda.CUDAGraph()
    with _recording(graph, device):
        torch.zeros(1, device=device)
    return graph


@functools.cache
def _streams(device: torch.device, thread: int) -> tuple[torch.cuda.Stream, ...]:
    """The stream on which a thread's graphs are captured, and two for branches of these."""
    return tuple(torch.cuda.Stream(device) for _ in range(3))


def _graph_stream(device: torch.device) -> torch.cuda.Stream:
    return _streams(device, threading.get_ident())[0]


@contextlib.contextmanager
def on_graph_stream(device: torch.device) -> Iterator[None]:
    """Where steps run before their capture: what libraries set up for a stream must not be made while a graph is captured."""
    if device.type != "cuda":
        yield
        return
    stream, current = _graph_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def beside(calls: list[Callable[[], torch.Tensor]], device: torch.device) -> list[torch.Tensor]:
    """What up to three calls give that do not depend on each other, such as products of one input with several weights.

    In a graph they become branches, so that one begins while another still runs: on an H100 a step of 16 tokens of a 7B
    model took 0.92 of its time with the calls one after the other. What is launched by itself runs in sequence, since
    there the host is what it waits for.
    """
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None
    if current is None or current != _graph_stream(device):  # also where steps run before their capture
        return [call() for call in calls]
    first, *others = calls
    streams = _streams(device, threading.get_ident())[1 : 1 + len(others)]
    results = []
    for stream, call in zip(streams, others, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(call())
    results.insert(0, first())
    for stream in streams:
        current.wait_stream(stream)
    return results


@functools.cache
def _has_conditions(device: torch.device) -> bool:
    """Whether graphs can have conditional nodes: torch 2.12 and CUDA 12.4 brought them. A small graph is tried."""
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        return False
    count, graph = torch.zeros((), dtype=torch.int32, device=device), torch.cuda.CUDAGraph()
    try:
        with _recording(graph, device), _where(count < 1, graph):
            count.add_(1)
        for _ in range(2):
            graph.replay()
    except RuntimeError:
        return False
    return int(count) == 1


@contextlib.contextmanager
def _where(condition: torch.Tensor, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    graph.begin_capture_to_if_node(condition)
    try:
        yield
    finally:
        graph.end_capture_to_conditional_node()


class Poll:
    """The status and, if asked for, what row 0 has committed, on their way to the host while the device goes on."""

    def __init__(self, state: JacobiState, tokens: bool):
        self.sources = [state.status] + ([state.produced, state.output[:1]] if tokens else [])
        on_gpu = state.status.is_cuda
        self.copies = [torch.empty_like(source, device="cpu", pin_memory=on_gpu) for source in self.sources]
        self.event = torch.cuda.Event() if on_gpu else None

    def send(self) -> None:
        for copy, source in zip(self.copies, self.sources, strict=True):
            copy.copy_(source, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def wait(self) -> list[torch.Tensor]:
        if self.event is not None:
            self.event.synchronize()
        return self.copies


def converge(
    scores: torch.Tensor,
    state: JacobiState,
    config: JacobiConfig,
    processing: Processing,
    backend: str,
    order: list[int] | None = None,
    branches: int = 1,
) -> None:
    """``converge_`` as the configuration has it, on scores that have been processed.

    order: which row of the batch each row of the decode's state is, which errors name; None where all are in their place.
    branches: rows of ``state`` for each of these.
    """
    try:
        converge_(scores, state, config.mode, config.refill, processing.temperature, backend)
    except ValueError:
        if order is None or not state.status[1]:
            raise
        broken = scores.isnan().any(-1) & (state.done == 0)[:, None]
        row, position = broken.nonzero()[0].tolist()
        row = order[row // branches]
        raise ValueError(f"logits of row {row} at window position {position} hold NaN; they must not") from None


def make_step(session: Session, config: JacobiConfig, processing: Processing, backend: str) -> Callable[[], None]:
    """An iteration: forward over the window, then ``converge_``. It reads nothing on the host."""
    state = session.state
    width = state.width

    def step() -> None:
        if state.rows > 1:
            # Finished rows see no key, and attention leaves them at once.
            session.starts.masked_fill_(state.done != 0, _BEHIND)
        logits = session.forward(state.window, session.window_positions(width), width)
        converge(processing(logits, state), state, config, processing, backend)

    return step


def _try_capture(session: Session, step: Callable[[], None], count: int) -> None:
    """Captures so many steps for the session, or warns where the forward cannot be captured."""
    try:
        session.replay, session.chunk = capture(step, count, session.state.status[0]), count
    except RuntimeError as error:
        session.capturable = False
        warnings.warn(
            f"the model's forward cannot be captured as a CUDA graph, so each iteration is launched by itself: {error}",
            RuntimeWarning,
            stacklevel=3,
        )


def single_steps(
    session: Session, config: JacobiConfig, processing: Processing, backend: str
) -> Callable[[], None]:
    """An iteration between which the host does what it has to, a graph from the third one on."""
    step = make_step(session, config, processing, backend)
    alone = 0

    def run() -> None:
        nonlocal alone
        if session.replay is None and session.capturable and alone == 2:
            _try_capture(session, step, 1)
        if session.replay is not None:
            return session.replay()
        with on_graph_stream(session.state.device) if session.capturable else contextlib.nullcontext():
            step()
        alone += 1

    return run


def run_chunks(
    session: Session,
    config: JacobiConfig,
    processing: Processing,
    backend: str,
    on_tokens: Callable[[int, torch.Tensor], None] | None = None,
) -> int:
    """Iterates in graphs of several iterations until every row is done; returns how many were run.

    Where the forward cannot be captured it warns, and leaves the rest to the caller.

    The host reads the status of a graph when the next one is on its way already, so the device never waits for it.
    What is run after the end changes nothing.

    Args:
        on_tokens: called with the number of tokens and the output of row 0 after every graph.

    Raises:
        ValueError: NaN logits.
    """
    state = session.state
    step = make_step(session, config, processing, backend)
    done = 0
    if session.replay is None:
        # Kernels are compiled and libraries set up by steps that run, and these tell how many tokens a step gives.
        with on_graph_stream(state.device):
            for _ in range(2):
                step()
        done = 2
        check_status(int(state.status[1]))
        rate = float(state.produced.sum() / state.iterations.sum().clamp(min=1))
        expected = float((state.limits - state.produced).max()) / max(rate, 1.0)
        _try_capture(session, step, max(1, min(_LONGEST_CHUNK, int(expected / _CHUNKS))))
        if session.replay is None:
            return done

    polls = [Poll(state, on_tokens is not None) for _ in range(2)]
    last = None
    for turn in itertools.count():
        session.replay()
        done += session.chunk
        poll = polls[turn % 2]
        poll.send()
        if last is not None:
            status, *tokens = last.wait()
            if on_tokens is not None:
                on_tokens(int(tokens[0][0]), tokens[1][0])
            running, broken = status.tolist()
            check_status(broken)
            if not running:
                break
        last = poll
    return done


def check_status(broken: int) -> None:
    """Raises ValueError if rows have NaN logits; nothing moves any more then."""
    if broken:
        raise ValueError(f"logits of {broken} rows hold NaN; they must not")
