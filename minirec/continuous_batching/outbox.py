"""What leaves the batching engine: tokens to their requests and to on_token, events to whoever runs the engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import repeat
from operator import itemgetter

from minirec.continuous_batching.requests import Event, Request, State
from minirec.continuous_batching.slots import Slot


class Outbox:
    """Hands tokens over: to their request, to its on_token, and as events.  Repeating what was cut changes nothing."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        # by (request, number of the token), so that an event which is repeated after an interrupt is still one event
        self.events: OrderedDict[tuple[int, int], Event] = OrderedDict()

    def hand_over(self, slot: Slot) -> None:
        """Give a slot's request the next token that is final, and end it if that is its last."""
        request, (number, token, depth) = slot.request, slot.drawn[0]
        if token < 0:  # what `TokenChoice.choose` makes of logits that are not finite
            position = len(request.prompt) + number - 1
            slot.error = FloatingPointError(f"logits are not finite at position {position}, after {depth} steps")
            return
        request.record(number, token, depth, self.clock())
        slot.report()
        if request.on_token is not None and len(slot.unheard) == len(slot.drawn):
            try:  # off the list and then the call, on one line: an interrupt finds neither done, or the call begun
                slot.stopped = request.on_token(slot.unheard.pop(0)) is False
            except Exception as raised:  # the caller's function: its request fails, and no other
                slot.error = raised
        finished = slot.stopped or token in request.stop_tokens or number + 1 == request.max_new_tokens
        finished = finished and slot.error is None
        self.events[request.id, number] = Event(request.id, token, depth, finished)
        if finished:
            self.end(request, State.FINISHED)
        elif slot.error is None:
            slot.drawn.pop(0)

    def end(self, request: Request, state: State, error: Exception | None = None) -> None:
        """End a request, unless it has ended."""
        if request.ended is None:
            now = self.clock()
            request.state, request.error, request.ended = state, error, now
        if request.state is state is not State.FINISHED:
            self.events[request.id, len(request.generation.tokens)] = Event(request.id, None, 0, True)

    def pop(self) -> Event:
        """Take out the oldest event."""
        return self.events.popitem(last=False)[1]

    def drain(self) -> list[Event]:
        """Take out all events, in one call of C's: an interrupt between two of them would lose the first."""
        return [*map(itemgetter(1), map(self.events.popitem, repeat(False, len(self.events))))]
