"""The engine's process with the real engine, whose steps can be made slow, or fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from knobs import Knobs

from perft_serve.engine.config import EngineConfig
from perft_serve.engine.engine import Engine
from perft_serve.engine.events import EngineRequest, TokenEvent
from perft_serve.engine.loop import run_process


class PacedEngine(Engine):
    """An engine with knobs."""

    def __init__(self, config: EngineConfig, wake: Callable[[], None], knobs: Knobs) -> None:
        self._knobs = knobs
        knobs.fail_start()
        super().__init__(config, wake)
        self._num_said: dict[str, int] = {}

    def submit(self, request: EngineRequest) -> None:
        refuse = self._knobs.read().refuse
        if refuse and request.prompt_ids == refuse:
            raise KeyError("a bug")
        super().submit(request)

    def step(self) -> list[TokenEvent]:
        settings = self._knobs.read()
        time.sleep(settings.pace)
        if settings.failure is not None:
            raise RuntimeError(settings.failure)
        events = super().step()
        if settings.say:
            return [self._say(event, settings.say) for event in events]
        if settings.spoil is None:
            return events
        for event in events:
            self.abort(event.request_id)
        return [replace(event, token_id=None, finish_reason="error", error=settings.spoil) for event in events]

    def _say(self, event: TokenEvent, tokens: tuple[int, ...]) -> TokenEvent:
        number = self._num_said.get(event.request_id, 0)
        self._num_said[event.request_id] = number + 1
        return replace(event, token_id=tokens[number] if number < len(tokens) else 0)


def main() -> int:
    knobs = Knobs(Path(sys.argv[1]))
    return run_process(sys.argv[2:], lambda config, wake: PacedEngine(config, wake, knobs))
