"""What is measured: the shapes of the linear layers of models, cells, and the suites of cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
MODES = (FORWARD, BACKWARD, TRAINING)
# A forward that autograd records, because x and the LoRA weights require gradients.
GRAD_FORWARD = "forward with gradients"
HOST_MODES = (FORWARD, GRAD_FORWARD, TRAINING)

# Model -> (out_features, in_features) -> the layers of that shape.
MODELS: dict[str, dict[tuple[int, int], str]] = {
    "Llama-3 8B": {
        (4096, 4096): "q, o",
        (1024, 4096): "k, v",
        (6144, 4096): "qkv",
        (14336, 4096): "gate, up",
        (28672, 4096): "gate+up",
        (4096, 14336): "down",
    },
    "Llama-3 70B": {(8192, 8192): "q, o", (28672, 8192): "gate, up", (8192, 28672): "down"},
    "Qwen2.5 7B": {(3584, 3584): "q, o", (18944, 3584): "gate, up", (3584, 18944): "down"},
    "SmolLM2 135M": {(576, 576): "q, o", (1536, 576): "gate, up", (576, 1536): "down"},
    "BERT base": {(768, 768): "q, k, v, o", (3072, 768): "up", (768, 3072): "down"},
}
QUICK_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
# So small that nearly all of a call is time of the host.
HOST_SHAPES = ((64, 64),)


@dataclass(frozen=True)
class Cell:
    """One piece of work that every contender does and is timed with.

    tokens  M, the number of tokens in x; 0 if the op takes no x
    rank    the rank of LoRA; 0 without LoRA
    """

    op: str
    mode: str
    out_features: int
    in_features: int
    tokens: int
    dtype: str = "bfloat16"
    rank: int = 0

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def result_features(self) -> int:
        """Returns the features of y. An MLP and adapters return as many as they take: the shape
        of their cells is that of their first layers."""
        same = self.op in ("lora_mlp", "bottleneck_adapter", "multi_bottleneck_adapter")
        return self.in_features if same else self.out_features

    def __str__(self) -> str:
        tokens = f", M={self.tokens}" if self.tokens else ""
        rank = f", r={self.rank}" if self.rank else ""
        shape = f"{self.out_features}x{self.in_features}"
        return f"{self.op} {self.mode} {shape}{tokens}{rank}, {self.dtype}"


@dataclass(frozen=True)
class Suite:
    """The cells that a run measures.

    shapes           (out_features, in_features) of the weights
    tokens           the numbers of tokens for a forward
    backward_tokens  the numbers of tokens for modes with a backward
    memory_tokens    the numbers of tokens for which the peak memory of a training step is measured
                     on a CPU, for the shapes of the quick suite or those that a bench brings; each
                     takes a process of its own
    modes            the modes of an op that has a backward
    seconds          the time to spend on a cell
    few_contenders   leaves out contenders that only a full comparison needs, such as dense fp16
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    backward_tokens: tuple[int, ...]
    memory_tokens: tuple[int, ...]
    modes: tuple[str, ...]
    seconds: float
    few_contenders: bool

    def cells(self, op: str, has_tokens: bool, has_backward: bool, rank: int) -> Iterator[Cell]:
        """Gives the cells of an op, shape by shape, so that many cells use the same weights.

        An op without tokens sees its weight as a flat run of blocks, so one shape of each size is
        enough.
        """
        if not has_tokens:
            sizes = {n * k: (n, k) for n, k in reversed(self.shapes)}
            yield from (Cell(op, FORWARD, *shape, 0) for shape in reversed(sizes.values()))
            return
        for out_features, in_features in self.shapes:
            for mode in self.modes if has_backward else (FORWARD,):
                is_forward = mode in (FORWARD, GRAD_FORWARD)
                for tokens in self.tokens if is_forward else self.backward_tokens:
                    yield Cell(op, mode, out_features, in_features, tokens, rank=rank)


def shapes_of(*models: str) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(shape for model in models for shape in MODELS[model]))


def layers_named(out_features: int, in_features: int) -> str:
    """Names the layers of this shape, such as "Llama-3 8B q, o"; "" if no model has it."""
    shape = (out_features, in_features)
    return "; ".join(
        f"{model} {layers[shape]}" for model, layers in MODELS.items() if shape in layers
    )


SUITES: dict[tuple[str, str], Suite] = {
    ("quick", "cpu"): Suite(
        shapes=QUICK_SHAPES,
        tokens=(1, 4, 16, 64, 512),
        backward_tokens=(512,),
        memory_tokens=(512,),
        modes=(FORWARD, TRAINING),
        seconds=1.0,
        few_contenders=True,
    ),
    ("full", "cpu"): Suite(
        shapes=shapes_of("Llama-3 8B", "SmolLM2 135M", "BERT base"),
        tokens=(1, 4, 16, 64, 512),
        backward_tokens=(16, 512),
        memory_tokens=(512,),
        modes=MODES,
        seconds=1.0,
        few_contenders=False,
    ),
    ("quick", "cuda"): Suite(
        shapes=(*QUICK_SHAPES, (8192, 8192), (28672, 8192)),
        tokens=(1, 4, 16, 64, 512, 2048, 8192),
        backward_tokens=(512, 2048, 8192),
        memory_tokens=(),
        modes=(FORWARD, TRAINING),
        seconds=0.5,
        few_contenders=True,
    ),
    ("full", "cuda"): Suite(
        shapes=shapes_of(*MODELS),
        tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        backward_tokens=(16, 128, 512, 1024, 2048, 4096, 8192),
        memory_tokens=(),
        modes=MODES,
        seconds=1.0,
        few_contenders=False,
    ),
}
