"""The executor of host_cuda/ notices a bug of each kind, so the tests that use it can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from host_cuda import DRIVER, SEEDS, start


@pytest.fixture(scope="module")
def mutants(compiled) -> Path:
    return compiled("mutants")


WRONG = "the result is wrong"
OUTSIDE = "heap-buffer-overflow"
BUGS = {
    "missing __syncthreads": WRONG,
    "missing __syncthreads before the next write": WRONG,
    "missing __syncwarp": WRONG,
    "missing cp.async wait": WRONG,
    "cp.async waits for a group too few": WRONG,
    "missing barrier after the cp.async wait": WRONG,
    "step outside shared memory": OUTSIDE,
    "step outside global memory": OUTSIDE,
    "lanes in different shuffles": "threads of one group are in different operations",
    "missing wait for the kernel before": WRONG,
    "wrong map of A": WRONG,
    "wrong map of B": WRONG,
    "B not transposed": WRONG,
}


@pytest.mark.parametrize("bug", ["none", *BUGS])
def test_the_executor_notices_every_bug(mutants: Path, bug: str):
    for seed in SEEDS:
        ran = start(mutants, bug, seed=seed)
        stderr = ran.stderr.decode()
        assert (ran.returncode == 0) == (bug == "none"), f"seed {seed}: {stderr}"
        assert BUGS.get(bug, "") in stderr


@pytest.fixture(scope="module")
def mutants_hopper(compiled) -> Path:
    return compiled("mutants_hopper", "hopper/tensor_map", twins=DRIVER)


DEADLOCK = "deadlock: threads wait for others that do not come"
HOPPER_BUGS = {
    "missing wait for a copy": "host_cuda: ",
    "missing wait before a stage is filled again": DEADLOCK,
    "stage left before its products are done": "",  # a wrong result or a deadlock
    "sums read before they are waited for": WRONG,
    "fragments overwritten under way": WRONG,
    "missing fence before a product": "wgmma without a fence",
    "barrier expects too few bytes": DEADLOCK,
    "barrier without init": "an mbarrier is used before its init",
    "warps arrive that no barrier expects": "",
    "wrong swizzle": WRONG,
    "wrong columns of B": WRONG,
    "wrong rows of A": WRONG,
    "stored without transposing": WRONG,
    "missing named barrier": WRONG,
}


@pytest.mark.parametrize("bug", ["none", *HOPPER_BUGS])
def test_the_executor_notices_every_bug_on_hopper(mutants_hopper: Path, bug: str):
    for seed in SEEDS:
        ran = start(mutants_hopper, bug, seed=seed)
        stderr = ran.stderr.decode()
        assert ran.returncode != 2
        assert (ran.returncode == 0) == (bug == "none"), f"seed {seed}: {stderr}"
        assert HOPPER_BUGS.get(bug, "") in stderr


@pytest.fixture(scope="module")
def mutants_proxy(compiled) -> Path:
    return compiled("mutants_proxy", "hopper/tensor_map", twins=DRIVER)


NO_FENCE = "has written without a fence.proxy.async after it"
PROXY_BUGS = {
    "no fence": f"wgmma reads byte 0 of shared memory, which thread 0 {NO_FENCE}",
    "fence of one thread": NO_FENCE,
    "fence of all threads but one": f"thread 77 {NO_FENCE}",
    "fence before the stores": NO_FENCE,
    "fence behind the barrier": NO_FENCE,
    "a store behind the fence": f"thread 5 {NO_FENCE}",
    "plain stores": "a plain store has written: only store_shared() says whose",
    "no fence after stmatrix": NO_FENCE,
    "no fence after cp.async": NO_FENCE,
    "no fence before a copy to the same place": "a copy writes over byte 0 of shared memory",
}


@pytest.mark.parametrize("bug", ["none", *PROXY_BUGS])
def test_the_executor_notices_every_missing_proxy_fence(mutants_proxy: Path, bug: str):
    for seed in SEEDS:
        ran = start(mutants_proxy, bug, seed=seed)
        stderr = ran.stderr.decode()
        assert ran.returncode != 2
        assert (ran.returncode == 0) == (bug == "none"), f"seed {seed}: {stderr}"
        assert PROXY_BUGS.get(bug, "") in stderr
