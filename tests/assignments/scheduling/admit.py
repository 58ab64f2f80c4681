# %% right: the head of the line, once its patience is used up
def admit(waiting, passed, patience):
    head = waiting[0]
    if passed[head.id] == patience:
        return head
    best = head
    for request in waiting:
        if request.work < best.work:
            best = request
    return best


# %% right: ageing
def admit(waiting, passed, patience):
    allowed = []
    for request in waiting:
        allowed.append(request)
        if passed[request.id] >= patience:
            break

    def urgency(request):  # being passed over makes a request seem shorter
        return request.work * (1 - passed[request.id] / (patience + 1))

    return sorted(allowed, key=urgency)[0]


# %% right: two classes
def admit(waiting, passed, patience):
    tired = [request for request in waiting if passed[request.id] >= patience]
    if tired:
        return tired[0] if tired[0] is waiting[0] else waiting[0]
    short = [request for request in waiting if request.work <= 8]
    return (short or waiting)[0]


# %% wrong: shortest first
# says: with patience 0: it waited
def admit(waiting, passed, patience):
    return min(waiting, key=lambda request: request.work)


# %% wrong: once too often
# says: with patience 0: it waited
def admit(waiting, passed, patience):
    if passed[waiting[0].id] > patience:
        return waiting[0]
    return min(waiting, key=lambda request: request.work)


# %% wrong: one of those passed over may be passed again
# says: may not be overtaken once more, by anybody
def admit(waiting, passed, patience):
    tired = [request for request in waiting if passed[request.id] >= patience]
    return min(tired or waiting, key=lambda request: (request.work, request.id))


# %% wrong: every so often the oldest
# says: may not be overtaken once more, by anybody
def admit(waiting, passed, patience):
    total = sum(passed.values())
    if total % (patience + 1) == patience or patience == 0:
        return waiting[0]
    return min(waiting, key=lambda request: request.work)


# %% wrong: first come, first served
# says: fair, but of no use
def admit(waiting, passed, patience):
    return waiting[0]


# %% wrong: the id
# says: it must be one of the Requests
def admit(waiting, passed, patience):
    return waiting[0].id


# %% wrong: longest first
# says: fair, but of no use
def admit(waiting, passed, patience):
    if passed[waiting[0].id] >= patience:
        return waiting[0]
    return max(waiting, key=lambda request: request.work)
