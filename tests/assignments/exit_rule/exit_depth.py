# %% right: look back from every step
def exit_depth(changes, threshold, patience=1):
    for steps in range(patience, len(changes) + 1):
        if all(moved < threshold for moved in changes[steps - patience : steps]):
            return steps
    return len(changes)


# %% right: tensors
def exit_depth(changes, threshold, patience=1):
    below = (torch.tensor(changes) < threshold).long()
    run = torch.zeros_like(below)
    for i, calm in enumerate(below):
        run[i] = calm * (1 + (run[i - 1] if i else 0))
    found = (run >= patience).nonzero()
    return found[0].item() + 1 if len(found) else len(changes)


# %% right: a while loop
def exit_depth(changes, threshold, patience=1):
    step, since = 0, 0
    while step < len(changes) and since < patience:
        since = since + 1 if changes[step] < threshold else 0
        step += 1
    return step


# %% wrong: steps counted from 0
# says: steps count from 1
def exit_depth(changes, threshold, patience=1):
    calm = 0
    for step, moved in enumerate(changes):
        calm = calm + 1 if moved < threshold else 0
        if calm == patience:
            return step
    return len(changes)


# %% wrong: below or equal
# says: 0.1 is not below 0.1
def exit_depth(changes, threshold, patience=1):
    calm = 0
    for step, moved in enumerate(changes, 1):
        calm = calm + 1 if moved <= threshold else 0
        if calm == patience:
            return step
    return len(changes)


# %% wrong: settled for good
# says: the future is not known
def exit_depth(changes, threshold, patience=1):
    step = len(changes)
    while step > 0 and changes[step - 1] < threshold:
        step -= 1
    return min(step + patience, len(changes))


# %% wrong: not in a row
# says: in a row: a large change in between begins the count again
def exit_depth(changes, threshold, patience=1):
    calm = 0
    for step, moved in enumerate(changes, 1):
        calm += moved < threshold
        if calm == patience:
            return step
    return len(changes)


# %% wrong: the first of the calm steps
# says: it leaves after the last of them, not the first
def exit_depth(changes, threshold, patience=1):
    calm = 0
    for step, moved in enumerate(changes, 1):
        calm = calm + 1 if moved < threshold else 0
        if calm == patience:
            return step - patience + 1
    return len(changes)


# %% wrong: no answer if it never settles
# says: nothing is below 0.1, so all four steps are run
def exit_depth(changes, threshold, patience=1):
    calm = 0
    for step, moved in enumerate(changes, 1):
        calm = calm + 1 if moved < threshold else 0
        if calm == patience:
            return step
