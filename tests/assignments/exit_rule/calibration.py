# %% right: sums while going along
def calibration(decode, problems, thresholds):
    rows = []
    for dial in thresholds:
        right = steps = count = 0
        for p, text in zip(problems, decode(problems, dial), strict=True):
            if p.is_correct(text.tokens):
                right += 1
            for position, depth in enumerate(text.depth):
                if position > 0:
                    steps, count = steps + depth, count + 1
        rows.append((dial, right / len(problems), steps / count))
    return rows


# %% right: tensors and lists
def calibration(decode, problems, thresholds):
    def row(t):
        gens = list(decode(problems, t))
        share = torch.tensor([float(p.is_correct(g.tokens)) for p, g in zip(problems, gens, strict=True)])
        depths = torch.cat([torch.tensor(g.depth[1:], dtype=torch.float64) for g in gens])
        return [t, share.double().mean().item(), depths.mean().item()]

    return [row(t) for t in thresholds]


# %% wrong: with the first tokens
# says: counts the first tokens
def calibration(decode, problems, thresholds):
    curve = []
    for threshold in thresholds:
        gens = decode(problems, threshold)
        right = sum(p.is_correct(g.tokens) for p, g in zip(problems, gens, strict=True))
        depths = [d for g in gens for d in g.depth]
        curve.append((threshold, right / len(problems), sum(depths) / len(depths)))
    return curve


# %% wrong: a mean of means
# says: is a mean of the texts' means
def calibration(decode, problems, thresholds):
    curve = []
    for threshold in thresholds:
        gens = decode(problems, threshold)
        right = sum(p.is_correct(g.tokens) for p, g in zip(problems, gens, strict=True))
        means = [sum(g.depth[1:]) / len(g.depth[1:]) for g in gens if len(g.depth) > 1]
        curve.append((threshold, right / len(problems), sum(means) / len(means)))
    return curve


# %% wrong: a count
# says: is a count; the share is the count by all problems
def calibration(decode, problems, thresholds):
    curve = []
    for threshold in thresholds:
        gens = decode(problems, threshold)
        right = sum(p.is_correct(g.tokens) for p, g in zip(problems, gens, strict=True))
        depths = [d for g in gens for d in g.depth[1:]]
        curve.append((threshold, right, sum(depths) / len(depths)))
    return curve


# %% wrong: the texts without an exit are the measure
# says: ask every problem
def calibration(decode, problems, thresholds):
    curve, full = [], decode(problems, thresholds[0])
    for threshold in thresholds:
        gens = decode(problems, threshold)
        same = sum(a.tokens == b.tokens for a, b in zip(full, gens, strict=True))
        depths = [d for g in gens for d in g.depth[1:]]
        curve.append((threshold, same / len(problems), sum(depths) / len(depths)))
    return curve


# %% wrong: depth of the right answers alone
# says: right or wrong
def calibration(decode, problems, thresholds):
    curve = []
    for threshold in thresholds:
        pairs = list(zip(problems, decode(problems, threshold), strict=True))
        right = [g for p, g in pairs if p.is_correct(g.tokens)]
        depths = [d for g in right for d in g.depth[1:]]
        curve.append((threshold, len(right) / len(problems), sum(depths) / len(depths)))
    return curve


# %% wrong: decodes twice
# says: once for each threshold is enough
def calibration(decode, problems, thresholds):
    curve = []
    for threshold in thresholds:
        right = sum(p.is_correct(g.tokens) for p, g in zip(problems, decode(problems, threshold), strict=True))
        depths = [d for g in decode(problems, threshold) for d in g.depth[1:]]
        curve.append((threshold, right / len(problems), sum(depths) / len(depths)))
    return curve
