# %% right: when each position starts
def passes_needed(guesses, r):
    table = list(zip(*guesses, strict=True))  # one tuple a position
    begin = r
    for t, said in enumerate(table):
        if t == len(table) - 1:
            return begin + r
        wrong = [k for k in range(r) if said[k] != said[-1]]
        begin += wrong[-1] + 2 if wrong else 1
    return begin


# %% right: tensors
def passes_needed(guesses, r):
    words = sorted({word for row in guesses for word in row}, key=str)
    table = torch.tensor([[words.index(word) for word in row] for row in guesses]).view(r, -1)
    if table.shape[1] == 0:
        return r
    stands = (table == table[-1]).flip(0).long().cumprod(0).sum(0)  # for how many rows, from below
    return r + (r + 1 - stands)[:-1].sum().item() + r


# %% right: counts the cells of a wave
def passes_needed(guesses, r):
    passes, left = r, len(guesses[0])
    for t in range(left):
        steps = 0
        while steps < r:
            steps += 1
            passes += 1
            last = t == left - 1
            if not last and all(guesses[k][t] == guesses[-1][t] for k in range(steps - 1, r)):
                break
    return passes


# %% wrong: the first time it is right
# says: it stays right from step 3 on
def passes_needed(guesses, r):
    total, n = r, len(guesses[0])
    for t in range(n - 1):
        total += next(k for k in range(r) if guesses[k][t] == guesses[r - 1][t]) + 1
    return total + r if n else total


# %% wrong: without the prompt
# says: 3 passes for the prompt, 3 for it
def passes_needed(guesses, r):
    total, n = 0, len(guesses[0])
    for t in range(n - 1):
        settled = r
        while settled > 1 and guesses[settled - 2][t] == guesses[r - 1][t]:
            settled -= 1
        total += settled
    return total + r


# %% wrong: the last position too
# says: its row does not matter
def passes_needed(guesses, r):
    total, n = r, len(guesses[0])
    for t in range(n):
        settled = r
        while settled > 1 and guesses[settled - 2][t] == guesses[r - 1][t]:
            settled -= 1
        total += settled - (1 if t == n - 1 else 0)
    return total + r


# %% wrong: autoregressive
# says: then 1 until the next position starts
def passes_needed(guesses, r):
    return r + r * len(guesses[0])


# %% wrong: one for each wrong guess
# says: the second is right at step 1, and then not
def passes_needed(guesses, r):
    total, n = r, len(guesses[0])
    for t in range(n - 1):
        total += 1 + sum(guesses[k][t] != guesses[r - 1][t] for k in range(r))
    return total + r if n else total
