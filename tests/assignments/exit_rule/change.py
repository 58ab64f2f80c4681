# %% right: the angle
def change(old, new):
    a = old / old.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    b = new / new.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    return 2 * torch.asin((a - b).norm(dim=-1).clamp(max=2) / 2)


# %% right: mean of the channels, one token after the other
def change(old, new):
    result = torch.zeros(old.shape[:2], dtype=old.dtype)
    for b in range(old.shape[0]):
        for w in range(old.shape[1]):
            before, after = old[b, w], new[b, w]
            size = before.abs().mean() + after.abs().mean()
            if size > 0:
                result[b, w] = (after - before).abs().mean() / size
    return result


# %% right: the package's, without its trouble at zero
def change(old, new):
    moved = torch.linalg.vector_norm(new - old, dim=-1)
    return torch.where(moved > 0, moved / new.norm(dim=-1).clamp(min=1e-6), 0.0)


# %% wrong: not relative
# says: divide by the size of a state
def change(old, new):
    return (new - old).norm(dim=-1)


# %% wrong: signed
# says: Take the size of what changed, not its sign
def change(old, new):
    return (new - old).sum(dim=-1) / new.abs().sum(dim=-1).clamp(min=1e-9)


# %% wrong: lengths
# says: compare the states, not their lengths
def change(old, new):
    a, b = old.norm(dim=-1), new.norm(dim=-1)
    return (a - b).abs() / torch.maximum(a, b).clamp(min=1e-9)


# %% wrong: a likeness
# says: is that a likeness, not a change
def change(old, new):
    return torch.nn.functional.cosine_similarity(old, new, dim=-1)


# %% wrong: neighbours have a say
# says: depends on its neighbours in the window
def change(old, new):
    size = new.norm(dim=-1).mean(dim=1, keepdim=True)
    return (new - old).norm(dim=-1) / size.clamp(min=1e-9)


# %% wrong: the batch has a say
# says: depends on the other sequences of the batch
def change(old, new):
    size = new.norm(dim=-1).mean(dim=0, keepdim=True)
    return (new - old).norm(dim=-1) / size.clamp(min=1e-9)


# %% wrong: zeros
# says: guard the division
def change(old, new):
    return (new - old).norm(dim=-1) / new.norm(dim=-1)


# %% wrong: one number for all
# says: a number for every token
def change(old, new):
    return (new - old).norm() / new.norm().clamp(min=1e-9)


# %% wrong: of no use
# says: no threshold keeps the answers in half of the steps
def change(old, new):
    return (new - old)[..., 0].abs() / new.abs().amax(dim=-1).clamp(min=1e-9)
