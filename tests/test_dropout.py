"""The seeded dropout: Philox4x32-10 gives its published numbers, and masks have the right rate."""

from __future__ import annotations

import pytest
import torch

from pylora.calls import Dropout
from pylora.reference.dropout import dropout, dropout_mask, philox


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        # Key 0 and counter 0, from the known-answer tests of Random123 (philox4x32,
        # 10 rounds).
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ],
)
def test_philox_gives_the_published_words(
    seed: int, counter: int, expected: tuple[int, ...]
) -> None:
    words = philox(torch.tensor(seed), torch.tensor([counter]))
    assert tuple(words[0].tolist()) == expected


def test_philox_words_equal_those_of_triton() -> None:
    """Triton's philox is written here in Python, for a 64-bit seed and counters beyond 2^32."""
    import numpy as np

    def rounds(c: list[int], k: list[int]) -> list[int]:
        for _ in range(10):
            p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        return c

    seed, counters = 2**62 - 12345, np.array([0, 1, 2**32 + 7, 2**40], dtype=np.int64)
    words = philox(torch.tensor(seed), torch.from_numpy(counters))
    for row, counter in zip(words.tolist(), counters.tolist(), strict=True):
        assert row == rounds([counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, seed >> 32])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_have_the_rate_and_are_uncorrelated(p: float) -> None:
    mask = dropout_mask(torch.Size((1000, 1001)), p, torch.tensor(42))
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - p) < 5 * deviation
    # Neighbours along a row and along a column are uncorrelated.
    centred = mask.double() - mask.double().mean()
    for pair in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(pair.mean().item()) < 5 * p * (1 - p) / mask.numel() ** 0.5


def test_kept_elements_are_scaled() -> None:
    x = torch.ones(64, 64)
    y = dropout(x, Dropout(0.25, torch.tensor(1)))
    assert torch.equal(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert dropout(x, None) is x
