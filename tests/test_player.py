"""The player: what its page holds, and, in a browser, what a reader sees of every sampler and of the engine."""

import html
import json
import re
from base64 import b64decode
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec import (
    RecurrentDepthLM,
    adaptive_exit,
    autoregressive,
    diffusion_forcing,
    lossless_wavefront,
    speculative,
    tasks,
)
from minirec.continuous_batching import Engine, Pass, Stage
from minirec.decoding import Generation, OuterStep
from minirec.figures import player

SAMPLERS = {
    "autoregressive": (autoregressive, {}),
    "adaptive exit": (adaptive_exit, {}),
    "diffusion forcing": (diffusion_forcing, {}),
    "lossless wavefront": (lossless_wavefront, {}),
    "speculative": (speculative, {"draft_steps": 4, "lookahead": 4}),
}
MOST_BYTES = 60_000
TOKENIZER = tasks.task_tokenizer()


@pytest.fixture(scope="module")
def model():
    return RecurrentDepthLM.from_pretrained("tiny")


@pytest.fixture(scope="module")
def problem() -> tasks.Problem:
    """Nine tokens, some of which no sampler guesses right at once: each step follows one arrow more."""
    return tasks.heldout(2, family="hops")[1]


@pytest.fixture(scope="module")
def runs(model, problem) -> dict[str, Generation]:
    return {
        name: sampler.generate(model, problem.prompt, 40, trace=True, **options)
        for name, (sampler, options) in SAMPLERS.items()
    }


@pytest.fixture(scope="module")
def passes(model) -> list[Pass]:
    found: list[Pass] = []
    engine = Engine(model, slots=2, max_length=160, on_pass=found.append)
    for one in tasks.heldout(3, family="hops"):
        engine.submit(one.prompt, 3, threshold=0.2)
    engine.run()
    return found


class Page(HTMLParser):
    """The elements of a page, and the data in it."""

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.data, self.inside = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.inside = dict(attrs).get("id") == "data"

    def handle_data(self, data):
        if self.inside:
            self.data += data

    def handle_endtag(self, tag):
        self.inside = False


@pytest.mark.parametrize("name", SAMPLERS)
def test_frames_account_for_every_pass_and_every_token(runs, problem, name):
    run = runs[name]
    frames = player.frames(run, len(problem.prompt))
    assert sum(frame["n"] for frame in frames) == frames[-1]["p"] == run.passes
    assert all(b["p"] - a["p"] == b["n"] > 0 and b["ms"] >= a["ms"] for a, b in pairwise(frames))
    assert [frame["f"] for frame in frames] == sorted(frame["f"] for frame in frames)
    assert frames[-1]["f"] == len(run.tokens)
    final = {0: frames[0]["g"][0]}  # what a cell says when its token becomes final is that token
    for before, frame in pairwise(frames):
        final |= {x: frame["g"][x - frame["x"]] for x in range(before["f"], frame["f"])}
    assert [final[x] for x in range(len(run.tokens))] == run.tokens


def test_frames_show_where_guesses_change_and_what_is_thrown_away(runs, problem):
    n = len(problem.prompt)
    frames = {name: player.frames(run, n) for name, run in runs.items()}
    for name in ("autoregressive", "adaptive exit"):
        assert not any("c" in frame or "lost" in frame for frame in frames[name])
    assert any("c" in frame for frame in frames["diffusion forcing"])
    assert not any("lost" in frame for frame in frames["diffusion forcing"])  # its positions go on with a new token
    lost = 0
    for frame, step in zip(frames["lossless wavefront"][1:-1], runs["lossless wavefront"].trace, strict=False):
        # what runs on a guess that its left neighbour takes back
        changed = [frame["x"] + i for i in frame.get("c", ()) if i + 1 < len(step.depths)]
        changed = [x for x in changed if x + 1 < len(runs["lossless wavefront"].tokens)]
        assert frame.get("lost") == (min(changed) + 1 if changed else None)
        lost += "lost" in frame
    assert lost > 2


