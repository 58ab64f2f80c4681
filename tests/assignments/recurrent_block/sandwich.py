# %% right: one name for every stage
def sandwich(layer, x, rope):
    normed = layer.norm_1(x)
    attended = x + layer.attn(normed, rope)
    middle = layer.norm_2(attended)
    return layer.norm_4(layer.mlp(layer.norm_3(middle)) + middle)


# %% right: one sequence after the other
def sandwich(layer, x, rope):
    rows = []
    for row in x:
        h = row[None]
        h = layer.norm_2(h + layer.attn(layer.norm_1(h), rope))
        rows.append(layer.norm_4(h + layer.mlp(layer.norm_3(h))))
    return torch.cat(rows)


# %% right: a loop over the two branches
def sandwich(layer, x, rope):
    branches = [
        (layer.norm_1, lambda y: layer.attn(y, rope), layer.norm_2),
        (layer.norm_3, layer.mlp, layer.norm_4),
    ]
    for before, branch, after in branches:
        x = after(x + branch(before(x)))
    return x


# %% wrong: an ordinary block
# says: both outer norms are missing
def sandwich(layer, x, rope):
    x = x + layer.attn(layer.norm_1(x), rope)
    return x + layer.mlp(layer.norm_3(x))


# %% wrong: norms after the sums only
# says: both inner norms are missing
def sandwich(layer, x, rope):
    x = layer.norm_2(x + layer.attn(x, rope))
    return layer.norm_4(x + layer.mlp(x))


# %% wrong: the norm around the branch
# says: Is each outer norm around the whole sum
def sandwich(layer, x, rope):
    x = x + layer.norm_2(layer.attn(layer.norm_1(x), rope))
    return x + layer.norm_4(layer.mlp(layer.norm_3(x)))


# %% wrong: both branches read the same x
# says: Does the MLP read what the attention has changed
def sandwich(layer, x, rope):
    y = layer.norm_2(x + layer.attn(layer.norm_1(x), rope))
    return layer.norm_4(y + layer.mlp(layer.norm_3(x)))


# %% wrong: the middle norms change places
# says: the norms are in another order
def sandwich(layer, x, rope):
    x = layer.norm_3(x + layer.attn(layer.norm_1(x), rope))
    return layer.norm_4(x + layer.mlp(layer.norm_2(x)))


# %% wrong: in place
# says: x was changed in place
def sandwich(layer, x, rope):
    x += layer.attn(layer.norm_1(x), rope)
    x = layer.norm_2(x)
    return layer.norm_4(x + layer.mlp(layer.norm_3(x)))


# %% wrong: nothing is returned
# says: the result is a NoneType; it must be a tensor
def sandwich(layer, x, rope):
    x = layer.norm_2(x + layer.attn(layer.norm_1(x), rope))
    x = layer.norm_4(x + layer.mlp(layer.norm_3(x)))
