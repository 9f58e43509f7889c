"""Parses YAML from untrusted files: parsing always ends with a value or a ValueError."""

from typing import Any

import yaml

from .json_text import reason_of, require_shallow

LONGEST_YAML_NUMBER = 256  # characters; with colons, the parsing time grows with the square of the length
MOST_YAML_NODES = 1_000_000  # keys and values, counted as often as aliases repeat them
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, with plain types only.

    Raises:
        ValueError: it is invalid or nested too deeply, has more than `MOST_YAML_NODES` keys and values, or a number is longer than
        `LONGEST_YAML_NUMBER`.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, counted={}, above=set()) > MOST_YAML_NODES:
            raise ValueError(f"with all aliases written out, it has more than {MOST_YAML_NODES:,} keys and values")
        value = loader.construct_document(node)
        require_shallow(value)
        return value
    except RecursionError as error:
        raise ValueError("its lists and tables are nested too deeply") from error
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # The library raises ValueError for tags with invalid values, such as impossible dates.
        reason = reason_of(error) if isinstance(error, ValueError) else str(error)
        raise ValueError(" ".join(reason.split()) or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()


def _expanded(node: yaml.Node, *, counted: dict[yaml.Node, int], above: set[yaml.Node]) -> int:
    """The number of nodes with all aliases written out."""
    if node in above:
        raise ValueError("an alias refers to a value that contains it")
    if node not in counted:
        above.add(node)
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        pieces = [piece for each in inner for piece in (each if isinstance(each, tuple) else (each,))]
        if node.tag in _NUMBERS and len(node.value) > LONGEST_YAML_NUMBER:
            raise ValueError(f"a number has more than {LONGEST_YAML_NUMBER} characters")
        counted[node] = 1 + sum(_expanded(piece, counted=counted, above=above) for piece in pieces)
        above.remove(node)
    return counted[node]
