"""Finds the places for adapters in the transformer blocks of a model, by the blocks' structure.

A block is a member of an nn.ModuleList that has the modules of one of the layouts below. A layout
gives their paths inside the block, so it serves every model whose blocks look the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pylora.adapters.configs import AdapterConfig, ParallelConfig, PfeifferConfig, Where
from pylora.models.module_tree import is_below, sites
from pylora.models.wrappers import classes_of, inside
from pylora.nn.conv1d import is_conv1d


@dataclass(frozen=True)
class SubLayer:
    """Attention or MLP: paths of modules in a block.

    reads     its first argument is the input of the sub-layer
    writes    its output, or the first one of several, is what the block adds to its stream
    norm      the norm that the sum passes afterwards, in blocks that normalize there
    hub       what holds the adapters of this sub-layer in the `adapters` library, whose files have
              it in their keys; "" for `attention_adapters` or `output_adapters`
    """

    reads: str
    writes: str
    norm: str = ""
    hub: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.reads, self.writes, self.norm)))


@dataclass(frozen=True)
class Layout:
    """The sub-layers of a block; `attention` is None if the block has one sub-layer only."""

    attention: SubLayer | None
    mlp: SubLayer

    def fits(self, block: nn.Module) -> bool:
        """True if the block has all modules of the layout."""
        sub_layers = [s for s in (self.attention, self.mlp) if s is not None]
        return all(submodule(block, path) is not None for s in sub_layers for path in s.paths)

    def sub_layer(self, where: Where) -> SubLayer | None:
        return self.attention if where == "attention" else self.mlp


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """The module at this path without wrappers; None if there is none."""
    module: nn.Module | None = inside(block)
    for part in path.split("."):
        module = None if module is None else module._modules.get(part)
        module = None if module is None else inside(module)
    return module


_ATTENTIONS = ("self_attn", "self_attention", "attention", "attn", "mamba", "linear_attn")
_MLPS = (
    ("mlp", "mlp"),
    ("feed_forward", "feed_forward"),
    ("block_sparse_moe", "block_sparse_moe"),
    ("fc1", "fc2"),
    ("linear1", "linear2"),
)
_LAYOUTS = (
    # T5: a decoder block has cross-attention between the two.
    *(
        Layout(
            SubLayer("layer.0.SelfAttention", "layer.0.SelfAttention", hub="layer.0"),
            SubLayer(
                f"layer.{last}.DenseReluDense", f"layer.{last}.DenseReluDense", hub=f"layer.{last}"
            ),
        )
        for last in (2, 1)
    ),
    # BERT
    Layout(
        SubLayer(
            "attention.self",
            "attention.output.dense",
            "attention.output.LayerNorm",
            hub="attention.output",
        ),
        SubLayer("intermediate.dense", "output.dense", "output.LayerNorm", hub="output"),
    ),
    # Gemma 2 and 3 have a norm behind each sub-layer, before the sum.
    Layout(
        SubLayer("self_attn", "post_attention_layernorm"),
        SubLayer("mlp", "post_feedforward_layernorm"),
    ),
    *(
        Layout(SubLayer(attention, attention), SubLayer(*mlp))
        for attention in _ATTENTIONS
        for mlp in _MLPS
    ),
    # Mamba
    Layout(None, SubLayer("mixer", "mixer")),
)
# The norms of blocks that normalize after the sum, though others of the same layout do it before.
# The last entry tells them apart by an attribute of the block.
_NORMALIZING_AFTER = {
    "BartEncoderLayer": ("final_layer_norm", None),
    "BartDecoderLayer": ("final_layer_norm", None),
    "OPTDecoderLayer": ("final_layer_norm", "do_layer_norm_before"),
    "TransformerEncoderLayer": ("norm2", "norm_first"),
}


@dataclass(frozen=True)
class TransformerBlock:
    """A block of a model, and where its sub-layers are."""

    name: str
    module: nn.Module
    layout: Layout

    @property
    def norm_after_mlp(self) -> nn.Module | None:
        """The norm behind the sum of the MLP; None if the block's output is the sum itself."""
        path = self.layout.mlp.norm
        for kind in classes_of(self.module) & _NORMALIZING_AFTER.keys():
            path, before = _NORMALIZING_AFTER[kind]
            if before is not None and getattr(self.module, before):
                return None
        return submodule(self.module, path) if path else None

    def hidden_size(self) -> int:
        """The width of the stream: that of the block's outermost norm, or of the MLP's output."""
        level = [inside(self.module)]
        while level:
            for module in level:
                weight = module._parameters.get("weight")
                if weight is not None and weight.dim() == 1 and weight.is_floating_point():
                    return weight.shape[0]
            level = [inside(m) for module in level for m in module._modules.values() if m]
        written = submodule(self.module, self.layout.mlp.writes)
        for module in reversed(list(written.modules() if written is not None else ())):
            if hasattr(module, "out_features"):
                return int(module.out_features)  # type: ignore[arg-type]
            if is_conv1d(module):
                return int(module.nf)  # type: ignore[arg-type]
        raise ValueError(
            f"{self.name} has no norm and its MLP ends in no linear layer, so the width of its "
            "hidden states is not known"
        )

    def check(self, config: AdapterConfig) -> None:
        """Raises ValueError if the block has no place for an adapter of this kind."""
        if self.layout.attention is None and tuple(config.where) == ("attention",):
            raise ValueError(
                f"{self.name} ({type(self.module).__name__}) has one sub-layer and no attention "
                "beside it; where must include 'mlp', which stands for that sub-layer"
            )


def transformer_blocks(model: nn.Module) -> list[TransformerBlock]:
    """The blocks of a model in the order of its modules.

    Raises ValueError that names the module if a block's sub-layers are not found, or if the model
    has no block.
    """
    found: list[TransformerBlock] = []
    lists = []
    for site in sites(model):
        if not isinstance(site.module, nn.ModuleList) or not len(site.module):
            continue
        if is_below(site.name, [block.name for block in found]):
            continue
        lists.append(site.name)
        members = [(f"{site.name}.{i}", inside(m)) for i, m in enumerate(site.module)]
        layouts = {name: _layout_of(module) for name, module in members}
        if not any(layouts.values()):
            continue
        for name, module in members:
            layout = layouts[name]
            if layout is None:
                raise ValueError(
                    f"{name} ({type(module).__name__}) is no transformer block that pylora knows, "
                    f"unlike its neighbours: it has {_children(module)}"
                )
            found.append(TransformerBlock(name, module, layout))
    if not found:
        raise ValueError(
            "model has no transformer block with places that pylora knows; it looked at the "
            f"members of {', '.join(lists) or 'nn.ModuleList, of which the model has none'}"
        )
    return found


def _layout_of(module: nn.Module) -> Layout | None:
    return next((layout for layout in _LAYOUTS if layout.fits(module)), None)


def _children(module: nn.Module) -> str:
    return ", ".join(module._modules) or "no modules inside"


def places(block: TransformerBlock, config: AdapterConfig) -> Iterator[tuple[str, SubLayer]]:
    """The names of the slots that an adapter of this kind needs in a block, with the sub-layer.

    A block with one sub-layer has it in the place of the MLP.
    """
    if isinstance(config, PfeifferConfig):
        yield "output", block.layout.mlp
        return
    kind = "beside_" if isinstance(config, ParallelConfig) else "after_"
    for where in config.where:
        sub_layer = block.layout.sub_layer(where)
        if sub_layer is not None:
            yield kind + where, sub_layer
