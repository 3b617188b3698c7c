"""Tool calls in a model's text: how each kind of model writes them, read as they come, and the grammar that forces them.

In: a chat template, the tools of a request, an answer's text in pieces. Out: the text that is none of a call, and the calls in
OpenAI's form. A model writes calls as JSON objects with a name and arguments between marks; kinds of models differ in the
marks, so a kind is a row of a table here. Knows no HTTP.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# The calls that a forced answer may have at the most, where more than one is allowed.
MAX_FORCED_CALLS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """How a kind of model writes tool calls.

    Args:
        begin: what calls begin with; also how the kind is known by its chat template.
        end: what a call ends with, if anything.
        separator: what stands between `begin` and a call, and between a call and `end`, when the server writes the grammar.
        is_list: calls stand in one list, rather than each between marks of its own.
        id_prefix, id_length: of the ids of calls.
    """

    begin: str
    end: str
    separator: str
    is_list: bool
    id_prefix: str
    id_length: int

    def new_id(self) -> str:
        """An id that no other call has."""
        letters = random.SystemRandom().choices(string.ascii_letters + string.digits, k=self.id_length)
        return self.id_prefix + "".join(letters)

    def grammar(
        self, tools: Sequence[tuple[str, Mapping[str, Any]]], special: Mapping[str, int], *, parallel: bool
    ) -> str:
        """A grammar (llguidance's Lark) of one call or, in parallel, several.

        Args:
            tools: name and parameters' schema of each tool that may be called.
            special: token ids of the marks that have no text.
        """

        def mark(text: str) -> str:
            return f"<[{special[text]}]>" if text in special else json.dumps(text)

        between = json.dumps(self.separator)
        more = f"{{0,{MAX_FORCED_CALLS - 1}}}"
        if self.is_list:
            rest = f' (", " call){more}' if parallel else ""
            rules = [f'start: {mark(self.begin)} {between} "[" call{rest} "]"']
        else:
            whole = f"{mark(self.begin)} {between} call {between} {mark(self.end)}"
            rules = [f'start: one ("\\n" one){more}' if parallel else "start: one", f"one: {whole}"]
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        for i, (name, schema) in enumerate(tools):
            head = f'{{"name": {json.dumps(name)}, "arguments": '
            rules += [f'call_{i}: {json.dumps(head)} arguments_{i} "}}"', f"arguments_{i}: %json {json.dumps(schema)}"]
        return "\n".join(rules)


FORMATS: dict[str, ToolFormat] = {
    # Qwen, Hermes, SmolLM2, SmolLM3, ...
    "hermes": ToolFormat(
        begin="<tool_call>", end="</tool_call>", separator="\n", is_list=False, id_prefix="call_", id_length=24
    ),
    # Mixtral, Mistral; their templates take ids of nine letters and digits only
    "mistral": ToolFormat(begin="[TOOL_CALLS]", end="", separator=" ", is_list=True, id_prefix="", id_length=9),
}


def format_of(template: str) -> ToolFormat | None:
    """How the model of a chat template writes calls, as far as the template shows it."""
    return next((each for each in FORMATS.values() if each.begin in template), None)


@dataclass(kw_only=True, slots=True)
class CallDelta:
    """What is added to the call number `index`: its id and name at first, then its arguments in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Piece:
    """What a piece of a model's text comes to."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_DECODER = json.JSONDecoder()


class ToolCallReader:
    """Reads one answer, in pieces of any size; the results add up to the same however it was cut.

    A call begins to be given out as soon as its name is known, and its arguments as they come. What begins like a call but is
    none is text.

    Args:
        parallel: whether there may be more than one call; if not, those after the first are left out.
    """

    def __init__(self, tool_format: ToolFormat, *, parallel: bool = True) -> None:
        self._format = tool_format
        self._parallel = parallel
        self._state: str = "text"  # or "head", before a call; "arguments"; "tail", after them
        self._held = ""
        self._since_begin = ""  # what has been taken since the mark; text, if no call comes of it
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.num_calls = 0
        self._found_in_block = False
        self._after_call = False

    def push(self, text: str) -> Piece:
        """What is certain now."""
        self._held += text
        piece = Piece()
        while self._advance(piece):
            pass
        return piece

    def flush(self) -> Piece:
        """What was held back: the answer has ended."""
        piece = Piece()
        if self._state == "head" and not self._found_in_block:
            self._add_text(piece, self._format.begin + self._since_begin + self._held)
        elif self._state == "text":
            self._add_text(piece, self._held)
        self._held = ""
        return piece

    def _advance(self, piece: Piece) -> bool:
        """One step on; false if more text is needed for it."""
        if self._state == "text":
            return self._read_text(piece)
        if self._state == "head":
            return self._read_head(piece)
        return self._read_object(piece)

    def _read_text(self, piece: Piece) -> bool:
        before, mark, after = self._held.partition(self._format.begin)
        if mark:
            self._add_text(piece, before)
            self._held, self._state, self._found_in_block, self._since_begin = after, "head", False, ""
            return True
        held = next(
            (
                n
                for n in range(min(len(before), len(self._format.begin) - 1), 0, -1)
                if self._format.begin.startswith(before[-n:])
            ),
            0,
        )
        self._add_text(piece, before[: len(before) - held])
        self._held = before[len(before) - held :]
        return False

    def _read_head(self, piece: Piece) -> bool:
        stripped = self._held.lstrip()
        if not stripped:
            return False
        end = self._format.end
        if stripped[0] in "[,]":
            self._take(len(self._held) - len(stripped) + 1)
            # A list is all there is of a block that has no mark for its end
            if stripped[0] == "]" and not end:
                self._state = "text"
            return True
        if end and stripped.startswith(end):
            self._take(len(self._held) - len(stripped) + len(end))
            return self._leave(piece)
        if end and end.startswith(stripped):
            return False
        if stripped[0] != "{":
            return self._leave(piece)
        head = _HEAD.match(self._held)
        if head is not None:
            try:
                name = json.loads(head[1])
            except ValueError:
                return self._leave(piece)
            self._take(head.end())
            self._state, self._depth = "arguments", 0
            self._begin_call(piece, name)
            return True
        return self._read_whole(piece, stripped)

    def _read_whole(self, piece: Piece, stripped: str) -> bool:
        """A call whose parts come in another order is read when it is whole."""
        if "}" not in stripped:
            return False
        try:
            call, length = _DECODER.raw_decode(stripped)
        except (ValueError, RecursionError):
            return False
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if not isinstance(name, str):
            return self._leave(piece)
        self._take(len(self._held) - len(stripped) + length)
        self._begin_call(piece, name)
        text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
        self._add_arguments(piece, text)
        return True

    def _read_object(self, piece: Piece) -> bool:
        """The arguments up to their end, or what stands between that and the end of the call."""
        for position, letter in enumerate(self._held):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
                continue
            if letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    taken = self._take(position + 1)
                    if self._state == "arguments":
                        self._add_arguments(piece, taken)
                        self._state, self._depth = "tail", 1
                    else:
                        self._state = "head"
                    return True
        taken = self._take(len(self._held))
        if self._state == "arguments":
            self._add_arguments(piece, taken)
        return False

    def _leave(self, piece: Piece) -> bool:
        """There are no more calls here; if there were none, it was text."""
        if not self._found_in_block:
            self._add_text(piece, self._format.begin + self._since_begin)
        self._state = "text"
        return True

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        if not self._found_in_block:
            self._since_begin += taken
        return taken

    def _begin_call(self, piece: Piece, name: str) -> None:
        self._found_in_block = self._after_call = True
        self._since_begin = ""
        self.num_calls += 1
        if self._parallel or self.num_calls == 1:
            piece.calls.append(CallDelta(index=self.num_calls - 1, id=self._format.new_id(), name=name))

    def _add_arguments(self, piece: Piece, text: str) -> None:
        if text and (self._parallel or self.num_calls == 1):
            piece.calls.append(CallDelta(index=self.num_calls - 1, arguments=text))

    def _add_text(self, piece: Piece, text: str) -> None:
        if self._after_call:  # white space between calls says nothing
            text = text.lstrip()
        self._after_call = self._after_call and not text
        piece.content += text
