# %% right: all rows at once, and a mask
def objective(model, tokens, labels, depths, backprop, state):
    e, s = model.prelude(tokens), state
    for step in range(int(depths.max())):
        started = (step < depths)[:, None, None]  # (B, 1, 1)
        graph = (step >= depths - backprop)[:, None, None]
        new = model.recur(s, torch.where(graph, e, e.detach()))
        s = torch.where(started, torch.where(graph, new, new.detach()), s)
    return F.cross_entropy(model.coda(s).transpose(1, 2), labels)


# %% right: detached, and summed label by label
def objective(model, tokens, labels, depths, backprop, state):
    total, count = 0.0, 0
    for b in range(len(tokens)):
        depth = depths[b].item()
        e, s = model.prelude(tokens[b][None]), state[b][None]
        for step in range(depth):
            s = model.recur(s, e)
            if step == depth - backprop - 1:
                s = s.detach()
        log_p = model.coda(s)[0].log_softmax(-1)  # (T, V)
        for t, label in enumerate(labels[b].tolist()):
            if label != -100:
                total, count = total - log_p[t, label], count + 1
    return total / count


# %% right: the deepest first, all end together
def objective(model, tokens, labels, depths, backprop, state):
    order = torch.argsort(depths, descending=True)
    tokens, labels, depths, state = tokens[order], labels[order], depths[order], state[order]
    e, s = model.prelude(tokens), state[:0]
    for left in range(depths[0].item(), 0, -1):
        n = (depths >= left).sum().item()
        s = torch.cat([s, state[len(s) : n]])
        if left > backprop:
            with torch.no_grad():
                s = model.recur(s, e[:n])
        else:
            s = model.recur(s, e[:n])
    wanted = labels != -100
    return F.cross_entropy(model.coda(s)[wanted], labels[wanted])


# %% wrong: no cut
# says: the gradients flow through all steps
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for _ in range(depth):
            s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)


# %% wrong: the first steps have the graph
# says: They are the last `backprop` of each row
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for step in range(depth):
            with torch.set_grad_enabled(step < backprop):
                s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)


# %% wrong: one step too few has a graph
# says: one step too few has a graph
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for left in range(depth, 0, -1):
            with torch.set_grad_enabled(left < backprop):
                s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)


# %% wrong: as deep as the deepest
# says: row b runs depths[b] steps
def objective(model, tokens, labels, depths, backprop, state):
    e, s = model.prelude(tokens), state
    for left in range(depths.max().item(), 0, -1):
        with torch.set_grad_enabled(left <= backprop):
            s = model.recur(s, e)
    return F.cross_entropy(model.coda(s).flatten(0, 1), labels.flatten(), ignore_index=-100)


# %% wrong: only the last steps are run
# says: those before are run, too
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for _ in range(min(depth, backprop)):
            s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)


# %% wrong: a mean of means
# says: that is the mean of the rows' means
def objective(model, tokens, labels, depths, backprop, state):
    losses = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for left in range(depth, 0, -1):
            with torch.set_grad_enabled(left <= backprop):
                s = model.recur(s, e)
        losses.append(F.cross_entropy(model.coda(s)[0], labels[row], ignore_index=-100))
    return torch.stack(losses).mean()


# %% wrong: shifted twice
# says: they are shifted already
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for left in range(depth, 0, -1):
            with torch.set_grad_enabled(left <= backprop):
                s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


# %% wrong: the prelude without its graph
# says: the prelude gets no gradient
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        with torch.no_grad():
            e = model.prelude(tokens[row : row + 1])
        s = state[row : row + 1]
        for left in range(depth, 0, -1):
            with torch.set_grad_enabled(left <= backprop):
                s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)


# %% wrong: a number without a graph
# says: the loss has no graph
@torch.no_grad()
def objective(model, tokens, labels, depths, backprop, state):
    logits = []
    for row, depth in enumerate(depths.tolist()):
        e, s = model.prelude(tokens[row : row + 1]), state[row : row + 1]
        for _ in range(depth):
            s = model.recur(s, e)
        logits.append(model.coda(s))
    return F.cross_entropy(torch.cat(logits).flatten(0, 1), labels.flatten(), ignore_index=-100)