def test_frames_of_speculation_are_its_drafts_and_then_their_verification(runs, problem):
    run, frames = runs["speculative"], player.frames(runs["speculative"], len(problem.prompt))[1:]
    r, wrong = 12, 0
    for step in run.trace:
        width = len(step.depths)
        drafts, verified, frames = frames[:width], frames[width], frames[width + 1 :]
        assert [(f["draft"], f["d"], f["g"], f["n"]) for f in drafts] == [
            (True, [4] * i, step.drafts[:i], 4) for i in range(1, width + 1)
        ]
        assert (verified["draft"], verified["n"], verified["d"]) == (False, r - 4, [r] * width)
        kept = verified["f"] - verified["x"]
        assert step.drafts[: kept - 1] == step.guesses[: kept - 1]
        assert verified.get("lost") == (verified["f"] if kept < width and frames else None)
        wrong += step.drafts[kept - 1] != step.guesses[kept - 1]
    assert frames == [] and wrong


def test_a_trace_says_what_each_outer_step_has_cost(runs):
    for name, run in runs.items():
        spent = [step.passes for step in run.trace]
        assert spent == sorted(set(spent)) and spent[0] > run.depth[0] and spent[-1] == run.passes, name
        seconds = [step.seconds for step in run.trace]
        assert seconds == sorted(seconds) and seconds[0] > 0


class Texts:
    """A tokenizer whose token i is text number i."""

    def __init__(self, texts):
        self.texts = texts

    def decode(self, tokens, **_):
        return "".join(self.texts[token] for token in tokens)


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]>",
    "<img src=x onerror=alert(1)>",
    "&lt;/script&gt;",
    "\"'`${alert(1)}\\",
    "__DATA__",
    "\u2028\u2029\x00",
    "\ud800",
    "\u202eabc",
    "",
]
hostile = st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=12)


@given(st.lists(hostile, min_size=4, max_size=4), hostile, hostile)
def test_hostile_text_arrives_as_text(texts, name, title):
    trace = [OuterStep(2, [1, 1], [2, 3], 4, passes=2), OuterStep(3, [2], [3], 5, passes=3)]
    run = Generation([1, 2, 3], [1, 1, 2], passes=3, trace=trace)
    text = player.html({name: run}, [0, 0], Texts(texts), title)
    text.encode("utf-8")  # it can be written to a file
    page, plain = Page(text), Page(player.html({"a": run}, [0, 0]))
    assert page.elements == plain.elements and text.count("</script") == 2
    data = json.loads(page.data)
    lane = data["lanes"][0]
    assert (lane["tokens"], lane["depth"], lane["passes"]) == (run.tokens, run.depth, run.passes)
    sent = [dict(zip("p ms n x d g f".split(), fields, strict=False)) | dict(*fields[7:]) for fields in lane["frames"]]
    assert sent == player.frames(run, 2)
    shown = [data["title"], lane["name"], data["prompt"], *data["words"].values()]
    assert all(c.isprintable() or c == "\n" for one in shown for c in one)
    for token in ("1", "2", "3"):
        ours, given_ = data["words"][token], texts[int(token)].strip()
        if given_.isprintable() and len(given_) <= 24:
            assert ours == (given_ or "·")


def test_the_page_is_small_and_loads_nothing(runs, problem):
    template = (Path(player.__file__).parent / "player.html").read_text(encoding="utf-8")
    assert len(template.encode()) < MOST_BYTES
    page = player.html({name: runs[name] for name in list(runs)[:4]}, problem.prompt, TOKENIZER)
    assert len(page.encode()) < MOST_BYTES
    assert not re.search(r"https?:|src=|@import|url\(|fetch\(|XMLHttp|innerHTML|eval\(", page)


def test_the_cell_of_a_notebook_holds_the_page_and_a_still_picture(runs, problem, passes):
    some = {name: runs[name] for name in ("lossless wavefront", "diffusion forcing")}
    for lanes, prompt in ((some, torch.tensor(problem.prompt)), ({"by depth": passes}, None)):
        bundle = player.show(lanes, prompt, TOKENIZER)._repr_mimebundle_()
        assert b64decode(bundle["image/png"]).startswith(b"\x89PNG")
        assert bundle["image/png"] in bundle["text/html"].partition("<iframe")[0]  # for viewers that strip the frame
        framed = re.search(r'srcdoc="([^"]*)"', bundle["text/html"])[1]
        assert html.unescape(framed) == player.html(lanes, prompt, TOKENIZER)


