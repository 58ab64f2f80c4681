# %% right: the fullest queue for its price
def next_queue(seats, slots, patience):
    for seat in sorted(seats, key=lambda seat: -seat.waited):
        if seat.waited >= patience:
            return seat.stage
    queues = {}
    for seat in seats:
        queues.setdefault(seat.stage, []).append(seat)
    if "loop" not in queues:
        return max(queues, key=lambda stage: len(queues[stage]))
    for stage in ("prelude", "coda"):
        if len(queues.get(stage, [])) >= 5:
            return stage
    return "loop"


# %% right: a little less patient than it may be
def next_queue(seats, slots, patience):
    stages = [seat.stage for seat in seats]
    oldest = max(range(len(seats)), key=lambda i: seats[i].waited)
    if seats[oldest].waited >= max(1, patience - 1):
        return stages[oldest]
    if stages.count("coda") > slots // 4:
        return "coda"
    if stages.count("prelude") > slots // 4:
        return "prelude"
    return "loop" if "loop" in stages else stages[oldest]


# %% wrong: the package's order, at once
# says: costs 100% of what running every coda and prelude at once costs
def next_queue(seats, slots, patience):
    return next(stage for stage in ("coda", "prelude", "loop") if any(seat.stage == stage for seat in seats))


# %% wrong: waits for the batch, however long
# says: Who has waited `patience` passes comes first
def next_queue(seats, slots, patience):
    count = {stage: sum(seat.stage == stage for seat in seats) for stage in ("coda", "prelude", "loop")}
    for stage in ("coda", "prelude"):
        if count[stage] >= slots / 2:
            return stage
    return "loop" if count["loop"] else max(count, key=count.get)


# %% wrong: an empty queue
# says: nobody stands there
def next_queue(seats, slots, patience):
    slowest = max(seats, key=lambda seat: seat.waited)
    if slowest.waited >= patience:
        return slowest.stage
    for stage in ("coda", "prelude"):
        if sum(seat.stage == stage for seat in seats) >= slots / 3:
            return stage
    return "loop"


# %% wrong: fair, in turns
# says: fair, but of no use
def next_queue(seats, slots, patience):
    return max(seats, key=lambda seat: seat.waited).stage


# %% wrong: only the coda has patience
# says: a seat in the prelude has waited
def next_queue(seats, slots, patience):
    if any(seat.waited >= patience and seat.stage == "coda" for seat in seats):
        return "coda"
    count = {stage: sum(seat.stage == stage for seat in seats) for stage in ("coda", "prelude", "loop")}
    for stage in ("coda", "prelude"):
        if count[stage] >= slots / 2:
            return stage
    return "loop" if count["loop"] else max(count, key=count.get)


# %% wrong: too patient
# says: Who has waited `patience` passes comes first
def next_queue(seats, slots, patience):
    slowest = max(seats, key=lambda seat: seat.waited)
    if slowest.waited >= patience + 3:
        return slowest.stage
    count = {stage: sum(seat.stage == stage for seat in seats) for stage in ("coda", "prelude", "loop")}
    for stage in ("coda", "prelude"):
        if count[stage] >= slots / 3:
            return stage
    return "loop" if count["loop"] else max(count, key=count.get)


# %% wrong: another word for it
# says: it must be 'prelude', 'loop' or 'coda'
def next_queue(seats, slots, patience):
    return max(seats, key=lambda seat: seat.waited).stage.upper()
