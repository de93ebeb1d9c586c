"""Runs Python that a model wrote, in a process of its own with limits."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile

SECONDS = 10.0
MEMORY = 1 << 30
_FILE = 1 << 20


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 1, int(SECONDS) + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE, _FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether ``program`` runs to its end within ``seconds`` and a GiB of memory.

    It runs in an empty folder that is removed, without the environment, and with everything that it starts killed.
    It is no jail: the network, and files that the user can write, stay within reach. Run models that you do not trust
    in a container.
    """
    # The word shows that the program came to its end and did not just exit.
    done = f"end-{os.urandom(8).hex()}"
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{program}\nprint({done!r}, flush=True)\n"], cwd=folder, env={}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=_limit, errors="replace",
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
    return process.returncode == 0 and output.rstrip().endswith(done)
