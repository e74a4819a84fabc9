"""Models that are split over processes: what is written is whole, and what cannot be is refused.

The scenarios run in one process, and in two processes over gloo. As a program, this file is one of
the two: `test_sharding.py FOLDER` with RANK and WORLD_SIZE in the environment.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pylora
from pylora.nn import LoRALinear

# Before torch 2.12, fully_shard cannot hold the bytes of NF4 layers.
needs_sharded_integers = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12),
    reason="fully_shard of torch < 2.12 cannot hold integer parameters",
)
# Longer than any scenario takes on a slow machine, so that a process that waits forever is ended.
_LIMIT = 240


class Block(nn.Module):
    """Two layers of which the second has rows that are no whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 99), nn.Linear(99, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def quantized(width_of_head: int = 6) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(Block(), Block(), nn.Linear(64, width_of_head))
    return pylora.quantize_model(model, skip_modules=["2"], double_quant=True)


def with_lora(**options: Any) -> nn.Sequential:
    model = pylora.add_lora(quantized(), r=3, target_modules=["up", "down"], **options)
    torch.manual_seed(6)
    return filled(model)


@torch.no_grad()
def filled(model: Any) -> Any:
    """The model with noise on all that is trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    options.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for module in (*model[:2], model):
        fully_shard(module, **options)
    return model


def flat(model: nn.Module, **options: Any) -> nn.Module:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu, **options)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in model.named_parameters()
    }


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def assert_each_has_its_rows(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    """The model has the very parameters that it was sharded with, and this process its part."""
    processes, rank = dist.get_world_size(), dist.get_rank()
    assert [id(p) for p in model.parameters()] == list(map(id, parameters))
    for parameter in parameters:
        rows = parameter.to_local().shape[0] if parameter.to_local().dim() else 0
        sizes = [len(part) for part in torch.arange(parameter.shape[0]).chunk(processes)]
        assert rows == (sizes + [0] * processes)[rank]


def refused(text: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=text):
        function(*args, **options)


def fully_sharded(folder: Path) -> None:
    """save_adapter, load_adapter, merge and unmerge of a model under fully_shard."""
    plain = with_lora(modules_to_save=["2"])
    model = sharded(copy.deepcopy(plain))
    parameters = list(model.parameters())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    expected = plain(x)
    with torch.no_grad():  # the outermost parameters stay whole until they are used again
        assert torch.equal(model.eval()(x), expected)

    pylora.save_adapter(model, folder / "sharded")
    pylora.save_adapter(plain, folder / f"plain{dist.get_rank()}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        stored = (folder / "sharded" / name).read_bytes()
        assert stored == (folder / f"plain{dist.get_rank()}" / name).read_bytes()

    with torch.no_grad():
        model(x)
    pylora.save_adapter(filled(copy.deepcopy(plain)), folder / f"other{dist.get_rank()}")
    other = pylora.load_adapter(copy.deepcopy(plain), folder / f"other{dist.get_rank()}")
    before = whole(model)
    pylora.load_adapter(model, folder / f"other{dist.get_rank()}")
    assert_each_has_its_rows(model, parameters)
    assert_same(whole(model), whole(other))
    assert not torch.equal(whole(model)["0.up.lora_A"], before["0.up.lora_A"])
    assert torch.equal(model(x), other(x))

    for options in ({"keep_base": True}, {"keep_base": False}):
        reports = [pylora.merge(each, **options) for each in (model, other)]
        assert reports[0] == reports[1] and reports[0].total.error > 0
        assert_each_has_its_rows(model, parameters)
        if options["keep_base"]:  # without a base to keep, the plain model is unloaded
            assert_same(whole(model), whole(other))
        with torch.no_grad():
            assert torch.equal(model(x), other(x))
        refused("is merged already", pylora.merge, model)
        if options["keep_base"]:
            (kept,) = model[0].up._unmerged_base
            assert all(isinstance(parameter, DTensor) for parameter in kept.parameters())
            for each in (model, other):
                pylora.unmerge(each)
            assert_each_has_its_rows(model, parameters)
            assert_same(whole(model), whole(other))
            assert torch.equal(model(x), other(x))

    blocked = folder / "blocked"
    if dist.get_rank() == 0:
        blocked.write_text("a file in the place of the folder")
    dist.barrier()
    with pytest.raises(FileExistsError if dist.get_rank() == 0 else RuntimeError):
        pylora.save_adapter(model, blocked)


def variants(folder: Path) -> None:
    """DoRA, LoRA's bias and dense bases in a mesh of two dimensions, one of which has copies.

    A shared weight, and a merge that fails.
    """
    processes = dist.get_world_size()
    hybrid = init_device_mesh("cpu", (1, processes), mesh_dim_names=("copies", "shards"))
    copies = init_device_mesh("cpu", (processes, 1), mesh_dim_names=("copies", "shards"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    for options in ({"use_dora": True}, {"lora_bias": True, "use_rslora": True}):
        for dense in (False, True):
            torch.manual_seed(3)
            plain = nn.Sequential(nn.Linear(64, 70, bias=dense), nn.Linear(70, 64, bias=not dense))
            if not dense:
                pylora.quantize_model(plain, blocksize=32)
            filled(pylora.add_lora(plain, r=2, **options))
            model = sharded(copy.deepcopy(plain), mesh=hybrid)
            parameters, before = list(model.parameters()), whole(plain)
            assert pylora.merge(model) == pylora.merge(plain)
            for each in (model, plain):
                with torch.no_grad():
                    each.merged_output = each(x)
            assert torch.equal(model.merged_output, plain.merged_output)
            pylora.unmerge(model)
            assert_each_has_its_rows(model, parameters)
            assert_same(whole(model), before)
            pylora.unmerge(plain)
            assert torch.equal(model(x), plain(x))
            copied = sharded(copy.deepcopy(plain), mesh=copies)
            for each, name in ((model, "hybrid"), (copied, "copies")):
                pylora.save_adapter(each, folder / name)
                with torch.no_grad():
                    for parameter in each.parameters():
                        if parameter.requires_grad:
                            parameter.zero_()
                pylora.load_adapter(each, folder / name)
                assert_same(whole(each), before)

    tied = nn.Sequential(nn.Embedding(11, 64), nn.Linear(64, 11, bias=False))
    tied[1].weight = tied[0].weight
    fully_shard(filled(pylora.add_lora(tied, r=2, target_modules=["1"])))
    refused("1 shares its sharded base weight with 0", pylora.merge, tied)

    model = sharded(with_lora())
    before = whole(model)
    with torch.no_grad():
        model[1].down.lora_B.fill_(float("nan"))
    refused(r"1\.down: .*finite", pylora.merge, model)
    assert not model[0].up.merged
    for name, value in whole(model).items():
        assert torch.equal(value, before[name]) or name == "1.down.lora_B"


def refusals(folder: Path) -> None:
    """Layers are not replaced once a wrapper has taken over the parameters."""
    made = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "fully_shard": sharded,
        "FullyShardedDataParallel": flat,
    }
    for name, wrap in made.items():
        model = wrap(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)))
        for function in (pylora.quantize_model, pylora.add_lora):
            refused(rf"{name}.*pylora\.{function.__name__} .*the order is", function, model)
        assert not any(isinstance(module, LoRALinear) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    adapter = folder / f"adapter{dist.get_rank()}"
    pylora.save_adapter(with_lora(modules_to_save=["2"]), adapter)
    for wrap in (nn.parallel.DistributedDataParallel, sharded):
        # The head of the second model would have to be trained, and is frozen.
        for plain in (quantized().requires_grad_(False), with_lora()):
            plain[2].requires_grad_(True)  # DistributedDataParallel wants something to train
            before = whole(model := wrap(plain))
            refused("load_adapter of this file .*the order is", pylora.load_adapter, model, adapter)
            assert_same(whole(model), before)

    model = nn.parallel.DistributedDataParallel(filled(with_lora(modules_to_save=["2"])))
    pylora.load_adapter(model, adapter)
    assert_same(whole(model.module), whole(with_lora(modules_to_save=["2"])))
    pylora.save_adapter(model, folder / f"again{dist.get_rank()}")
    pylora.merge(model)
    pylora.unmerge(model)
    assert_same(whole(model.module), whole(with_lora(modules_to_save=["2"])))


def flattened(folder: Path) -> None:
    """FSDP1: its parts are neither saved nor filled, unless they are whole for the moment."""
    plain = with_lora()
    bytes_of_weights = [p for p in plain.parameters() if not p.is_floating_point()]
    model = flat(plain, auto_wrap_policy=ModuleWrapPolicy({Block}), ignored_states=bytes_of_weights)
    twin, rank = with_lora(), dist.get_rank()
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), twin(x))
    path = folder / f"flat{rank}"
    refused("save_adapter must be called inside .*summon_full", pylora.save_adapter, model, path)
    assert not path.exists()
    pylora.save_adapter(twin, folder / f"twin{rank}")
    pylora.save_adapter(filled(copy.deepcopy(twin)), folder / f"other{rank}")
    other = folder / f"other{rank}"
    refused("load_adapter must be called inside", pylora.load_adapter, model, other)
    refused("merge must be called before the model is wrapped", pylora.merge, model)
    with FullyShardedDataParallel.summon_full_params(model):
        pylora.save_adapter(model, path)
        pylora.load_adapter(model, other)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / name).read_bytes() == (folder / f"twin{rank}" / name).read_bytes()
    pylora.load_adapter(twin, other)
    torch.testing.assert_close(model(x), twin(x))


def checkpoints(folder: Path) -> None:
    """torch.distributed.checkpoint of a model under fully_shard, which computes in bf16."""
    options = dict(r=3, target_modules=["up", "down"], use_dora=True)
    plain = filled(pylora.add_lora(quantized(), **options))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    in_bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(copy.deepcopy(plain), mp_policy=in_bf16)
    before = whole(model)
    model(x).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    assert_same(whole(model), before)

    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    full = copy.deepcopy(full)  # with one process, it is the memory of the model
    assert_same(full, plain.state_dict())
    # Accelerate, among others, distributes only what is a DTensor.
    assert all(isinstance(value, DTensor) for value in model.state_dict().values())
    own = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    frozen = {name for name, _ in plain.named_parameters()} - trained
    assert trained <= own.keys() and not frozen & own.keys()

    def other() -> nn.Sequential:
        torch.manual_seed(99)
        model = nn.Sequential(Block(), Block(), nn.Linear(64, 6))
        pylora.quantize_model(model, skip_modules=["2"], double_quant=True)
        return filled(pylora.add_lora(model, **options))

    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "checkpoint")
    for use in ("full", "from the first", "sharded", "sharded into a plain model"):
        loaded = other() if "plain" in use else sharded(other())
        parameters = list(loaded.parameters())
        if "sharded" in use:
            state = {"model": get_model_state_dict(loaded)}
            dcp.load(state, checkpoint_id=folder / "checkpoint")
            set_model_state_dict(loaded, state["model"])
        else:
            is_given = use == "full" or dist.get_rank() == 0
            how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=use != "full")
            set_model_state_dict(loaded, copy.deepcopy(full) if is_given else {}, options=how)
        assert [id(p) for p in loaded.parameters()] == list(map(id, parameters))
        assert_same(whole(loaded), whole(plain))
        assert torch.equal(loaded(x), plain(x)), use

    pylora.merge(model)
    merged = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    assert_same(merged, plain.state_dict())
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
    assert not model[0].up.merged
    assert_same(whole(model), whole(plain))


SCENARIOS = {f.__name__: f for f in (fully_sharded, variants, refusals, flattened, checkpoints)}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*requires_grad=True and False:UserWarning"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*FSDP.*CPU:UserWarning"),
]


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_sharded_integers
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_one_process(scenario: str, tmp_path: Path, one_process: None) -> None:
    pytest.importorskip("safetensors")
    SCENARIOS[scenario](tmp_path)


def test_tensor_parallelism_is_refused(one_process: None) -> None:
    mesh, plan = init_device_mesh("cpu", (1,)), {"0": ColwiseParallel(), "1": RowwiseParallel()}

    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))

    for function in (pylora.quantize_model, pylora.add_lora):
        layer = "NF4Linear" if function is pylora.quantize_model else "LoRALinear"
        with pytest.raises(NotImplementedError, match=rf"ColwiseParallel .* {layer} of pylora"):
            parallelize_module(function(model()), mesh, plan)
        parallel = parallelize_module(model(), mesh, plan)
        refused(rf"0\.weight is a DTensor, which pylora\.{function.__name__}", function, parallel)
        assert type(parallel[0]) is nn.Linear and parallel[0].weight.requires_grad
    with pytest.raises(NotImplementedError, match=r"currently only support nn\.Linear"):
        parallelize_module(nn.Sequential(nn.ReLU()), mesh, {"0": ColwiseParallel()})


def test_fsdp1_is_told_what_to_do_with_the_bytes(one_process: None) -> None:
    refused(r"Must flatten .*NF4 layers of pylora .*ignored_states=\[p", flat, with_lora())
    with pytest.raises(ValueError, match=r"Must flatten tensors with uniform dtype but got .*16$"):
        flat(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).bfloat16()))


@needs_sharded_integers
def test_a_layer_is_not_called_with_parts_of_its_weight(one_process: None) -> None:
    mesh, x = init_device_mesh("cpu", (1,)), torch.randn(2, 64)
    inside = with_lora()
    fully_shard(inside[0].up.base_layer, mesh=mesh)
    with pytest.raises(RuntimeError, match=r"base_layer\.weight of this LoRALinear is sharded"):
        inside(x)
    around = sharded(with_lora())
    with pytest.raises(RuntimeError, match=r"lora_A of this LoRALinear is sharded.*through that"):
        around[0].up(x)
    quantized_only = sharded(quantized())
    with pytest.raises(RuntimeError, match=r"weight of this NF4Linear is sharded"):
        quantized_only[0].up(x)


def test_an_older_fully_shard_is_explained(
    one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsdp_param = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_param")

    def refuse(self: Any, parameter: nn.Parameter, *_: Any) -> None:
        raise RuntimeError("only Tensors of floating point dtype can require gradients")

    model, dense = with_lora(), nn.Linear(4, 4)
    monkeypatch.setattr(fsdp_param.FSDPParam, "_init_sharded_param", refuse)
    with pytest.raises(RuntimeError, match=r"require gradients\. .*: it needs torch 2\.12"):
        fully_shard(model[0].up, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=r"require gradients$"):
        fully_shard(dense, mesh=init_device_mesh("cpu", (1,)))


def test_what_zero_3_has_partitioned_is_refused(tmp_path: Path) -> None:
    """The attributes are those that DeepSpeed gives to the parameters it partitions."""
    model = with_lora()
    pylora.save_adapter(model, tmp_path / "before")
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_numel = number, parameter.numel()
        parameter.data = parameter.data.new_empty(0)
    refused(
        r"0\.up\.lora_A is partitioned .* has 0 of its 192 elements; pylora\.save_adapter .*inside",
        pylora.save_adapter,
        model,
        tmp_path / "after",
    )
    assert not (tmp_path / "after").exists()
    for function, argument in ((pylora.load_adapter, (tmp_path / "before",)), (pylora.merge, ())):
        refused(rf"{function.__name__} must be called before", function, model, *argument)
    for function in (pylora.quantize_model, pylora.add_lora):
        refused(rf"partitioned by .*{function.__name__} .*the order is", function, model)


def test_a_part_of_a_tensor_is_never_written(tmp_path: Path) -> None:
    model = with_lora()
    model[1].down.lora_B = nn.Parameter(model[1].down.lora_B[:32].detach())
    refused(
        r"1\.down\.lora_B has shape \(32, 3\); it must be \(64, 3\): .* a part of it",
        pylora.save_adapter,
        model,
        tmp_path / "part",
    )
    assert not (tmp_path / "part").exists()


@needs_sharded_integers
def test_in_two_processes(tmp_path: Path) -> None:
    """All scenarios run in the same two processes, because most of the time goes into imports."""
    pytest.importorskip("safetensors")
    settings = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**os.environ, **settings, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=_LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all(f"{scenario}: done" in output for scenario in SCENARIOS for output in outputs)


def main(folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/processes",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    for name, scenario in SCENARIOS.items():
        (Path(folder) / name).mkdir(exist_ok=True)
        scenario(Path(folder) / name)
        print(f"{name}: done", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
