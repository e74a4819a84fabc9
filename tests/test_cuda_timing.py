"""The timers for CUDA on a simulated device: what they measure, and what they notice.

The stand-in has one clock for host and device. The host's work advances it, and kernels queue up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import cuda_timing, harness
from benchmarks.contender import BuiltLayer, Contender
from benchmarks.cuda_timing import BusyQueue, CacheReader, EagerTimer, GraphTimer
from benchmarks.harness import Harness
from benchmarks.registry import bench_of
from benchmarks.report import tables
from benchmarks.shapes import FORWARD, Cell
from benchmarks.timing import Call

CYCLE = 1e-9  # seconds
US = 1e-6


class Device:
    """Stands in for torch.cuda."""

    def __init__(self) -> None:
        self.now = 0.0  # the host's time
        self.idle_at = 0.0  # the time at which the device has finished all queued kernels
        self.waits: list[int] = []  # the cycles of each call of _sleep
        self.capturing: Graph | None = None

    def clock(self) -> float:
        return self.now

    def launch(
        self, device: float, host: float = 0.0, work: Callable[[], Any] = lambda: None
    ) -> None:
        """Launches a kernel of `device` seconds that takes the host `host` seconds to issue.

        `work` runs at once or, if a graph is being captured, at each replay of the graph.
        """
        if self.capturing is not None:
            self.capturing.kernels.append((device, work))
            return
        work()
        self.now += host
        self.idle_at = max(self.idle_at, self.now) + device

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_at)

    def _sleep(self, cycles: int) -> None:
        self.waits.append(cycles)
        self.launch(cycles * CYCLE)

    def Event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    def Stream(self) -> Device:
        return self

    def current_stream(self) -> Device:
        return self

    def wait_stream(self, other: Device) -> None:
        assert other is self

    def stream(self, stream: Device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    @contextlib.contextmanager
    def graph(self, graph: Graph) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device

    def record(self) -> None:
        self._at = max(self._device.idle_at, self._device.now)

    def query(self) -> bool:
        return self._at <= self._device.now

    def synchronize(self) -> None:
        self._device.now = max(self._device.now, self._at)

    def elapsed_time(self, other: Event) -> float:
        return (other._at - self._at) * 1e3


class Graph:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.kernels: list[tuple[float, Callable[[], Any]]] = []

    def replay(self) -> None:
        for _, work in self.kernels:
            work()
        self._device.launch(sum(seconds for seconds, _ in self.kernels), host=30 * US)


@pytest.fixture
def device() -> Device:
    return Device()


def _timer(device: Device, *calls: Call) -> EagerTimer:
    def flush() -> None:
        device.launch(40 * US, host=5 * US)

    return EagerTimer(calls, flush, BusyQueue(device, device.clock))


@pytest.mark.parametrize("host_us", [1, 40, 5000])
def test_the_device_is_timed_without_the_host(device: Device, host_us: int) -> None:
    """A call launches three kernels of 4 us. The host needs less than that, more, and far more."""

    def run(_: None) -> None:
        for _ in range(3):
            device.launch(4 * US, host=host_us * US)

    timer = _timer(device, Call(run))
    for turn in range(3):
        sample = timer.sample(turn)
        assert sample.seconds == pytest.approx(12 * US)
        assert sample.host == pytest.approx(3 * host_us * US)
    assert timer.note == ""
    # The wait grew until it covered the host's time, and then stayed the same.
    assert device.waits[-3] == device.waits[-1] and device.waits[-1] * CYCLE > 3 * host_us * US
    assert (len(device.waits) > 3) == (host_us > 40)


def test_a_call_that_waits_for_the_device_is_noted(device: Device) -> None:
    """No wait is long enough, so the time includes the host's gaps, and the note says so."""

    def run(_: None) -> None:
        device.launch(4 * US, host=10 * US)
        device.synchronize()
        device.launch(4 * US, host=10 * US)

    timer = _timer(device, Call(run))
    sample = timer.sample(0)
    assert timer.note == cuda_timing.NOT_COVERED
    assert sample.seconds == pytest.approx(28 * US) and sample.host == pytest.approx(24 * US)
    tried = len(device.waits)
    assert device.waits == [cuda_timing.SHORTEST_WAIT << i for i in range(tried)]
    assert device.waits[-1] == cuda_timing.LONGEST_WAIT
    timer.sample(1)
    assert len(device.waits) == tried, "the waits must not be tried again"


def test_preparation_is_not_timed_and_is_repeated(device: Device) -> None:
    """If a wait was too short, the call is prepared again, because a backward can run only once."""
    prepared = []

    def prepare() -> int:
        device.launch(100 * US, host=100 * US)
        prepared.append(len(prepared))
        return prepared[-1]

    used = []

    def run(number: int) -> None:
        used.append(number)
        device.launch(7 * US, host=500 * US)

    sample = _timer(device, Call(run, prepare)).sample(0)
    assert sample.seconds == pytest.approx(7 * US) and sample.host == pytest.approx(500 * US)
    assert used == prepared and len(used) > 1


def test_calls_are_taken_in_turn(device: Device) -> None:
    calls = [Call(lambda _, us=us: device.launch(us * US)) for us in (1, 2, 3)]
    timer = _timer(device, *calls)
    taken = [timer.sample(turn).seconds for turn in range(4)]
    assert taken == pytest.approx([1 * US, 2 * US, 3 * US, 1 * US])


