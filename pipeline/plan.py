"""The cost of a recipe: parts, tokens, bytes on disk and operations of each product, and the time on this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..store.layout import Layout
from ..store.machine import arithmetic_for, flops, has_gpu, threads
from .graph import Graph
from .products.product import PartsProduct, Product
from .sizes import FoundSizes

GPU_FLOPS = 989e12  # one H100 in bfloat16
UTILISATION = 0.4  # share of GPU_FLOPS that a good forward pass or training step reaches

# A stage that runs a model on a processor (benchmarks/README.md, the demo): the time to start and load it, and the time between the
# matrix products (norms, softmax, attention), as a share of the time of the matrix products in float32.
_START_SECONDS, _BETWEEN = 15.0, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One line of a plan."""

    stage: str
    parts: int
    parts_done: int
    tokens: float
    stored_bytes: float
    flops: float = 0  # floating-point operations of the models
    dtype: str = "float32"  # number format of their weights
    variants: tuple[str, ...] = ()  # variants that share the product

    @property
    def gpu_hours(self) -> float:
        """Hours on one GPU."""
        return self.flops / (GPU_FLOPS * UTILISATION) / 3600


def plan(graph: Graph, *, base: Path, models_dir: Path, layout: Layout) -> list[PlannedStage]:
    """Plan every product without changing or downloading anything.

    Raises:
        UsageError: a model or the corpus is not available, and the recipe does not state its expected size.
    """
    sizes = FoundSizes(
        list({id(product.recipe): product.recipe for product in graph}.values()), base=base, models_dir=models_dir, layout=layout
    )
    return [_planned(product, graph=graph, sizes=sizes) for product in graph]


def _planned(product: Product, *, graph: Graph, sizes: FoundSizes) -> PlannedStage:
    cost = product.cost(sizes)
    return PlannedStage(
        stage=f"{product.title} ({cost.remark})" if cost.remark else product.title,
        parts=sizes.parts(product),
        parts_done=_parts_done(product, layout=sizes.layout),
        tokens=cost.tokens,
        stored_bytes=cost.stored_bytes,
        flops=cost.flops,
        dtype=cost.dtype,
        variants=tuple(graph.variants_of(product)),
    )


def _parts_done(product: Product, *, layout: Layout) -> int:
    if isinstance(product, PartsProduct):
        return len(list(product.folder(layout).glob("part-*.json")))
    return int(product.is_done(layout))


def seconds_here(stages: Iterable[PlannedStage]) -> float:
    """Seconds that the missing products take if nothing else runs on this machine. Processor speed is from the race in `store.machine`."""
    seconds = 0.0
    for stage in stages:
        missing = 1 - stage.parts_done / max(stage.parts, 1)
        if stage.flops and missing > 0:
            seconds += _START_SECONDS + missing * stage.flops * _seconds_per_operation(stage.dtype)
    return seconds


def _seconds_per_operation(dtype: str) -> float:
    """Matrix products run at the speed of the race. The time between them does not depend on the number format."""
    if has_gpu():
        return 1 / (GPU_FLOPS * UTILISATION)
    return (1 / flops(arithmetic_for(dtype)) + _BETWEEN / flops("float32")) / threads()
