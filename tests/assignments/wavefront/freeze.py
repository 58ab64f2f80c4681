# %% right: index of the first that does not
def freeze(settled, kept):
    return [a and b for a, b in zip(settled, kept, strict=True)].index(False) if not all(settled + kept) else len(kept)


# %% right: a for loop
def freeze(settled, kept):
    n = 0
    for calm, same in zip(settled, kept, strict=True):
        if not calm or not same:
            break
        n += 1
    return n


# %% right: the package's
def freeze(settled, kept):
    return diffusion_forcing.leading([a and b for a, b in zip(settled, kept, strict=True)], "prefix")


# %% wrong: all that are settled
# says: what stands behind it may still change
def freeze(settled, kept):
    return sum(a and b for a, b in zip(settled, kept, strict=True))


# %% wrong: up to the last one that is settled
# says: what stands behind it may still change
def freeze(settled, kept):
    return max((i for i, (a, b) in enumerate(zip(settled, kept, strict=True), 1) if a and b), default=0)


# %% wrong: a token that changed
# says: changed in this very pass
def freeze(settled, kept):
    return (settled + [False]).index(False)


# %% wrong: all or nothing
# says: the first two are settled, the third is not
def freeze(settled, kept):
    return len(settled) if all(settled) and all(kept) else 0


# %% wrong: one at a time
# says: the first two are settled
def freeze(settled, kept):
    return int(settled[0] and kept[0])
