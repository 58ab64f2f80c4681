# %% right: pairs
def standing(tokens, guesses):
    count = 1
    for guess, token in zip(guesses, tokens[1:], strict=False):
        if guess != token:
            break
        count += 1
    return count


# %% right: recursive
def standing(tokens, guesses):
    if len(tokens) == 1 or guesses[0] != tokens[1]:
        return 1
    return 1 + standing(tokens[1:], guesses[1:])


# %% wrong: counts what agrees
# says: B says X, but C stands there: A and B stand
def standing(tokens, guesses):
    return 1 + sum(guess == token for guess, token in zip(guesses, tokens[1:], strict=False))


# %% wrong: compares a position with its own guess
# says: every guess is what stands to its right
def standing(tokens, guesses):
    for i, (guess, token) in enumerate(zip(guesses, tokens, strict=True)):
        if guess != token:
            return max(1, i)
    return len(tokens)


# %% wrong: one too few
# says: B says X, but C stands there
def standing(tokens, guesses):
    for i in range(1, len(tokens)):
        if guesses[i - 1] != tokens[i]:
            return i - 1
    return len(tokens)


# %% wrong: one too many
# says: A and B stand
def standing(tokens, guesses):
    for i in range(1, len(tokens)):
        if guesses[i - 1] != tokens[i]:
            return i + 1
    return len(tokens)


# %% wrong: the last disagreement
# says: whatever stands on it goes, too
def standing(tokens, guesses):
    bad = [i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]]
    return bad[-1] if bad else len(tokens)
