"""The one definition of the fields of `JacobiState`, shared by Python and C++.

Pure Python without imports: `setup.py` runs this file, without torch, to generate the C++ struct.

Sizes in the shapes: B rows, n window width, T output capacity, C context width, E number of EOS tokens.
"""

# (name, dtype, shape, what it holds)
FIELDS = (
    ("window", "int64", "B n", "window[0] is the last committed token, window[1:] are drafts"),
    ("kept", "int32", "B n", "1 where a draft kept its value although a draft before it was wrong"),
    ("since", "int32", "B n", "the forward that first predicted this draft, which has stood since; refilled ones: the next"),
    ("output", "int64", "B T", "committed new tokens; columns from `produced` on are undefined"),
    ("produced", "int32", "B", "how many new tokens are committed"),
    ("lengths", "int32", "B", "valid cache rows; the last committed token is not among them"),
    ("limits", "int32", "B", "most new tokens of the row, 0 <= limit <= T"),
    ("block_left", "int32", "B", "mode block: tokens of the block still to commit, 1..n; else n"),
    ("done", "int32", "B", "0 running, 1 stopped by EOS, 2 by its limit, 3 by the caller"),
    ("iterations", "int32", "B", "forwards spent while the row was running"),
    ("accept_histogram", "int32", "B n+1", "iterations by accept length, after all clamps"),
    ("stationary", "int32", "B", "accepted drafts that stood right behind a wrong one"),
    ("front", "int32", "B", "the forward whose correct prefix reached the last committed token, 0 before the first"),
    ("paper_iterations", "int32", "B", "forwards in which the correct prefix of the predictions grew"),
    ("paper_stationary", "int32", "B", "committed tokens predicted right before the correct prefix reached them"),
    ("seeds", "int64", "B", "Philox key of the row's random drafts"),
    ("context", "int64", "B C", "tokens that random drafts are drawn from, left padded"),
    ("context_start", "int32", "B", "first valid column of `context`, 0 <= context_start < C"),
    ("eos", "int64", "E", "tokens that end a row; E may be 0"),
    ("status", "int32", "2", "rows still running after the last call, rows with NaN logits in it"),
)

# Fields that `converge_` reads and never writes.
READ_ONLY = ("limits", "seeds", "context", "context_start", "eos")
