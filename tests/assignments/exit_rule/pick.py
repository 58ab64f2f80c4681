# %% right: from the shallowest on
def pick(curve, loss):
    full = {threshold: share for threshold, share, _ in curve}[0]
    for threshold, share, _ in sorted(curve, key=lambda row: row[2]):
        if full - share <= loss + 1e-6:
            return threshold


# %% right: the best so far
def pick(curve, loss):
    for row in curve:
        if row[0] == 0:
            best, limit = row, row[1] - loss
    for row in curve:
        if (row[1] > limit or abs(row[1] - limit) < 1e-9) and row[2] < best[2]:
            best = row
    return best[0]


# %% wrong: most right answers
# says: 0.2 loses 0.02 and saves most
def pick(curve, loss):
    return max(curve, key=lambda row: row[1])[0]


# %% wrong: counted from the best row
# says: the loss is counted from threshold 0
def pick(curve, loss):
    best = max(share for _, share, _ in curve)
    good = [(depth, t) for t, share, depth in curve if share >= best - loss - 1e-9]
    return min(good)[1]


# %% wrong: stops at the first that loses too much
# says: the curve is not monotone
def pick(curve, loss):
    rows = sorted(curve)
    chosen = 0
    for threshold, share, _ in rows:
        if share < rows[0][1] - loss - 1e-9:
            break
        chosen = threshold
    return chosen


# %% wrong: the largest threshold
# says: least depth, not largest threshold
def pick(curve, loss):
    full = next(share for t, share, _ in curve if t == 0)
    return max(t for t, share, _ in curve if share >= full - loss - 1e-9)


# %% wrong: the first row for threshold 0
# says: the rows come in any order
def pick(curve, loss):
    good = [(depth, t) for t, share, depth in curve if share >= curve[0][1] - loss - 1e-9]
    return min(good)[1] if curve[0][0] == 0 else curve[0][0]


# %% wrong: a ratio
# says: the loss is a difference, not a ratio
def pick(curve, loss):
    full = next(share for t, share, _ in curve if t == 0)
    return min((depth, t) for t, share, depth in curve if share >= full * (1 - loss))[1]


# %% wrong: rounding
# says: up to rounding
def pick(curve, loss):
    full = next(share for t, share, _ in curve if t == 0)
    return min((depth, t) for t, share, depth in curve if full - share <= loss)[1]
