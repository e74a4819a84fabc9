"""What is measured: linear layers by the models that have them, rows of x, and the suites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
MODES = (FORWARD, BACKWARD, TRAINING)
# A forward that autograd records, with x and the LoRA weights requiring gradients.
GRAD_FORWARD = "forward with gradients"
HOST_MODES = (FORWARD, GRAD_FORWARD, TRAINING)

# (out_features, in_features) -> the layers of that shape.
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
# So small that a kernel takes little of a call: what is left is the host's time.
HOST_SHAPES = ((64, 64),)


@dataclass(frozen=True)
class Cell:
    """One thing to measure: every contender does this same work.

    rows is M, the rows of x; 0 where the op takes no x. rank is 0 where there is no LoRA.
    """

    op: str
    mode: str
    out_features: int
    in_features: int
    rows: int
    dtype: str = "bfloat16"
    rank: int = 0

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def result_features(self) -> int:
        """Of y. A gated MLP whose gate and up are out_features x in_features gives in_features."""
        return self.in_features if self.op == "lora_mlp" else self.out_features

    def __str__(self) -> str:
        rows = f", M={self.rows}" if self.rows else ""
        rank = f", r={self.rank}" if self.rank else ""
        shape = f"{self.out_features}x{self.in_features}"
        return f"{self.op} {self.mode} {shape}{rows}{rank}, {self.dtype}"


@dataclass(frozen=True)
class Suite:
    """Shapes and rows; `seconds` is the time to spend on timing each cell.

    few_contenders    leaves out what only a full comparison needs (fp16 and fp32 dense, ...)
    backward_rows     the rows for which backward modes are measured
    modes             the modes of ops that have a backward
    memory_rows       the rows for which the peak memory of a training step is measured on a CPU,
                      for the shapes of the quick suite: it takes a process each
    """

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    backward_rows: tuple[int, ...]
    memory_rows: tuple[int, ...]
    modes: tuple[str, ...]
    seconds: float
    few_contenders: bool

    def cells(self, op: str, has_rows: bool, has_backward: bool, rank: int) -> Iterator[Cell]:
        """The cells of one op, shape by shape, so that prepared weights serve many of them.

        An op without rows sees its weight as a flat run of blocks: one shape of each size is
        enough.
        """
        if not has_rows:
            sizes = {n * k: (n, k) for n, k in reversed(self.shapes)}
            yield from (Cell(op, FORWARD, *shape, 0) for shape in reversed(sizes.values()))
            return
        for out_features, in_features in self.shapes:
            for mode in self.modes if has_backward else (FORWARD,):
                is_forward = mode in (FORWARD, GRAD_FORWARD)
                for rows in self.rows if is_forward else self.backward_rows:
                    yield Cell(op, mode, out_features, in_features, rows, rank=rank)


def shapes_of(*models: str) -> tuple[tuple[int, int], ...]:
    return tuple(dict.fromkeys(shape for model in models for shape in MODELS[model]))


def layers_named(out_features: int, in_features: int) -> str:
    """The layers of this shape in words, such as "Llama-3 8B q, o"; "" where no model has it."""
    shape = (out_features, in_features)
    return "; ".join(
        f"{model} {layers[shape]}" for model, layers in MODELS.items() if shape in layers
    )


SUITES: dict[tuple[str, str], Suite] = {
    ("quick", "cpu"): Suite(
        shapes=QUICK_SHAPES,
        rows=(1, 4, 16, 64, 512),
        backward_rows=(512,),
        memory_rows=(512,),
        modes=(FORWARD, TRAINING),
        seconds=1.0,
        few_contenders=True,
    ),
    ("full", "cpu"): Suite(
        shapes=shapes_of("Llama-3 8B", "SmolLM2 135M", "BERT base"),
        rows=(1, 4, 16, 64, 512),
        backward_rows=(16, 512),
        memory_rows=(512,),
        modes=MODES,
        seconds=1.0,
        few_contenders=False,
    ),
    ("quick", "cuda"): Suite(
        shapes=(*QUICK_SHAPES, (8192, 8192), (28672, 8192)),
        rows=(1, 4, 16, 64, 512, 2048, 8192),
        backward_rows=(512, 2048, 8192),
        memory_rows=(),
        modes=(FORWARD, TRAINING),
        seconds=0.5,
        few_contenders=True,
    ),
    ("full", "cuda"): Suite(
        shapes=shapes_of(*MODELS),
        rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
        backward_rows=(16, 128, 512, 1024, 2048, 4096, 8192),
        memory_rows=(),
        modes=MODES,
        seconds=1.0,
        few_contenders=False,
    ),
}
