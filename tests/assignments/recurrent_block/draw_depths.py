# %% right: one row after the other, in plain Python
def draw_depths(mean, n, generator):
    import random

    rng = random.Random(torch.randint(2**40, (1,), generator=generator).item())
    depths = []
    for _ in range(n):
        rate = math.exp(rng.gauss(math.log(mean) - 0.125, 0.5))
        arrivals, clock = 0, rng.expovariate(rate)
        while clock < 1:  # the arrivals of a Poisson process in a unit of time
            arrivals += 1
            clock += rng.expovariate(rate)
        depths.append(arrivals + 1)
    return torch.tensor(depths)


# %% right: the mean corrected outside of the exponential
def draw_depths(mean, n, generator):
    noise = torch.normal(0.0, 0.5, (n,), generator=generator, dtype=torch.float64)
    rates = noise.exp() * mean / math.exp(0.125)
    return (1 + torch.poisson(rates, generator=generator)).to(torch.int64)


# %% right: numpy, seeded from the generator
def draw_depths(mean, n, generator):
    import numpy as np

    rng = np.random.default_rng(int(torch.randint(2**40, (1,), generator=generator)))
    return torch.as_tensor(rng.poisson(rng.lognormal(np.log(mean) - 0.125, 0.5, n)) + 1)


# %% wrong: no + 1
# says: Poisson may give 0
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (n,), generator=generator)
    return torch.poisson(tau.exp(), generator=generator).long()


# %% wrong: zeros made ones
# says: is there a + 1
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (n,), generator=generator)
    return torch.poisson(tau.exp(), generator=generator).long().clamp(min=1)


# %% wrong: not centred
# says: - sigma^2 / 2 is missing
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean), 0.5, (n,), generator=generator)
    return torch.poisson(tau.exp(), generator=generator).long() + 1


# %% wrong: the variance for the deviation
# says: sigma is a standard deviation, not a variance
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.25, (n,), generator=generator)
    return torch.poisson(tau.exp(), generator=generator).long() + 1


# %% wrong: rounded, without Poisson
# says: the Poisson draw adds to it
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (n,), generator=generator)
    return tau.exp().round().long() + 1


# %% wrong: plain Poisson
# says: that is a plain Poisson distribution
def draw_depths(mean, n, generator):
    return torch.poisson(torch.full((n,), float(mean)), generator=generator).long() + 1


# %% wrong: one depth for all rows
# says: all rows have one depth
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (1,), generator=generator)
    return (torch.poisson(tau.exp(), generator=generator).long() + 1).expand(n)


# %% wrong: global chance
# says: give generator= to every function that draws
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (n,))
    return torch.poisson(tau.exp()).long() + 1


# %% wrong: seeded inside
# says: don't seed inside
def draw_depths(mean, n, generator):
    generator = torch.Generator().manual_seed(0)
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (n,), generator=generator)
    return torch.poisson(tau.exp(), generator=generator).long() + 1


# %% wrong: floats
# says: so int64; here torch.float32
def draw_depths(mean, n, generator):
    tau = torch.normal(math.log(mean) - 0.125, 0.5, (n,), generator=generator)
    return torch.poisson(tau.exp(), generator=generator) + 1