def test_numbers_are_shown_without_a_tokenizer(runs, problem):
    data = json.loads(Page(player.html({"a": runs["autoregressive"]}, problem.prompt)).data)
    assert data["prompt"] == " ".join(map(str, problem.prompt))
    assert all(word == token for token, word in data["words"].items())


def test_bad_lanes_are_refused(runs, problem, passes):
    run = runs["autoregressive"]
    untraced = Generation([1], [1])
    for lanes, prompt, message in [
        ({}, problem.prompt, "lanes holds 0 runs"),
        ({str(i): run for i in range(5)}, problem.prompt, "lanes holds 5 runs"),
        ({"a": run}, None, "prompt is None"),
        ({"a": run}, problem.prompt[:-1], f"continues one of {len(problem.prompt)}"),
        ({"a": untraced}, problem.prompt, "trace=True"),
        ({"a": []}, None, "the run 'a' is"),
        ({"a": [1]}, None, "the run 'a' is"),
        ({"a": None}, None, "the run 'a' is"),
        ({"a": 5}, None, "the run 'a' is"),
    ]:
        with pytest.raises(ValueError, match=message):
            player.html(lanes, prompt)


@pytest.mark.slow
def test_the_hero_has_corrections_and_restarts(model):
    problem, lanes = player.hero(model, tasks.heldout(48))
    assert problem.is_correct(lanes["Lossless wavefront"].tokens)
    frames = {name: player.frames(lanes[name], len(problem.prompt)) for name in lanes}
    assert sum(len(f.get("c", ())) for f in frames["Diffusion forcing"]) >= 3
    assert any("lost" in f for f in frames["Lossless wavefront"])
    assert len(player.html(lanes, problem.prompt, TOKENIZER).encode()) < MOST_BYTES