def test_a_graph_holds_several_passes_over_the_rotation(device: Device) -> None:
    ran = []

    def call(us: int) -> Call:
        def run(_: None) -> int:
            ran.append(us)
            device.launch(us * US, host=1000 * US)
            return us

        return Call(run)

    queue = BusyQueue(device, device.clock)
    timer = GraphTimer([call(us) for us in (2, 4, 6)], passes=5, cuda=device, queue=queue)
    assert ran == [2, 2, 2, 4, 6] + 5 * [2, 4, 6], "calls are warmed up before they are captured"
    assert timer.calls_a_sample == 15 and timer.replayed() == [2, 4, 6]
    sample = timer.sample(0)
    assert sample.seconds == pytest.approx(4 * US) and sample.host is None


@pytest.mark.parametrize(
    ("calls", "seconds", "passes"),
    [
        (256, 1e-6, 1),  # one pass over the rotation is enough
        (20, 5e-6, 2),
        (2, 30e-6, 16),
        (2, 400e-6, 3),  # few long calls last as long as many short ones
        (2, 5e-3, 1),
    ],
)
def test_a_graph_has_enough_passes(calls: int, seconds: float, passes: int) -> None:
    assert harness.passes_of(calls, seconds) == passes


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_cache_is_flushed_by_one_kernel_that_reads() -> None:
    cache_bytes = 5 << 20
    reader = CacheReader(cache_bytes, "cpu")
    assert reader.buffer.nbytes >= 2 * cache_bytes > 100 * reader.sums.nbytes
    reader.buffer.copy_(torch.randn_like(reader.buffer))
    before = reader.buffer.clone()
    with Seen() as seen:
        reader()
    assert seen.ops == ["aten.sum.IntList_out"]
    assert torch.equal(reader.buffer, before) and torch.equal(reader.sums, before.sum(1))


# The harness on the simulated device: it has CPU tensors, and timers that use the simulated clock.


@pytest.fixture
def simulated(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    def eager(calls: list[Call], _: torch.device) -> EagerTimer:
        return _timer(device, *calls)

    def graph(calls: list[Call], passes: int) -> GraphTimer:
        return GraphTimer(calls, passes, device, BusyQueue(device, device.clock))

    monkeypatch.setattr(harness, "eager_timer", eager)
    monkeypatch.setattr(harness, "GraphTimer", graph)
    monkeypatch.setattr(
        Harness, "_timings", lambda self, bench, cell: [harness.EAGER, harness.GRAPH]
    )
    return device


def _launching(
    device: Device,
    contender: Contender,
    spoil: Callable[[torch.Tensor], Any] = lambda y: None,
    layer_number: int = 0,
) -> Contender:
    """Returns the contender as a kernel of 10 us that takes the host 25 us.

    `spoil` changes the results of one layer of its rotation.
    """
    built = []

    def build(tensors: Any) -> BuiltLayer:
        layer = contender.build(tensors)
        right, number = layer.forward, len(built)
        built.append(layer)

        def forward(x: torch.Tensor) -> Any:
            y = right(x).clone()

            def work() -> None:
                written = y.shape[0] - (spoil is _leave_a_row and number == layer_number)
                y[:written] = right(x)[:written]
                if number == layer_number:
                    spoil(y)

            device.launch(10 * US, host=25 * US, work=work)
            return y

        layer.forward = forward
        return layer

    return replace(contender, build=build)


def _leave_a_row(y: torch.Tensor) -> None:
    """Stands for a kernel that does not write the last row."""


def _reports(contender: Contender) -> list[dict[str, Any]]:
    limits = dict.fromkeys(("read_bytes_per_s", "copy_bytes_per_s", "matmul_flop_per_s"), 1e12)
    cell = Cell("lora_linear", FORWARD, 32, 64, 3, rank=4)
    runner = Harness(torch.device("cpu"), seed=1, seconds=0.0, limits=limits)
    return runner.run(bench_of("lora_linear"), (contender,), cell)


def test_a_cell_has_device_host_and_graph_times(simulated: Device) -> None:
    eager, graph = _reports(_launching(simulated, bench_of("lora_linear").contenders[0]))
    ours = eager["results"][0]
    assert ours["median_s"] == pytest.approx(10 * US) and ours["host_s"] == pytest.approx(25 * US)
    table = tables.cell_table("lora_linear", eager)
    assert "25 us" in table and "as called" in table
    assert tables.seconds_as_called(ours) == ours["host_s"]
    ours = graph["results"][0]
    assert ours["status"] == "ok" and ours["median_s"] == pytest.approx(10 * US)
    assert ours["host_s"] is None and "as called" not in tables.cell_table("lora_linear", graph)
    assert "less than 3 times the last-level cache" in ours["timing_note"], (
        "two tiny layers fit into the cache"
    )


def test_every_captured_call_is_checked(simulated: Device) -> None:
    """The eager check sees only the first layer. The second layer gives a wrong result."""
    ours = bench_of("lora_linear").contenders[0]
    eager, graph = _reports(_launching(simulated, ours, lambda y: y.mul_(1.1), layer_number=1))
    assert eager["results"][0]["status"] == "ok"
    assert graph["results"][0]["status"] == "refused"
    assert graph["results"][0]["median_s"] is None and graph["results"][0]["samples"] == 0


def test_a_row_that_a_captured_call_does_not_write_is_noticed(simulated: Device) -> None:
    """It is noticed even if the memory held the right result before."""
    ours = bench_of("lora_linear").contenders[0]
    eager, graph = _reports(_launching(simulated, ours, _leave_a_row, layer_number=1))
    assert eager["results"][0]["status"] == "ok"
    assert graph["results"][0]["status"] == "refused"
    result = torch.ones(2), [torch.ones(1, dtype=torch.int64)]
    cuda_timing.poison(result)
    assert result[0].isnan().all() and result[1][0].item() == 1
