"""Show what one validation pass does to training with bitsandbytes on a CPU.

    python examples/bitsandbytes_validation.py

On a CPU with AVX-512 BF16, bitsandbytes (0.50.2) repacks the bytes of a Linear4bit in place at the
first forward in eval mode, and rounds its scales to bfloat16. A later backward reads the repacked
bytes as if they were in the old order, so its gradients are wrong. Nothing says so, and the bytes
cannot be restored. On other CPUs nothing is repacked, and this script says that.

Three copies of one small network are trained: with bitsandbytes, with bitsandbytes after one
validation pass, and with pylora's layers over the same bytes after one validation pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

FEATURES, LAYERS, TOKENS, STEPS = 256, 4, 128, 30


class Network(nn.Module):
    """Frozen 4-bit layers behind a trainable one, so that gradients pass all of them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.trained = nn.Linear(FEATURES, FEATURES)
        self.frozen = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.trained(x)
        for layer in self.frozen:
            x = x + torch.tanh(layer(x))
        return x


def repacked(network: Network) -> bool:
    """True if bitsandbytes has repacked a layer."""
    states = (getattr(layer.weight, "quant_state", None) for layer in network.frozen)
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def gradient_norm(network: Network, x: Tensor, target: Tensor) -> float:
    network.train().zero_grad()
    (network(x) - target).square().mean().backward()
    return float(nn.utils.get_total_norm([p.grad for p in network.trained.parameters()]))


def train(network: Network, x: Tensor, target: Tensor) -> float:
    """The loss after some steps."""
    optimizer = torch.optim.Adam(network.trained.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (network(x) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return float((network(x) - target).square().mean())


def main() -> int:
    try:
        import bitsandbytes
    except ImportError:
        print("This script compares with bitsandbytes: pip install bitsandbytes", file=sys.stderr)
        return 2
    from pylora.nn import NF4Linear

    torch.manual_seed(0)
    dense = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(LAYERS)]
    x, target = torch.randn(TOKENS, FEATURES), torch.randn(TOKENS, FEATURES)

    def with_bitsandbytes(weight: Tensor) -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(FEATURES, FEATURES, bias=False, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(weight.detach().clone(), quant_type="nf4")
        layer.weight.requires_grad = False
        return layer.to("cpu")  # which quantizes it

    def with_pylora(weight: Tensor) -> nn.Module:
        return NF4Linear.from_bitsandbytes(with_bitsandbytes(weight))

    def network(make: Callable[[Tensor], nn.Module], validate: bool) -> Network:
        torch.manual_seed(1)
        built = Network([make(layer.weight) for layer in dense])
        if validate:
            built.eval()
            with torch.no_grad():
                built(x)
        return built.train()

    networks = {
        "bitsandbytes": network(with_bitsandbytes, validate=False),
        "bitsandbytes after one validation pass": network(with_bitsandbytes, validate=True),
        "pylora after one validation pass": network(with_pylora, validate=True),
    }
    _, validated, _ = networks.values()
    if repacked(validated):
        print("bitsandbytes repacked its layers in the validation pass.")
    else:
        print(
            "bitsandbytes does not repack on this CPU, which has no AVX-512 BF16: "
            "the gradients below must be equal but for rounding."
        )
    print(f"{'':40}  gradient norm  loss after {STEPS} steps")
    for name, built in networks.items():
        norm = gradient_norm(built, x, target)
        print(f"{name:40}  {norm:13.4f}  {train(built, x, target):19.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
