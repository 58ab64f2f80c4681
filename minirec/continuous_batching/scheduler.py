"""The policy of the batching engine: who is admitted, and who is in the next pass.  Nothing here touches a tensor."""

from __future__ import annotations

from collections import OrderedDict

from minirec.continuous_batching.requests import Request, Stage, State
from minirec.continuous_batching.slots import Slot

MODES = ("static", "sequence", "depth", "wavefront")
POLICIES = ("fcfs", "prefill_first")


class Scheduler:
    """Admits requests to slots and chooses the slots of each pass.

    "fcfs": requests are admitted in the order of arrival, and prompts share passes with tokens.  "prefill_first": while
    a prompt is being read, decoding slots sit out, for at most `patience` passes in a row.
    """

    def __init__(self, mode: str, policy: str, slots: int, kv_budget: int | None, coda_batch: int, patience: int):
        self.mode, self.policy, self.slots = mode, policy, slots
        self.kv_budget, self.coda_batch, self.patience = kv_budget, coda_batch, patience
        self.waiting: OrderedDict[int, Request] = OrderedDict()  # by id: cancelling one takes constant time
        self.filling = False  # a static batch, before it starts

    def admit(self, busy: list[Slot]) -> Request | None:
        """The next request to take a free slot, or None; it stays in line until its state is no longer WAITING.

        The first in line is never passed over, so no request starves.
        """
        while self.waiting and (first := next(iter(self.waiting.values()))).state is not State.WAITING:
            self.waiting.pop(first.id)
        if not self.waiting or len(busy) == self.slots or (self.mode == "static" and busy and not self.filling):
            self.filling = False
            return None
        promised = sum(slot.request.kv_bytes for slot in busy)
        if self.kv_budget is not None and promised + first.kv_bytes > self.kv_budget:
            return None
        self.filling = True
        return first

    def choose(self, busy: list[Slot]) -> tuple[Stage, list[Slot]]:
        """The queue of the next pass, and the slots in it."""
        if self.policy == "prefill_first" and any(s.request.state is State.PREFILL for s in busy):
            busy = [s for s in busy if s.request.state is State.PREFILL or s.sat_out >= self.patience]
        queues = {stage: [s for s in busy if s.stage is stage] for stage in Stage}
        if self.mode in ("static", "sequence"):  # lockstep: nobody moves on before all have come as far
            order, enough = (Stage.PRELUDE, Stage.RECUR, Stage.CODA), 1
        else:  # coda first: it completes tokens and frees slots
            order, enough = (Stage.CODA, Stage.PRELUDE, Stage.RECUR), min(self.coda_batch, len(busy))
        for stage in order:
            if len(queues[stage]) >= (enough if stage is not Stage.RECUR else 1):
                return stage, queues[stage]
        stage = max(order, key=lambda s: len(queues[s]))  # too few in each queue, and no slot is looping
        return stage, queues[stage]

    def widest(self, sharing: int, row_budget: int) -> int:
        """Width against breadth: how wide a wave may be when `sharing` slots share a pass of `row_budget` cells.

        A lossless wave gets a share among the busy slots.  The output of diffusion forcing depends on its width, so
        its share is among all slots, busy or not.
        """
        return max(1, row_budget // max(1, sharing))
