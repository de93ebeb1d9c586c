"""Philox4x32-10 in PyTorch: counter-based random numbers, the same on every device and in C++.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch

MASK = 0xFFFFFFFF
# Constants of the paper (and of Random123): two multipliers and two key increments.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# Third counter word of each use of a key: the draws that refill a window ("JC"), the noise of sampling ("JG").
REFILL_STREAM = 0x4A43
NOISE_STREAM = 0x4A47


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low word of a 32 by 32 bit product; b is split so that int64 does not overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & MASK


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit words for each counter.

    Arguments and results are int64 tensors that hold unsigned 32-bit words; they broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + INCREMENTS[0]) & MASK
        k1 = (k1 + INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def refill_draws(seeds: torch.Tensor, tokens: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The random word of each draft, an unsigned 32-bit value in int64.

    seeds int64 [B]; tokens int64 [B, n], the absolute index among the new tokens; draws int64 [B], which
    draw of the same position this is. Returns int64 [B, n].
    """
    zero = torch.zeros_like(tokens)
    counter = (tokens & MASK, zero, zero + REFILL_STREAM, zero + (draws & MASK)[:, None])
    key = ((seeds & MASK)[:, None], ((seeds >> 32) & MASK)[:, None])
    return philox4x32(counter, key)[0]


def noise_words(seeds: torch.Tensor, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The random word of every token of the vocabulary at every position, an unsigned 32-bit value in int64.

    seeds int64 [B]; tokens int64 [B, n], the absolute index among the new tokens. Returns int64 [B, n, V]. A counter
    serves tokens that stand 16 apart, so that 16 neighbours take the same word of 16 counters, which suits vectors.
    """
    entry = torch.arange(vocabulary, device=tokens.device)
    groups = torch.arange(-(-vocabulary // 64) * 16, device=tokens.device).expand(*tokens.shape, -1)
    zero = torch.zeros_like(groups)
    counter = (groups, zero, zero + NOISE_STREAM, zero + (tokens & MASK)[:, :, None])
    key = ((seeds & MASK)[:, None, None], ((seeds >> 32) & MASK)[:, None, None])
    words = torch.stack(philox4x32(counter, key), -1)  # [B, n, groups, 4]
    return words.flatten(2)[:, :, ((entry // 64) * 16 + entry % 16) * 4 + entry // 16 % 4]


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32, from unsigned 32-bit words: -log(E) of the exponential variable E.

    With u = (word + 1/2) / 2^32, E = -log(1 - u), by its series where u is so small that 1 - u would lose it.
    """
    u = (words.float() + 0.5) * 2.0**-32
    exponential = torch.where(u < 2.0**-10, u * (1 + u * (0.5 + u * (1 / 3))), -(1 - u).clamp(min=2.0**-25).log())
    return -exponential.log()
