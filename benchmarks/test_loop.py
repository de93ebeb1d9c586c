"""What an iteration of the decoding loop costs beside the model's forward, and where that goes.

The forward is a lookup in logits made before, so all that is timed is ours: positions, convergence check, drafts, the
host's read of the status. With candidates, every iteration looks at two windows: what was committed repeats itself, so the
lookup always finds one. `argmax alone` is torch's argmax over the same logits, the least that greedy decoding does.
"""

import statistics
import time

import pytest
import torch

from cllm_kernels.decoding import JacobiCache, JacobiConfig, Processing, Session, decode
from cllm_kernels.decoding.branches import Branches
from cllm_kernels.decoding.drafts import LookupDrafts
from cllm_kernels.ops import JacobiState, converge_

STEPS = 300
CONFIGS = {
    "context": JacobiConfig(),
    "last": JacobiConfig(draft="last"),
    "lookup": JacobiConfig(draft="lookup"),
    "auto": JacobiConfig(draft="auto"),
    "none": JacobiConfig(draft="none"),
    "candidates": JacobiConfig(candidates=2),
}


def _median(function):
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@pytest.mark.parametrize("vocabulary", [2048, 32000])
@pytest.mark.parametrize("draft", CONFIGS)
@torch.inference_mode()
def test_iteration(draft, vocabulary, benchmark):
    if torch.cuda.is_available():
        pytest.skip("the loop of CUDA devices runs in graphs; the host's time is hidden there")
    config = CONFIGS[draft]
    prompt = torch.randint(0, vocabulary, (1, 64))
    logits = torch.randn(8, 1, config.candidates * config.width, vocabulary)
    turn = 0

    def forward(tokens, positions, keep, branch=0):
        nonlocal turn
        turn += 1
        return logits[turn % 8, :, :keep]

    def make():
        bounds = torch.zeros(2, 1, dtype=torch.int32)
        state = JacobiState.create(prompt, limits=STEPS, block_size=config.width, refill=config.refill)
        state.lengths.set_(bounds[0])
        return Session(forward, state, bounds, cache=JacobiCache(bounds[0], 1))

    def run(session):
        return decode(session, prompt, config, "cpp", Processing([], prompt, False))

    forwards = run(make()).statistics.forwards
    benchmark.pedantic(run, setup=lambda: ((make(),), {}), rounds=15)
    session = make()
    state, kept = session.state, session.state.clone()

    def restore():
        state.copy_(kept)

    window = logits[0, :, : config.width]
    parts = {
        "positions": _median(lambda: session.window_positions(config.width)),
        "converge_": _median(lambda: (restore(), converge_(window, state, backend="cpp"))) - _median(restore),
        "status to the host": _median(lambda: state.status.tolist()),
        "argmax alone": _median(lambda: window.argmax(-1)),
    }
    if config.looks_up:
        drafts = LookupDrafts(prompt.repeat(1, 2), [0])
        parts["looking up"] = _median(lambda: drafts.candidates(state, 2))
    if config.candidates > 1:
        branches = Branches(session, config, Processing([], prompt, False), "cpp")
        windows = state.window[:, None].repeat(1, 2, 1)
        parts["choosing"] = _median(lambda: branches.choose_(windows, state))
    benchmark.extra_info.update(
        microseconds_per_iteration=1e6 * benchmark.stats.stats.median / forwards,
        parts_us={name: 1e6 * seconds for name, seconds in parts.items()},
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    print(f"\n{draft}, V {vocabulary}: {1e6 * benchmark.stats.stats.median / forwards:.0f} us an iteration;",
          ", ".join(f"{name} {1e6 * seconds:.0f}" for name, seconds in parts.items()))  # fmt: skip
