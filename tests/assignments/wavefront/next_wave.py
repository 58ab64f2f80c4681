# %% right: looks only when a position leaves
def next_wave(tokens, depths, guesses, r, room):
    tokens, depths = list(tokens), list(depths)
    last = guesses[-1]
    if depths[0] == r:
        if len(tokens) > 1 and tokens[1] == guesses[0]:
            tokens.pop(0), depths.pop(0)
        else:
            return [guesses[0]], [0]
    if len(tokens) < room:
        tokens.append(last)
        depths.append(0)
    return tokens, depths


# %% right: waits for the second guess
def next_wave(tokens, depths, guesses, r, room):
    positions = [{"token": t, "depth": d, "says": g} for t, d, g in zip(tokens, depths, guesses, strict=True)]
    standing = [positions[0]]
    for position in positions[1:]:
        if position["token"] != standing[-1]["says"]:
            break
        standing.append(position)
    says = standing[-1]["says"]
    if standing[0]["depth"] == r:
        del standing[0]
    if not standing or (standing[-1]["depth"] >= 2 and len(standing) < room):
        standing.append({"token": says, "depth": 0})
    return [p["token"] for p in standing], [p["depth"] for p in standing]


# %% right: the package's
package = lossless_wavefront.next_wave


def next_wave(tokens, depths, guesses, r, room):
    return package(tokens, depths, guesses, r, 1, room)


# %% right: a pass of its own for a wrong guess
def next_wave(tokens, depths, guesses, r, room):
    wrong = [i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]]
    stay = wrong[0] if wrong else len(tokens)
    leave = int(depths[0] == r)
    kept, ran = tokens[leave:stay], depths[leave:stay]
    if not kept or (not wrong and len(kept) < room):
        kept, ran = kept + [guesses[stay - 1]], ran + [0]
    return kept, ran


# %% wrong: nobody ever goes
# says: has become final, but the position behind it runs on
def next_wave(tokens, depths, guesses, r, room):
    leave = int(depths[0] == r)
    tokens, depths = tokens[leave:], depths[leave:]
    if len(tokens) < room:
        tokens, depths = tokens + guesses[-1:], depths + [0]
    return tokens, depths


# %% wrong: opens on what one that has gone says
# says: the last that stays, says now
def next_wave(tokens, depths, guesses, r, room):
    stay = next((i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]), len(tokens))
    leave = int(depths[0] == r)
    tokens, depths = tokens[leave:stay], depths[leave:stay]
    if len(tokens) < room:
        tokens, depths = tokens + guesses[-1:], depths + [0]
    return tokens, depths


# %% wrong: nobody leaves
# says: deep and leaves; the wave that you return begins with its right neighbour
def next_wave(tokens, depths, guesses, r, room):
    stay = next((i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]), len(tokens))
    tokens, depths = tokens[:stay], depths[:stay]
    if len(tokens) < room:
        tokens, depths = tokens + [guesses[stay - 1]], depths + [0]
    return tokens, depths


# %% wrong: begins anew, and those behind it stay
# says: what stands on it goes, too
def next_wave(tokens, depths, guesses, r, room):
    tokens, depths = list(tokens), list(depths)
    for i in range(1, len(tokens)):
        if guesses[i - 1] != tokens[i]:
            tokens[i], depths[i] = guesses[i - 1], 0
            break
    says = guesses[-1]
    if depths[0] == r:
        tokens, depths = tokens[1:], depths[1:]
    if len(tokens) < room:
        tokens, depths = tokens + [says], depths + [0]
    return tokens, depths


# %% wrong: another token, the same depth
# says: who comes, or gets another token, begins at depth 0
def next_wave(tokens, depths, guesses, r, room):
    leave = int(depths[0] == r)
    tokens = [tokens[0], *guesses[:-1]]
    says = guesses[-1]
    tokens, depths = tokens[leave:], depths[leave:]
    if len(tokens) < room:
        tokens, depths = tokens + [says], depths + [0]
    return tokens, depths


# %% wrong: wider than there is room
# says: positions, but there is room for
def next_wave(tokens, depths, guesses, r, room):
    stay = next((i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]), len(tokens))
    leave = int(depths[0] == r)
    return tokens[leave:stay] + [guesses[stay - 1]], depths[leave:stay] + [0]


# %% wrong: an empty wave
# says: nobody is left in flight
def next_wave(tokens, depths, guesses, r, room):
    stay = next((i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]), len(tokens))
    leave = int(depths[0] == r)
    if len(tokens) < room:
        return tokens[leave:stay] + [guesses[stay - 1]], depths[leave:stay] + [0]
    return tokens[leave:stay], depths[leave:stay]


# %% wrong: a wave of one
# says: Does a new position wait until its left neighbour is done
def next_wave(tokens, depths, guesses, r, room):
    return ([guesses[0]], [0]) if depths[0] == r else (tokens, depths)


# %% wrong: the new position has run a step
# says: begins at depth 0
def next_wave(tokens, depths, guesses, r, room):
    stay = next((i for i in range(1, len(tokens)) if guesses[i - 1] != tokens[i]), len(tokens))
    leave = int(depths[0] == r)
    tokens, depths = tokens[leave:stay], depths[leave:stay]
    if len(tokens) < room:
        tokens, depths = tokens + [guesses[stay - 1]], depths + [1]
    return tokens, depths
