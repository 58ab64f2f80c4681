# %% right: a list of states
def loop(parts, tokens, num_steps, s):
    embedding, states = parts.prelude(tokens), [s]
    while len(states) <= num_steps:
        x = parts.adapter(torch.cat((states[-1], embedding), 2))
        for block in parts.core:
            x = block(x)
        states.append(x)
    return parts.coda(states[-1]), states[-1]


# %% right: one sequence after the other
def loop(parts, tokens, num_steps, s):
    results = []
    for text, state in zip(tokens, s, strict=True):
        text, state = text[None], state[None]
        e = parts.prelude(text)
        for _ in range(num_steps):
            both = torch.zeros(1, e.shape[1], 2 * e.shape[2], dtype=e.dtype)
            both[:, :, : e.shape[2]] = state
            both[:, :, e.shape[2] :] = e
            state = parts.adapter(both)
            for block in parts.core:
                state = block(state)
        results.append((parts.coda(state), state))
    logits, states = zip(*results, strict=True)
    return torch.cat(logits), torch.cat(states)


# %% right: recursive
def loop(parts, tokens, num_steps, s):
    e = parts.prelude(tokens)

    def after(k):
        if k == 0:
            return s
        x = parts.adapter(torch.cat([after(k - 1), e], dim=-1))
        for block in parts.core:
            x = block(x)
        return x

    last = after(num_steps)
    return parts.coda(last), last


# %% wrong: e in the first step only
# says: step 2 was not given e
def loop(parts, tokens, num_steps, s):
    e = parts.prelude(tokens)
    for step in range(num_steps):
        s = parts.adapter(torch.cat([s, e if step == 0 else torch.zeros_like(e)], dim=-1))
        for block in parts.core:
            s = block(s)
    return parts.coda(s), s


# %% wrong: e first
# says: e first and the state second
def loop(parts, tokens, num_steps, s):
    e = parts.prelude(tokens)
    for _ in range(num_steps):
        s = parts.adapter(torch.cat([e, s], dim=-1))
        for block in parts.core:
            s = block(s)
    return parts.coda(s), s


# %% wrong: the adapter once
# says: every step begins with it, the first one too
def loop(parts, tokens, num_steps, s):
    s = parts.adapter(torch.cat([s, parts.prelude(tokens)], dim=-1))
    for _ in range(num_steps):
        for block in parts.core:
            s = block(s)
    return parts.coda(s), s


# %% wrong: one step short
# says: the adapter ran 0 times in 1 steps
def loop(parts, tokens, num_steps, s):
    e = parts.prelude(tokens)
    for _ in range(1, num_steps):
        s = parts.adapter(torch.cat([s, e], dim=-1))
        for block in parts.core:
            s = block(s)
    return parts.coda(s), s


# %% wrong: the first block only
# says: every step goes through all of them once
def loop(parts, tokens, num_steps, s):
    e = parts.prelude(tokens)
    for _ in range(num_steps):
        s = parts.core[0](parts.adapter(torch.cat([s, e], dim=-1)))
    return parts.coda(s), s


# %% wrong: the state twice
# says: step 1 was not given e
def loop(parts, tokens, num_steps, s):
    parts.prelude(tokens)
    for _ in range(num_steps):
        s = parts.adapter(torch.cat([s, s], dim=-1))
        for block in parts.core:
            s = block(s)
    return parts.coda(s), s


# %% wrong: starts from zeros
# says: step 1 was not given the state that the loop shall start from
def loop(parts, tokens, num_steps, s):
    e = parts.prelude(tokens)
    s = torch.zeros_like(e)
    for _ in range(num_steps):
        s = parts.adapter(torch.cat([s, e], dim=-1))
        for block in parts.core:
            s = block(s)
    return parts.coda(s), s
