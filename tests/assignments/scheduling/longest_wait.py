# %% right: all the work in front, shared by the slots
def longest_wait(ahead, patience, slots, longest):
    return (slots + ahead + patience) * longest / slots


# %% right: turn by turn
def longest_wait(ahead, patience, slots, longest):
    before, wait = ahead + patience, longest  # those that sit there now
    while before >= slots:
        before -= slots
        wait += longest
    return wait


# %% right: a little generous
def longest_wait(ahead, patience, slots, longest):
    return longest + math.ceil((ahead + patience) / slots) * longest


# %% wrong: nobody sits there
# says: somebody sits in the slot, and may just have begun
def longest_wait(ahead, patience, slots, longest):
    return math.ceil((ahead + patience) / slots) * longest


# %% wrong: without the patience
# says: four of those behind go first
def longest_wait(ahead, patience, slots, longest):
    return math.ceil((ahead + 1) / slots) * longest


# %% wrong: one slot
# says: is true, but of little use
def longest_wait(ahead, patience, slots, longest):
    return (ahead + patience + 1) * longest + longest * slots


# %% wrong: requests of half the length
# says: your bound is
def longest_wait(ahead, patience, slots, longest):
    return math.ceil((ahead + patience + 1) / slots) * longest / 2


# %% wrong: rounded down
# says: your bound is
def longest_wait(ahead, patience, slots, longest):
    return (ahead + patience + 1) // slots * longest


# %% wrong: for ever
# says: is true, but of little use
def longest_wait(ahead, patience, slots, longest):
    return math.inf
