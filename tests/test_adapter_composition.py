"""Compositions of bottleneck adapters: what they compute, what they train and what is refused."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylora
from pylora import Average, BatchSplit, Fuse, Parallel, Stack
from pylora.adapters import AdapterConfig
from pylora.models.slots import slots
from pylora.nn import BottleneckAdapter

pytest.importorskip("transformers")

from benchmarks.models.families import FAMILIES

X = torch.arange(3, 23).view(2, 10)


class CountedOps(TorchDispatchMode):
    """Appends to `calls` for each call of an op of pylora."""

    def __init__(self, op: str, calls: list[str]) -> None:
        super().__init__()
        self.op, self.calls = op, calls

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op is getattr(torch.ops.pylora, self.op).default:
            self.calls.append(self.op)
        return op(*args, **kwargs or {})


CONFIGS: dict[str, AdapterConfig] = {
    "houlsby": pylora.HoulsbyConfig(reduction_factor=8),
    "pfeiffer": pylora.PfeifferConfig(reduction_factor=8),
    "parallel": pylora.ParallelConfig(reduction_factor=8, scaling=1.0),
}


def three(config: str = "pfeiffer", family: str = "llama") -> Any:
    """A model with the adapters "a", "b" and "c", which have random values."""
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval()
    for name in "abc":
        pylora.add_adapter(model, name, CONFIGS[config])
        for slot in slots(model).values():
            for parameter in slot.adapters[name].parameters():
                nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: Any, composition: Any, x: Tensor = X) -> Tensor:
    with pylora.active_adapters(model, composition), torch.no_grad():
        return model(x).logits


@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_the_compositions_compute(config: str, family: str) -> None:
    model = three(config, family)
    a, b = logits(model, "a"), logits(model, "b")
    assert not torch.equal(a, b)
    assert torch.equal(logits(model, Stack("a")), a)
    assert torch.equal(logits(model, Average("a", "b", weights=[0, 1])), b)
    assert torch.equal(logits(model, Average("a", "b", "c", weights=[1, 0, 0])), a)
    assert not torch.equal(logits(model, Average("a", "b")), a)
    split = logits(model, BatchSplit("a", "b"))
    torch.testing.assert_close(split[:1], logits(model, "a", X[:1]))
    torch.testing.assert_close(split[1:], logits(model, "b", X[1:]))
    torch.testing.assert_close(split, torch.cat([a[:1], b[1:]]))
    both = logits(model, BatchSplit("a", "b", batch_sizes=[0, 2]))
    torch.testing.assert_close(both, b)
    parallel = logits(model, Parallel("a", "b", Stack("a", "b")))
    expected = torch.cat([a, b, logits(model, Stack("a", "b"))])
    torch.testing.assert_close(parallel, expected)
    nested = logits(model, BatchSplit(Stack("a", "b"), Average("a", "c"), batch_sizes=[1, 1]))
    expected = torch.cat([logits(model, Stack("a", "b"))[:1], logits(model, Average("a", "c"))[1:]])
    torch.testing.assert_close(nested, expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_split_of_the_batch_is_one_op(config: str) -> None:
    """An adapter that is called itself, here because it has a hook, gives the same values."""
    model, calls = three(config), []
    pylora.delete_adapter(model, "c")
    x = torch.arange(3, 43).view(4, 10)
    split = BatchSplit("a", "b", "a", batch_sizes=[2, 1, 1])
    with CountedOps("multi_bottleneck_adapter", calls):
        together = logits(model, split, x)
    assert len(calls) == len(slots(model))
    for slot in slots(model).values():
        slot.adapters["a"].register_forward_hook(lambda *_: None)
    with CountedOps("multi_bottleneck_adapter", calls):
        torch.testing.assert_close(logits(model, split, x), together)
    assert len(calls) == len(slots(model))


def test_a_split_takes_adapters_that_a_block_lacks() -> None:
    """A block leaves the rows of an adapter that it does not have as they are."""
    torch.manual_seed(0)
    model = FAMILIES["llama"].build().eval()
    pylora.add_adapter(model, "mlp", pylora.HoulsbyConfig(reduction_factor=8, where=("mlp",)))
    pylora.add_adapter(model, "both", pylora.HoulsbyConfig(reduction_factor=16))
    for slot in slots(model).values():
        for parameter in slot.adapters.parameters():
            nn.init.normal_(parameter, std=0.2)
    split = logits(model, BatchSplit("mlp", "both"))
    torch.testing.assert_close(split[:1], logits(model, "mlp", X[:1]))
    torch.testing.assert_close(split[1:], logits(model, "both", X[1:]))


def test_a_split_with_dropout_or_norms_calls_each_adapter() -> None:
    model, calls = three(), []
    for slot in slots(model).values():
        slot.adapters["b"].dropout = 0.5
    with CountedOps("multi_bottleneck_adapter", calls):
        logits(model, BatchSplit("a", "b"))
        assert calls
        calls.clear()
        model.train()
        logits(model, BatchSplit("a", "b"))
    assert not calls


def test_each_adapter_of_a_split_is_trained_by_its_rows() -> None:
    model = three()
    model.requires_grad_(False)
    slot, *_ = slots(model).values()
    gradients = {}
    for split, names in ((BatchSplit("a", "b"), "ab"), ("a", "a")):
        for name in names:
            slot.adapters[name].requires_grad_()
        model.zero_grad()
        with pylora.active_adapters(model, split):
            model(X if len(names) == 2 else X[:1]).logits[:1].square().sum().backward()
        gradients[names] = slot.adapters["a"].down_weight.grad.clone()
    torch.testing.assert_close(gradients["ab"], gradients["a"])


@pytest.mark.parametrize("config", CONFIGS)
def test_a_stack_of_identities_is_the_identity(config: str) -> None:
    model = three(config)
    with pylora.adapters_disabled(model), torch.no_grad():
        plain = model(X).logits
    for slot in slots(model).values():
        for adapter in slot.adapters.values():
            nn.init.zeros_(adapter.up_weight)
            nn.init.zeros_(adapter.up_bias)
    assert torch.equal(logits(model, Stack("a", "b", "c")), plain)


def test_a_stack_feeds_one_adapter_to_the_next() -> None:
    """In a model of one linear layer a and b are known functions."""
    model = nn.Module()
    block: Any = nn.Module()
    block.mlp, block.attn, block.norm = nn.Identity(), nn.Identity(), nn.LayerNorm(8)
    block.forward = lambda x: block.mlp(x)
    model.layers = nn.ModuleList([block])
    model.forward = lambda x: block(x)
    for name in ("a", "b"):
        pylora.add_adapter(model, name, pylora.PfeifferConfig(reduction_factor=2))
    (slot,) = slots(model).values()
    a, b = slot.adapters["a"], slot.adapters["b"]
    for adapter in (a, b):
        nn.init.normal_(adapter.up_weight)
    x = torch.randn(3, 8)
    with torch.no_grad():
        for composition, expected in (
            (Stack("a", "b"), b(a(x))),
            (Stack("b", "a"), a(b(x))),
            (Average("a", "b", weights=[0.25, 0.75]), 0.25 * a(x) + 0.75 * b(x)),
            (Stack("a", Average("a", "b")), 0.5 * a(a(x)) + 0.5 * b(a(x))),
        ):
            with pylora.active_adapters(model, composition):
                torch.testing.assert_close(model(x), expected)


def test_swapping_back_is_bit_identical_and_copies_nothing() -> None:
    model = three()
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    first = {}
    for composition in ("a", "b", Stack("a", "b"), "a", Stack("a", "b"), "b"):
        pylora.set_active_adapters(model, composition)
        y = model(X).logits
        assert torch.equal(y, first.setdefault(composition, y))
        assert pylora.active_adapter(model) == composition
    assert len({y.sum().item() for y in first.values()}) == 3
    for name, parameter in model.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, value)


@pytest.mark.parametrize("inside", [None, Stack("a", "b"), Average("a", "b"), BatchSplit("b", "a")])
def test_training_one_adapter_changes_nothing_else(inside: Any) -> None:
    model = three().train()
    pylora.train_adapter(model, "b", inside=inside)
    assert pylora.active_adapter(model) == (inside or "b")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], weight_decay=1
    )
    for _ in range(2):
        model(X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if ".adapters.b." in n} and changed


def test_fusion_trains_its_attention_over_frozen_adapters() -> None:
    model = three().train()
    with pytest.raises(ValueError, match=r"Fuse\('a', 'b'\) has no attention yet"):
        pylora.set_active_adapters(model, Fuse("a", "b"))
    pylora.train_adapter(model, Fuse("a", "b"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".fusions.a,b." in n} and trained
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(X, labels=X).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    pylora.set_active_adapters(model, Stack("c", Fuse("a", "b")))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in before if ".fusions.a,b." in n or ".adapters.c." in n}
    pylora.delete_adapter(model, "a")
    assert not any("fusions" in n for n, _ in model.named_parameters())
    assert pylora.active_adapter(model) is None


def test_fusion_over_one_adapter_that_it_attends_to_is_that_adapter() -> None:
    model = three()
    pylora.train_adapter(model, Fuse("a", "b"))
    for slot in slots(model).values():
        fusion = slot.fusions["a,b"]
        with torch.no_grad():
            fusion.value.weight.copy_(torch.eye(64))
        # Both members are the same, so every attention gives what either of them adds.
        slot.adapters["b"].load_state_dict(slot.adapters["a"].state_dict())
    torch.testing.assert_close(logits(model, Fuse("a", "b")), logits(model, "a"))


def test_lora_and_adapters_together() -> None:
    model = three()
    pylora.add_lora(model, r=4, adapter_name="lora")
    assert pylora.active_adapter(model) == "a"  # the first adapter stays active
    for layer in model.modules():
        if isinstance(layer, pylora.nn.LoRALinear):
            nn.init.normal_(layer.adapter("lora").lora_B, std=0.1)
    a, lora = logits(model, "a"), logits(model, "lora")
    both = logits(model, Stack("lora", "a"))
    assert not torch.equal(a, lora) and not torch.equal(both, a) and not torch.equal(both, lora)
    pylora.set_active_adapters(model, Stack("lora", "a", "b"))
    assert pylora.active_adapter(model) == Stack("lora", "a", "b")
    assert pylora.adapter_names(model) == ("lora", "a", "b", "c")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in trained) and any(".adapters.b." in n for n in trained)
    assert not any(".adapters.c." in n for n in trained)
    pylora.train_adapter(model, "a", inside=Stack("lora", "a"))
    assert all(".adapters.a." in n for n, p in model.named_parameters() if p.requires_grad)
    pylora.train_adapter(model, "lora", inside=Stack("lora", "a"))
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)
    pylora.set_active_adapters(model, "a")
    assert torch.equal(model(X).logits, a)
    pylora.set_active_adapters(model, "lora")
    assert torch.equal(model(X).logits, lora)
    pylora.unload(model)
    assert not slots(model) and pylora.adapter_names(model) == ()


def test_two_threads_compute_with_different_adapters() -> None:
    model = three()
    expected = {name: logits(model, name) for name in ("a", "b")}
    barrier, wrong = threading.Barrier(2), []

    def work(name: str) -> None:
        with pylora.active_adapters(model, name), torch.no_grad():
            barrier.wait(timeout=60)
            for _ in range(20):
                if not torch.equal(model(X).logits, expected[name]):
                    wrong.append(name)
            barrier.wait(timeout=60)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not barrier.broken


def test_a_block_ends_after_an_exception_and_nests() -> None:
    model = three()
    pylora.set_active_adapters(model, "c")
    with pytest.raises(RuntimeError, match="inside"), pylora.active_adapters(model, "a"):
        with pylora.active_adapters(model, "b"):
            assert pylora.active_adapter(model) == "b"
        assert pylora.active_adapter(model) == "a"
        raise RuntimeError("inside")
    assert pylora.active_adapter(model) == "c"
    twin = copy.deepcopy(model)
    with pylora.active_adapters(model, "a"):
        assert pylora.active_adapter(twin) == "c"


def test_what_does_not_fit_is_refused() -> None:
    model = three()
    pylora.add_adapter(model, "elsewhere", CONFIGS["houlsby"])
    for name in ("l1", "l2"):
        pylora.add_lora(model, r=2, adapter_name=name)
    before = pylora.active_adapter(model)
    for call, message in (
        (lambda: pylora.set_active_adapters(model, "d"), "adapter_name is 'd'; it must be one of"),
        (lambda: pylora.set_active_adapters(model, Stack("a", "d")), "must be one of the model's"),
        (lambda: Stack(), r"Stack\(\) has no members"),
        (lambda: Stack("a", Parallel("b")), r"Parallel\('b'\) is a member of a Stack"),
        (lambda: Fuse("a", Stack("b")), "is a member of a Fuse; a Fuse can hold names$"),
        (lambda: Average("a", "b", weights=[1]), "weights has 1 entries"),
        (lambda: Average("a", "b", weights=[1, 1]), "weights have the sum 2"),
        (lambda: BatchSplit("a", batch_sizes=[-1]), "batch_sizes is -1"),
        (lambda: logits(model, BatchSplit("a", "b", "c")), "for a batch of 3 rows, but .* 2"),
        (lambda: pylora.set_active_adapters(model, Average("l1", "a")), "member of a Stack"),
        (lambda: pylora.set_active_adapters(model, Stack("l1", "l2")), "at most one can be active"),
        (
            lambda: pylora.train_adapter(model, Fuse("a", "elsewhere")),
            "must sit at the same places",
        ),
        (lambda: pylora.train_adapter(model, Fuse("a", "l1")), "must be bottleneck adapters"),
        (lambda: pylora.train_adapter(model, "a", inside=Stack("b", "c")), "it must contain 'a'"),
        (lambda: pylora.add_adapter(model, "a", CONFIGS["houlsby"]), "has an adapter of this name"),
        (lambda: pylora.add_adapter(model, "l1", CONFIGS["houlsby"]), "an adapter of this name"),
        (lambda: pylora.add_lora(model, adapter_name="a"), "has a bottleneck adapter of this name"),
        (lambda: pylora.add_adapter(model, "x,y", CONFIGS["houlsby"]), "must have no comma"),
        (lambda: pylora.quantize_model(model), "has LoRA layers|has bottleneck adapters"),
        (lambda: pylora.HoulsbyConfig(reduction_factor=0), "reduction_factor is 0"),
        (lambda: pylora.HoulsbyConfig(activation="what"), "activation is 'what'"),
        (lambda: pylora.HoulsbyConfig(where=()), "where is empty"),
        (lambda: pylora.PfeifferConfig(where=["attention"]), "can have 'mlp' only"),
        (lambda: pylora.HoulsbyConfig(norm_before="batch"), "norm_before is 'batch'"),
        (lambda: pylora.HoulsbyConfig(dropout=1.0), "dropout is 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert pylora.active_adapter(model) == before
    with pytest.raises(TypeError, match="config is 'houlsby'"):
        pylora.add_adapter(model, "x", "houlsby")
    with pytest.raises(ValueError, match="no transformer block with places that pylora knows"):
        pylora.add_adapter(nn.Sequential(nn.Linear(2, 2)), "x", CONFIGS["houlsby"])
    odd = FAMILIES["llama"].build()
    odd.model.layers.append(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model\.layers\.1 \(Linear\) is no transformer block"):
        pylora.add_adapter(odd, "x", CONFIGS["houlsby"])
    assert not any(isinstance(m, BottleneckAdapter) for m in odd.modules())
