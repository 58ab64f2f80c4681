# %% right: two loops
def overtaken(admitted):
    times = {}
    for i in range(len(admitted)):
        times[admitted[i]] = 0
        for j in range(i):
            if admitted[j] > admitted[i]:
                times[admitted[i]] += 1
    return times


# %% right: a sorted list of those before
def overtaken(admitted):
    import bisect

    before, times = [], {}
    for id in admitted:
        times[id] = len(before) - bisect.bisect(before, id)
        bisect.insort(before, id)
    return times


# %% wrong: whom it overtook
# says: says whom each has overtaken
def overtaken(admitted):
    return {id: sum(other < id for other in admitted[place:]) for place, id in enumerate(admitted)}


# %% wrong: only the one just before
# says: 2 came before 0 and 1
def overtaken(admitted):
    return {id: int(i > 0 and admitted[i - 1] > id) for i, id in enumerate(admitted)}


# %% wrong: places moved
# says: count all that went before and arrived later
def overtaken(admitted):
    return {id: max(0, place - id) for place, id in enumerate(admitted)}


# %% wrong: everybody before
# says: in the order of arrival nobody is overtaken
def overtaken(admitted):
    return {id: place for place, id in enumerate(admitted)}


# %% wrong: only those that were
# says: every id must be there
def overtaken(admitted):
    times = {}
    for place, id in enumerate(admitted):
        n = sum(other > id for other in admitted[:place])
        if n:
            times[id] = n
    return times
