"""Writes the graph of a recipe as text, or for Graphviz or Mermaid."""

from .graph import Graph
from .products.product import Product


def drawn(graph: Graph, *, style: str) -> str:
    """The graph: `text` lists the inputs of each product; `dot` and `mermaid` are for drawing programs."""
    match style:
        case "dot":
            return _dot(graph)
        case "mermaid":
            return _mermaid(graph)
        case _:
            return _text(graph)


def _title(product: Product, graph: Graph) -> str:
    variants = graph.variants_of(product)
    is_shared = len(variants) == len(graph.recipes)
    return f"{product.kind}/{product.name}" + ("" if is_shared else f"  (for {', '.join(variants)})")


def _text(graph: Graph) -> str:
    lines = []
    for product in graph:
        lines.append(_title(product, graph))
        lines += [f"  from {needed.kind}/{needed.name}" for needed in product.inputs]
    return "\n".join(lines)


def _dot(graph: Graph) -> str:
    lines = ["digraph recipe {", "  rankdir=LR;", "  node [shape=box];"]
    lines += [f'  "{product.kind}/{product.name}";' for product in graph]
    for product in graph:
        lines += [f'  "{needed.kind}/{needed.name}" -> "{product.kind}/{product.name}";' for needed in product.inputs]
    return "\n".join([*lines, "}"])


def _mermaid(graph: Graph) -> str:
    numbers = {product: f"p{index}" for index, product in enumerate(graph)}
    lines = ["flowchart LR"]
    lines += [f'  {number}["{product.kind}/{product.name}"]' for product, number in numbers.items()]
    for product, number in numbers.items():
        lines += [f"  {numbers[needed]} --> {number}" for needed in product.inputs]
    return "\n".join(lines)
