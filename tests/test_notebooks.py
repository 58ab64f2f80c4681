"""The notebooks as they are stored: whole, run from top to bottom, and light; and what they define. nbval runs them."""

import ast
import itertools
import json
import warnings
from pathlib import Path

import nbformat
import pytest
import torch

from minirec import (
    RecurrentConfig,
    RecurrentDepthLM,
    adaptive_exit,
    autoregressive,
    diffusion_forcing,
    lens,
    lossless_wavefront,
    training,
)
from minirec.continuous_batching import Engine
from minirec.kv_cache import bytes_per_token

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES = 1_000_000
MIN_CELLS, MAX_CELLS = 25, 45


def problems_of_format(notebook: dict) -> list[str]:
    if notebook.get("nbformat") != 4:
        return [f"nbformat is {notebook.get('nbformat')}, not 4"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nbformat only warns of missing or repeated cell ids
            nbformat.validate(notebook)
    except (nbformat.ValidationError, Warning) as problem:
        return [f"not valid nbformat: {problem}"]
    return []


def problems_of_whole(notebook: dict) -> list[str]:
    problems = []
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        problems.append(f"the kernel is {kernel!r}, not 'python3'")
    if "widgets" in notebook["metadata"]:
        problems.append("widget state is stored in the metadata")
    cells = notebook["cells"]
    if not MIN_CELLS <= len(cells) <= MAX_CELLS:
        problems.append(f"{len(cells)} cells, not {MIN_CELLS} to {MAX_CELLS}")
    if not cells or cells[0]["cell_type"] != "markdown" or not "".join(cells[0]["source"]).startswith("# "):
        problems.append("cell 0 is not markdown that starts with a '# ' title")
    return problems


def problems_of_cells(notebook: dict) -> list[str]:
    problems = []
    count = 0
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        count += 1
        if cell["execution_count"] != count:
            problems.append(f"cell {index}: execution_count is {cell['execution_count']}, not {count}")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                problems.append(f"cell {index}: stored error {output['ename']}")
            if output.get("name") == "stderr":
                problems.append(f"cell {index}: stored output on stderr")
    return problems


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebooks found: the other tests of this file would prove nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_clean(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    problems = problems_of_format(notebook)
    if not problems:  # the rest relies on the format
        problems = problems_of_whole(notebook) + problems_of_cells(notebook)
    if path.stat().st_size >= MAX_BYTES:
        problems.append(f"{path.stat().st_size} bytes, not under {MAX_BYTES}")
    assert not problems, "\n".join(f"{path.name}: {problem}" for problem in problems)


def definitions(name: str) -> dict:
    """What a notebook imports and defines, without running anything else of it."""
    kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    namespace = {}
    for cell in nbformat.read(FOLDER / name, as_version=4).cells:
        if cell.cell_type == "code":
            kept = [node for node in ast.parse(cell.source).body if isinstance(node, kinds)]
            exec(compile(ast.Module(kept, type_ignores=[]), f"{name}: {cell.id}", "exec"), namespace)
    return namespace


@torch.inference_mode()
def test_the_model_of_notebook_01_is_the_package_s_at_another_shape():
    mine = definitions("01_recurrent_block.ipynb")
    config = RecurrentConfig(
        n_embd=24, n_heads=3, intermediate_size=40, vocab_size=50, block_size=32, mean_recurrence=4,
        n_layers_in_prelude=2, n_layers_in_recurrent_block=3, n_layers_in_coda=1,
    )  # fmt: skip
    model = RecurrentDepthLM(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # a fresh model has offsets 0 and norms 1, which would hide mistakes
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    scratch = mine["FromScratch"](50, 24, 3, 40, 2, 3, 1)
    weights = {k.removeprefix("transformer."): v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    scratch.load_state_dict(weights)
    tokens = torch.arange(30).reshape(2, 15)
    for num_steps in (0, 1, 5):
        expected = model(tokens, num_steps=num_steps).logits
        torch.testing.assert_close(scratch(tokens, num_steps), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("freeze", ["prefix", "last"])
@pytest.mark.parametrize("inner_steps", [1, 2])
@pytest.mark.parametrize("kv", ["full", "shared"])
def test_the_sampler_of_notebook_06_is_the_package_s_on_random_weights(freeze, inner_steps, kv):
    mine = definitions("06_diffusion_forcing.ipynb")
    torch.manual_seed(3)
    model = RecurrentDepthLM(
        RecurrentConfig(n_embd=32, n_heads=2, intermediate_size=48, vocab_size=40, block_size=64, mean_recurrence=5)
    )
    settings = dict(inner_steps=inner_steps, exit_threshold=0.2, freeze=freeze, headway=2, max_wavefront=6, kv=kv)
    by_hand = mine["diffusion_forcing_by_hand"](model, [3, 1, 4, 1, 5], 30, 5, **settings)
    package = diffusion_forcing.generate(model, [3, 1, 4, 1, 5], 30, num_steps=5, **settings)
    assert (by_hand.tokens, by_hand.depth) == (package.tokens, package.depth)


@torch.inference_mode()
def test_the_lenses_of_notebook_03_are_the_package_s_on_random_weights(small_model):
    mine = definitions("03_thinking_longer.ipynb")
    model = small_model(2, n_layers_in_coda=2)
    tokens = torch.arange(18).reshape(2, 9)
    states = lens.trajectory(model, tokens, 6)
    torch.testing.assert_close(mine["trajectory_by_hand"](model, tokens, 6), states)
    torch.testing.assert_close(mine["coda_lens_by_hand"](model, states), lens.coda_lens(model, states))
    torch.testing.assert_close(mine["logit_lens_by_hand"](model, states), lens.logit_lens(model, states))
    plane = mine["flatten_to_plane"](states)
    torch.testing.assert_close(plane.abs(), lens.principal_components(states).abs())  # signs are free
    guesses = lens.coda_lens(model, states)[1:].argmax(-1)  # (6, 2, 9)
    by_hand = [mine["settled_by_hand"](column) for column in guesses.flatten(1).T.tolist()]
    assert lens.settled(guesses).flatten().tolist() == by_hand
    assert len(set(by_hand)) > 2  # they do settle at different steps


@pytest.mark.parametrize("backprop", [1, 3, 9])
def test_the_objective_of_notebook_02_is_the_package_s_on_random_weights(backprop):
    by_hand = definitions("02_training_through_depth.ipynb")["depth_loss_by_hand"]
    torch.manual_seed(4)
    model = RecurrentDepthLM(
        RecurrentConfig(n_embd=24, n_heads=2, intermediate_size=40, vocab_size=30, block_size=16, mean_recurrence=5)
    )
    tokens, labels = torch.randint(30, (5, 6)), torch.randint(30, (5, 6))
    labels[1, :4] = labels[3] = -100  # where nothing is asked; row 3 is not asked for anything
    depths = torch.tensor([2, 7, 1, 4, 7])
    state = model.initial_state(torch.arange(6).expand(5, 6), seed=torch.arange(5)[:, None])
    results = []
    for objective in (by_hand, training.depth_loss):
        model.zero_grad()
        loss = objective(model, tokens, labels, depths, backprop, state)
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results)


def test_the_depths_of_notebook_02_are_the_package_s():
    by_hand = definitions("02_training_through_depth.ipynb")["depth_by_hand"]
    for mean in (1, 8.5, 32):
        mine, package = (draw(mean, torch.Generator().manual_seed(7), 500) for draw in (by_hand, training.sample_depth))
        assert torch.equal(mine, package)


@torch.inference_mode()
def test_the_denoiser_of_notebook_07_looks_both_ways_and_never_says_mask(small_model):
    mine = definitions("07_diffusion_language_models.ipynb")
    causal = small_model(2).transformer.core_block[0].attn
    both = mine["BothWays"](small_model(2).config).double()
    both.load_state_dict(causal.state_dict())
    x, rope = torch.randn(2, 6, 16, dtype=torch.float64), small_model(2).rope(torch.arange(6))
    same = (both(x, rope) - causal(x, rope)).abs().amax(dim=(0, 2)) < 1e-4  # (T,)
    assert same.tolist() == [False] * 5 + [True], "only the last position sees as much with a causal mask"
    torch.manual_seed(0)
    denoiser = mine["Denoiser"](11, d=16, heads=2, layers=2)
    tokens = torch.tensor([[3, 1, 4, 1, 5, denoiser.mask]])
    logits = denoiser(tokens)
    assert logits.shape == (1, 6, 11)
    later = denoiser(torch.tensor([[3, 1, 4, 1, 6, denoiser.mask]]))
    assert ((later - logits).abs().amax(-1) > 1e-5).all(), "a change of one token reaches all, to its left too"


@torch.inference_mode()
def test_the_loss_of_notebook_07_is_the_mean_over_all_orders_of_writing():
    masked_loss = definitions("07_diffusion_language_models.ipynb")["masked_loss"]
    L, V, n = 3, 2, 60_000
    table = (5 * torch.randn(3**L, L, V, generator=torch.Generator().manual_seed(0))).log_softmax(-1)

    def lookup(tokens):  # a model of texts of three bits, hole = 2, after a prompt of one token
        return torch.nn.functional.pad(table[(tokens[:, 1:] * torch.tensor([9, 3, 1])).sum(1)], (0, 0, 1, 0))

    lookup.mask = 2
    text, hole = [1, 0, 1], 2
    orders = list(itertools.permutations(range(L)))
    expected = 0.0
    for order in orders:
        canvas = [hole] * L
        for i in order:
            expected -= table[9 * canvas[0] + 3 * canvas[1] + canvas[2], i, text[i]] / len(orders)
            canvas[i] = text[i]
    torch.manual_seed(0)
    t = (torch.arange(n) + 0.5) / n
    loss = masked_loss(lookup, torch.tensor([[0, *text]]).expand(n, -1), L, t)
    torch.testing.assert_close(L * loss, expected, atol=0.1, rtol=0)  # a constant weight of 2 is off by 0.33


class Babbler:
    """A denoiser that says something else at every call; keeps what it saw and said."""

    mask = 11

    def __init__(self):
        self.seen, self.generator = [], torch.Generator().manual_seed(1)

    def __call__(self, canvas):
        logits = 2 * torch.randn(*canvas.shape, self.mask, generator=self.generator)
        self.seen.append((canvas.clone(), logits))
        return logits


@pytest.mark.parametrize("passes, sure", [(1, 1.1), (5, 1.1), (9, 1.1), (5, 0.6)])
def test_unmasking_in_notebook_07_keeps_the_prompt_the_quota_and_what_stands(passes, sure):
    unmask, denoiser, length = definitions("07_diffusion_language_models.ipynb")["unmask"], Babbler(), 9
    prompts = torch.tensor([[3, 1, 4], [1, 5, 9]])
    text, trace = unmask(denoiser, prompts, length, passes, sure)
    assert not (text == denoiser.mask).any() and len(trace) == len(denoiser.seen) <= passes
    afterwards = [*(one.known for one in trace[1:]), torch.ones_like(trace[0].known)]
    for k, (one, after, (canvas, logits)) in enumerate(zip(trace, afterwards, denoiser.seen, strict=True)):
        assert torch.equal(canvas[:, :3], prompts) and torch.equal(one.known, canvas[:, 3:] != denoiser.mask)
        p, guesses = logits[:, 3:].softmax(-1).max(-1)
        assert torch.equal(one.guesses, torch.where(one.known, text, guesses)), "what stands, stands"
        stand = one.known.sum(1)
        assert (stand == length * k // passes).all() if sure > 1 else (stand >= length * k // passes).all()
        new = after & ~one.known
        assert (after | ~one.known).all() and (after | (p < sure)).all()
        assert (p.masked_fill(~new, 2).amin(1) >= p.masked_fill(after, -1).amax(1)).all(), "the surest stand next"
        assert torch.equal(text[new], guesses[new])


def test_taking_back_in_notebook_07_hides_the_least_sure_tokens_and_no_others():
    take_back, denoiser = definitions("07_diffusion_language_models.ipynb")["take_back"], Babbler()
    prompts, text = torch.tensor([[3, 1], [4, 1]]), torch.arange(12).view(2, 6) % 11
    trust = torch.tensor([[0.9, 0.2, 0.8, 0.1, 0.7, 0.6], [0.3, 0.9, 0.9, 0.9, 0.9, 0.4]])
    new, sure = take_back(denoiser, prompts, text, trust, 2)
    weakest = torch.zeros(2, 6, dtype=torch.bool)
    weakest[[0, 0, 1, 1], [1, 3, 0, 5]] = True
    ((canvas, logits),) = denoiser.seen
    p, guesses = logits[:, 2:].softmax(-1).max(-1)
    assert torch.equal(canvas, torch.cat([prompts, text.masked_fill(weakest, denoiser.mask)], 1))
    assert torch.equal(new, torch.where(weakest, guesses, text))
    torch.testing.assert_close(sure, torch.where(weakest, p, trust))


def test_the_widths_of_notebook_07_are_those_of_a_run_with_the_fixed_schedule(small_model):
    mine = definitions("07_diffusion_language_models.ipynb")
    for inner in (1, 2, 5):
        gen = diffusion_forcing.generate(
            small_model(1), [3, 1, 4], 13, num_steps=5, inner_steps=inner, schedule="fixed", stop_tokens=(), trace=True
        )
        passes, widths = mine["fixed_wavefront"](12, 5, inner)
        assert [len(step.depths) for step in gen.trace] == widths and gen.passes == 5 + passes
    depth, shared, apart = mine["prefill_cost"](6, 3).values()
    assert depth == (3, 6, 63, 6) and shared == (1, 18, 63, 6) and apart == (1, 18, 171, 18)


@pytest.mark.parametrize("guess_after", [1, 2, 3, 5])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 4, "init_scale": 3.0}])
def test_the_wavefront_of_notebook_08_is_the_package_s_on_random_weights(small_model, guess_after, options):
    by_hand = definitions("08_lossless_wavefront.ipynb")["lossless_by_hand"]
    for width in (None, 1, 2):
        how = options | {"guess_after": guess_after, "max_wavefront": width}
        mine = by_hand(small_model(2), [3, 1, 4], 30, 5, **how)
        package = lossless_wavefront.generate(small_model(2), [3, 1, 4], 30, num_steps=5, trace=True, **how)
        assert (mine.tokens, mine.depth, mine.passes, mine.trace) == (
            package.tokens, package.depth, package.passes, package.trace
        )  # fmt: skip


def test_the_starts_of_notebook_08_count_the_passes_of_a_run_on_random_weights(small_model):
    mine = definitions("08_lossless_wavefront.ipynb")
    settled = mine["settled_depths"](torch.tensor([[7, 1, 2, 5], [7, 2, 1, 4], [7, 1, 1, 5], [7, 1, 1, 5]]), 1)
    assert settled.tolist() == [1, 3, 2, 3]
    assert mine["starts"]([1, 3, 2, 3], 4) == [0, 1, 4, 6]
    assert mine["starts"]([1, 3, 2, 3], 4, width=2) == [0, 1, 4, 6]
    assert mine["starts"]([1, 3, 2, 3], 4, width=1) == [0, 4, 8, 12]
    gen = mine["lossless_by_hand"](small_model(2), [3, 1, 4], 30, 5)
    opened, said = {}, {}  # position -> the outer step in which it began for the last time; its guesses from there on
    for i, step in enumerate(gen.trace):
        for position, (depth, guess) in enumerate(zip(step.depths, step.guesses, strict=True), step.start):
            if depth == 1:
                opened[position], said[position] = i, []
            said[position].append(guess)
    guesses = torch.tensor([said[position] for position in sorted(said)]).T  # (r, positions)
    settled = mine["settled_depths"](guesses, 1).tolist()
    assert len(set(settled)) > 2, "they settle at different depths"
    assert [opened[position] for position in sorted(opened)] == mine["starts"](settled, 5)
    assert gen.passes == 5 + mine["starts"](settled, 5)[-1] + 5


@pytest.mark.parametrize("criterion", adaptive_exit.CRITERIA)
def test_the_rules_and_the_sampler_of_notebook_05_are_the_package_s_on_random_weights(small_model, criterion):
    mine, (measure, reads, _) = definitions("05_adaptive_exit.ipynb"), adaptive_exit.CRITERIA[criterion]
    by_hand = mine[criterion.replace("-", "_") + "_by_hand"]
    old, new = 3 * torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(by_hand(old, new), measure(old, new), atol=1e-5, rtol=1e-4)
    threshold, patience = (0.5, 2) if criterion == "argmax-stability" else (0.05, 1)
    for model, how in (
        (small_model(1), {}),
        (small_model(2), {"kv": "shared"}),
        (small_model(1), {"continuous": True}),
    ):
        gen = mine["adaptive_exit_by_hand"](
            model, [3, 1, 4], 20, 9, reads, by_hand, threshold, patience, **how
        ).generations[0]
        official = {"continuous_compute": True} if "continuous" in how else how
        limit = patience if criterion == "argmax-stability" else threshold
        package = adaptive_exit.generate(
            model, [3, 1, 4], 20, num_steps=9, criterion=criterion, threshold=limit, **official
        )
        assert (gen.tokens, gen.depth, gen.passes) == (package.tokens, package.depth, package.passes)
        assert len(set(gen.depth[1:])) > 1, "tokens leave at different depths"


@pytest.mark.parametrize("slots", [5, 3, 1])
def test_the_cache_of_notebook_04_is_the_package_s_on_random_weights(small_model, slots):
    mine = definitions("04_kv_cache.ipynb")
    model, prompts = small_model(2, n_layers_in_recurrent_block=2), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    kind = {"kv": "full"} if slots == 5 else {"kv": "shared", "kv_slots": slots}
    tokens, logits, _ = mine["decode_by_hand"](model, prompts, 12, 5, slots)
    package = autoregressive.generate(model, prompts, 12, num_steps=5, stop_tokens=(), **kind)
    assert tokens.tolist() == [g.tokens for g in package]
    assert all(len(set(row)) > 3 for row in tokens.tolist())
    text = torch.cat([prompts, tokens[:, :-1]], dim=1)
    plain = model(text, num_steps=5).logits[:, 3:]
    if slots == 5:
        torch.testing.assert_close(logits, plain)
    else:
        assert (logits - plain)[:, 1:].abs().max() > 1e-3, "sharing changes something"
    grid = mine["decode_and_keep"](model, prompts[0].tolist(), 12, 5, **kind)
    assert grid.generations[0].tokens == tokens[0].tolist()
    alone = mine["decode_by_hand"](model, prompts[:1], 12, 5, slots)[2]
    mine["assert_same_contents"](grid.cache, alone, 15)
    alone.core[:, :, slots - 1, :, :, 14] += 1
    with pytest.raises(AssertionError):
        mine["assert_same_contents"](grid.cache, alone, 15)


def test_the_bytes_of_notebook_04_are_the_package_s():
    mine = definitions("04_kv_cache.ipynb")["bytes_by_hand"]
    config = RecurrentConfig(n_layers_in_prelude=3, n_layers_in_recurrent_block=5, n_layers_in_coda=2)
    assert mine(config, 7, 2) == bytes_per_token(config, 7)
    assert mine(config, 4, 4) == bytes_per_token(config, 7, kv="shared", kv_slots=4, dtype=torch.float32)


@pytest.mark.parametrize("mode", ["static", "sequence", "depth"])
def test_the_scheduler_of_notebook_09_makes_the_engine_s_passes_on_random_weights(small_model, mode):
    mine, passes = definitions("09_continuous_batching.ipynb"), []
    batch = 2 if mode == "depth" else 1
    engine = Engine(small_model(1), 3, 40, mode, chunk=4, coda_batch=batch, on_pass=passes.append)
    for i in range(9):
        engine.submit([1 + i] * (1 + 5 * i % 11), 3 + i % 4, threshold=0.4, seed=i, num_steps=3 + i % 2)
    engine.run()
    requests = list(engine.requests.values())
    depths = {depth for request in requests for depth in request.generation.depth}
    assert len(depths) > 2, "tokens leave at different depths"
    by_hand = mine["serve_by_hand"]([mine["trips"](request, 4) for request in requests], 3, mode, batch)
    assert mine["schedule"](by_hand) == mine["schedule"](passes)
    assert mine["count"](by_hand) == mine["count"](passes)
    if mode != "depth":  # in step, the loop does not notice the other queues
        loop = mine["serve_loops"]([mine["trips"](request, 4) for request in requests], 3, mode)
        own = [one for one in passes if one.stage.name == "RECUR"]
        assert mine["schedule"](loop) == mine["schedule"](own)


def test_the_wave_of_notebook_10_takes_the_passes_of_the_package_s(small_model):
    passes = definitions("10_full_scale.ipynb")["passes_of_a_wave"]
    assert passes(0.0, r=6, g=2, tokens=20) == (6, 3), "every guess wrong: autoregressive decoding"
    model = small_model(0)
    head = model.lm_head.weight.clone()
    try:
        model.lm_head.weight.data.zero_()  # every logit is 0, and so is every guess
        wave = lossless_wavefront.generate(model, [1, 2, 3], 21, num_steps=6, guess_after=2, stop_tokens=())
    finally:
        model.lm_head.weight.data.copy_(head)
    assert passes(1.0, r=6, g=2, tokens=20)[0] * 20 == wave.passes - 6
