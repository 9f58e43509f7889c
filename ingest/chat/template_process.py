"""Renders chat templates as a separate program, so that a template can only harm this process.

`sandbox` runs it with the limits as arguments. It imports Jinja and nothing of fuseline, so that it starts in a tenth of a second. Requests
arrive on standard input, and answers go to standard output: JSON, each after its length in 8 bytes.

    request   {program, variables, conversations, prompt}
    answers   for each conversation {text}, or {refused: the template's message}, or {memory: true}

The environment is that of transformers (`transformers.utils.chat_template_utils`).
`tests/unit/test_ingest_template_process.py` compares both.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_LENGTH_BYTES = 8
_PIECE_BYTES = 1 << 20
MEMORY = b'{"memory": true}'  # the answer if the memory limit is reached


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the model writes: its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012  # as the class above has it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Any) -> str:
        return caller()


class _Dict:
    """The part of `dict` that a template can use."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja's own, so that `self` may be a name
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(
                f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. Please rename the attribute."
            )


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache
def compiled(program: str) -> jinja2.Template:
    """A template in the environment of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),  # noqa: A006  # templates may name the argument
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(program)


def _rendered(request: dict[str, Any], conversation: list[dict[str, str]]) -> bytes:
    try:
        text = compiled(request["program"]).render(
            messages=conversation, tools=None, documents=None, add_generation_prompt=request["prompt"], **request["variables"]
        )
        return json.dumps({"text": text}).encode()
    except MemoryError:
        return MEMORY
    except Exception as error:  # templates and Jinja raise any exception
        return json.dumps({"refused": str(error).splitlines()[0] if str(error) else type(error).__name__}).encode()


def read_frame(stream: Any, *, most: int | None = None) -> bytes:
    """The next message; empty at the end, and if the other side ended in the middle of one.

    Raises:
        OverflowError: it has more than `most` bytes.
    """
    n_bytes = int.from_bytes(_read(stream, _LENGTH_BYTES), "little")
    if most is not None and n_bytes > most:
        raise OverflowError(n_bytes)
    return _read(stream, n_bytes)


def _read(stream: Any, n_bytes: int) -> bytes:
    pieces = []
    while n_bytes:
        piece = stream.read(min(n_bytes, _PIECE_BYTES))
        if not piece:
            return b""
        pieces.append(piece)
        n_bytes -= len(piece)
    return b"".join(pieces)


def write_frame(stream: Any, data: bytes) -> None:
    """Write a message."""
    left = memoryview(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
    while left:
        left = left[stream.write(left) :]
    stream.flush()


def main(seconds: int, n_bytes: int) -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; this process ends with it
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        with contextlib.suppress(OSError, ValueError):  # macOS has them but cannot set them
            resource.setrlimit(kind, (n_bytes, n_bytes))
    while data := read_frame(sys.stdin.buffer):
        request = json.loads(data)
        for conversation in request["conversations"]:
            signal.alarm(seconds)  # ends this process, even inside one long step, and after the parent's end
            answer = _rendered(request, conversation)
            signal.alarm(0)
            write_frame(sys.stdout.buffer, answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
