"""The process that runs what comes with a checkpoint: its chat template, and a tokenizer that could take for ever.

A request is a line of JSON on standard input, `{"run": NAME, "program": DIGEST, "seconds": LIMIT, ...}`, and so is its
answer on standard output, `{"found": ...}` or `{"refused": REASON}`. What takes too much processor time is ended by the
system, and what takes too much memory gets none.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from loopscope.errors import one_line

MEMORY = 2 * 2**30
"""Bytes of address space."""


def main() -> None:
    """Until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    programs: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            # Its default action ends the process, whatever it is doing, also where Python would not come to look.
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            answer = {"found": _answer(request, programs)}
        except TemplateError as error:  # its own words
            answer = {"refused": (str(error).splitlines() or ["it is no template"])[0].rstrip(".")}
        except BaseException as error:
            answer = {"refused": one_line(error)}
        content = json.dumps(answer).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(content)
        answers.flush()


def _answer(request: dict[str, Any], programs: dict[str, Any]) -> Any:
    run, digest = request["run"], request["program"]
    if "content" in request:
        make: Callable[[Any], Any] = _tokenizer if run != "render" else lambda content: content
        programs[digest] = make(request["content"])
    arguments = request["arguments"]
    if run == "render":
        return _render(programs[digest], **arguments)
    tokenizer: Tokenizer = programs[digest]
    if run == "decode":
        return tokenizer.decode(arguments["ids"], skip_special_tokens=arguments["skip_special_tokens"])
    if run == "ids":
        return [each.ids for each in tokenizer.encode_batch(arguments["texts"], add_special_tokens=False)]
    found = tokenizer.encode(arguments["text"], add_special_tokens=arguments["add_special_tokens"])
    return found.ids, found.tokens, found.offsets, found.special_tokens_mask


def _tokenizer(content: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for fields in content["added"]:
        token = AddedToken(**fields)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def _render(content: dict[str, Any], turns: list[dict[str, str]], now: tuple[str, float, str]) -> str:
    written, offset, zone = now
    date = datetime.fromisoformat(written).replace(tzinfo=timezone(timedelta(seconds=offset), zone))
    # Compiled here, as that works out what is constant.
    return _compiled(content["source"]).render(
        messages=turns,
        tools=None,
        documents=None,
        # An assistant's last turn is one that it goes on with.
        add_generation_prompt=turns[-1]["role"] != "assistant",
        strftime_now=date.strftime,
        **content["variables"],
    )


def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(source)


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the assistant's turns for training; what is between is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