# ---- in a browser


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(html, width, ...)`: the page in Chromium; no request and no error may have come of it."""
    pages, requests, wrong = [], [], []

    def go(text: str, width: int = 1280, **context):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 800}, **context)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert wrong == [] and all(url.startswith(("file:", "about:srcdoc", "data:")) for url in requests)


def scrub(page, value) -> None:
    slider = page.get_by_label("Position in the run")
    slider.evaluate("(s, value) => { s.value = value; s.dispatchEvent(new Event('input')); }", value)


COLUMNS = """lane => [...lane.querySelectorAll('.col')].map(c => [
  ['frozen', 'flying', 'empty'].find(k => c.classList.contains(k)), c.querySelector('.head').textContent,
  ['changed', 'lost', 'wrong', 'draft'].filter(k => c.classList.contains(k)), c.getAttribute('aria-label')])"""


def columns(page, lane: int = 0) -> list:
    return page.locator(".lane").nth(lane).evaluate(COLUMNS)


def said(token: int) -> str:
    return TOKENIZER.decode([token], skip_special_tokens=False).strip() or "·"


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_reader_sees_every_outer_step(opened, runs, problem, name):
    run, n = runs[name], len(problem.prompt)
    page = opened(player.html({name: run}, problem.prompt, TOKENIZER))
    for y, step in enumerate(run.trace):
        scrub(page, step.passes)
        assert page.locator("output").inner_text() == f"Pass {step.passes} of {run.passes}"
        cells, final = columns(page), step.frozen - n
        assert [c[:2] for c in cells[:final]] == [["frozen", said(token)] for token in run.tokens[:final]]
        window = dict(enumerate(zip(step.depths, step.guesses, strict=True), step.start - n + 1))
        window = window if final < len(run.tokens) else {}  # nothing is in flight at the end
        for x, (kind, word, marks, label) in list(enumerate(cells))[final:]:
            if x not in window:
                assert (kind, word, marks) == ("empty", "", [])
                continue
            depth, guess = window[x]
            assert (kind, word) == ("flying", said(guess)) and f"depth {depth}" in label
            assert ("wrong" in marks) == (x < len(run.tokens) and guess != run.tokens[x])
        if y + 1 < len(run.trace) and name == "lossless wavefront":
            after = run.trace[y + 1]
            again = {after.start - n + 1 + i: d for i, d in enumerate(after.depths)}
            lost = {x for x, c in enumerate(cells) if "lost" in c[2]}
            expected = {x for x in window if x >= final and again.get(x, 0) <= window[x][0]}
            assert lost == (expected if min(expected, default=9) < len(run.tokens) else set())
    assert "done after" in page.locator(".says").inner_text()


@pytest.mark.slow
def test_columns_grow_pass_by_pass(opened, runs, problem):
    page = opened(player.html({"a": runs["autoregressive"]}, problem.prompt, TOKENIZER))
    page.keyboard.press("Home")
    assert page.locator("output").inner_text().startswith("Pass 12 of")
    for depth in range(1, 12):
        page.get_by_label("One pass forward").click()
        kind, word, _, label = columns(page)[1]
        assert (kind, word) == ("flying", "…") and f"depth {depth}" in label
    page.keyboard.press("ArrowRight")
    assert columns(page)[1][:2] == ["frozen", said(runs["autoregressive"].tokens[1])]
    page.get_by_label("One pass back").click()
    assert "depth 11" in columns(page)[1][3]
    page = opened(player.html({"a": runs["speculative"]}, problem.prompt, TOKENIZER))
    page.keyboard.press("Home")
    for passes, depths in [(3, [3]), (1, [4]), (2, [4, 2]), (10, [4] * 4), (1, [5] * 4), (6, [11] * 4)]:
        for _ in range(passes):
            page.keyboard.press("ArrowRight")
        flying = [c for c in columns(page) if c[0] == "flying"]
        assert [int(c[3].partition("depth ")[2].partition(",")[0]) for c in flying] == depths
        assert all(("draft" in c[2]) == ((passes < 7 and max(depths) <= 4) or depths == [4] * 4) for c in flying)


@pytest.mark.slow
def test_keys_play_step_and_scrub_all_lanes_in_lockstep(opened, runs, problem):
    names = ["autoregressive", "adaptive exit", "lossless wavefront", "diffusion forcing"]
    page = opened(player.html({name: runs[name] for name in names}, problem.prompt, TOKENIZER))
    clock, spoken = page.locator("output"), page.locator("[aria-live]")
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowRight")  # the next end of an outer step, in any lane
    first = min(run.trace[0].passes for run in runs.values())
    assert clock.inner_text().startswith(f"Pass {first} of")
    assert all(f"{name}: " in spoken.text_content() for name in names)
    for lane, name in enumerate(names):
        final = max([1] + [s.frozen - len(problem.prompt) for s in runs[name].trace if s.passes <= first])
        assert page.locator(".says").nth(lane).inner_text().startswith(f"{final} of 9 tokens final")
    page.get_by_label("Speed").select_option("64")
    page.get_by_label("Speed").evaluate("s => s.blur()")
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Play").wait_for()
    paused = clock.inner_text()
    page.wait_for_timeout(200)
    assert clock.inner_text() == paused
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("document.querySelectorAll('.says')[0].textContent.includes('done after')")
    page.get_by_role("button", name="Play").wait_for()  # it has stopped by itself
    for lane, name in enumerate(names):
        assert [c[1] for c in columns(page, lane)][:9] == [said(token) for token in runs[name].tokens]
    page.get_by_label("Lockstep").select_option("ms")
    page.keyboard.press("Escape")
    page.get_by_label("Lockstep").evaluate("s => s.blur()")
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert re.fullmatch(r"[\d.]+ ms of [\d.]+", clock.inner_text())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hover", "focus", "keys"])
def test_a_cell_tells_the_history_of_its_guess(opened, runs, problem, how):
    run, n = runs["diffusion forcing"], len(problem.prompt)
    page = opened(player.html({"wave": run}, problem.prompt, TOKENIZER))
    page.keyboard.press("End")
    guesses: dict[int, list[int]] = {}
    for step in run.trace:
        for x, guess in enumerate(step.guesses, step.start - n + 1):
            if guesses.setdefault(x, [])[-1:] != [guess]:
                guesses[x].append(guess)
    x = max(range(len(run.tokens)), key=lambda x: len(guesses.get(x, [])))
    assert len(guesses[x]) >= 3
    cell = page.locator(".col").nth(x)
    if how == "keys":
        page.locator(".col").nth(0).focus()
        for _ in range(x):
            page.keyboard.press("ArrowRight")
        assert cell.evaluate("c => c === document.activeElement")
    else:
        getattr(cell, how)()
    text = page.get_by_label("History of a guess").inner_text()
    assert f"wave, token {x + 1}" in text
    assert re.findall("“(.*?)” at depth", text) == [said(guess) for guess in guesses[x]]
    assert f"final: “{said(run.tokens[x])}”" in text


@pytest.mark.slow
def test_the_engine_is_shown_by_slots(opened, passes):
    page = opened(player.html({"by depth": passes}))
    at = len(passes) // 2
    scrub(page, at)
    read = "[...r.querySelectorAll('.cell')].map(c => [c.textContent, c.getAttribute('aria-label')])"
    rows = page.locator(".slots [role=group]").evaluate_all(f"rows => rows.map(r => {read})")
    assert len(rows) == 2
    for row, cells in enumerate(rows):
        told = {int(re.search(r"pass (\d+)", label)[1]): (text, label) for text, label in cells}
        assert at in told
        for number, (text, label) in told.items():
            own = [slot for slot in passes[number - 1].slots if slot[0] == row] if number <= at else []
            assert text == (str(own[0][1]) if own else "")
            assert not own or (f"request {own[0][1]}" in label and f"depth {own[0][2]}" in label)
    assert any(one.stage is Stage.CODA for one in passes)
    page.locator(".slots .cell").first.focus()
    assert "slot 0" in page.get_by_label("History of a guess").inner_text()


@pytest.mark.slow
def test_it_fits_a_phone_and_heeds_what_the_reader_prefers(opened, runs, problem, passes):
    names = ["autoregressive", "speculative", "lossless wavefront", "diffusion forcing"]
    text = player.html({name: runs[name] for name in names}, problem.prompt, TOKENIZER)
    colours = "[...document.querySelectorAll('.scale i')].map(i => getComputedStyle(i).backgroundColor)"
    seen = {}
    for width in (360, 768, 1280):
        for scheme in ("light", "dark"):
            page = opened(text, width, color_scheme=scheme, reduced_motion="reduce")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("getComputedStyle(document.querySelector('.stack')).transitionDuration") == "0s"
            seen[scheme] = page.evaluate(colours)
    assert seen["light"] == seen["dark"][::-1]
    page = opened(player.html({"engine": passes}), 360)
    assert page.evaluate("document.documentElement.scrollWidth") == 360


@pytest.mark.slow
def test_hostile_tokens_stay_text_in_a_browser(opened):
    trace = [OuterStep(2, [1] * 9, list(range(1, 10)), 3, passes=2), OuterStep(2, [2] * 9, list(range(9)), 4, passes=3)]
    run = Generation([0, 0], [1, 2], passes=3, trace=trace)
    page = opened(player.html({HOSTILE[3]: run}, [0, 0], Texts(HOSTILE), HOSTILE[0]))
    page.keyboard.press("End")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 2
    assert page.locator("h1").text_content() == HOSTILE[0] and page.locator("h2").text_content() == HOSTILE[3]


@pytest.mark.slow
def test_in_a_notebook_the_player_replaces_the_still_picture(opened, runs, problem):
    some = {name: runs[name] for name in ("lossless wavefront", "diffusion forcing")}
    cell = player.show(some, problem.prompt, TOKENIZER)._repr_mimebundle_()["text/html"]
    page = opened(f"<!doctype html><body>{cell}</body>")
    frame = page.frame_locator("iframe")
    frame.get_by_role("button", name="Play").wait_for()
    page.wait_for_function("document.querySelector('iframe').style.height !== '640px'")
    assert page.locator("img").is_hidden()
    assert frame.locator("body").evaluate("b => b.scrollHeight <= innerHeight + 1")
    stripped = opened("<!doctype html><body>" + cell.partition("<iframe")[0])
    assert stripped.locator("img").is_visible()
