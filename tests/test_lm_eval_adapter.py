"""lm-eval's answers on the shipped model are minirec's own: generation, likelihoods, and the whole harness."""

import json
import sys
from collections import Counter

import pytest
import torch

from minirec import RecurrentDepthLM, adaptive_exit, autoregressive, diffusion_forcing, tasks
from minirec.config import RecurrentConfig
from minirec.files import checkpoint
from minirec.files.tokenizer import HUGINN_TEMPLATE, huginn_special_ids, stand_in_tokenizer
from minirec.tasks import task_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra 'eval'; make test-eval installs it")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from minirec.tools import lm_eval_adapter
from minirec.tools.lm_eval_adapter import MinirecLM

ROOM = 130  # tokens that hold any solution
PROBLEMS = tasks.heldout(3, seed=3) + tasks.heldout(2, seed=3, level=6)  # some are right, some are not
TASK = """
task: minirec_words
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: ROOM, do_sample: false}
filter_list:
  - name: answer
    filter:
      - {function: regex, regex_pattern: "The answer is (.*?)\\\\.", group_select: -1}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Nothing is fetched, and what `datasets` keeps is thrown away."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield


@pytest.fixture(scope="module")
def model():
    return RecurrentDepthLM.from_pretrained("tiny")


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def questions(until=(), **kwargs) -> list[Instance]:
    kwargs = {"until": until if isinstance(until, str) else list(until), "max_gen_toks": ROOM} | kwargs
    return ask("generate_until", *((problem.text, kwargs) for problem in PROBLEMS))


def texts(generations) -> list[str]:
    return [task_tokenizer().decode(generation.tokens) for generation in generations]


# --- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ({}, autoregressive.generate),
        ({"sampler": "diffusion_forcing", "batch_size": 3}, diffusion_forcing.generate),
        ({"sampler": "adaptive_exit", "threshold": 0.3, "batch_size": "8", "num_steps": 9}, adaptive_exit.generate),
        ({"sampler": "speculative", "draft_steps": 2}, autoregressive.generate),
        ({"sampler": "lossless_wavefront", "batch_size": 2}, autoregressive.generate),
        ({"engine": "depth", "batch_size": 3, "threshold": 0.3, "num_steps": 9}, adaptive_exit.generate),
        ({"engine": "wavefront", "batch_size": 3, "guess_after": 2}, autoregressive.generate),
    ],
    ids=lambda value: value.get("sampler", value.get("engine", "default")) if isinstance(value, dict) else "",
)
def test_answers_are_those_of_the_sampler_in_the_order_of_the_questions(model, arguments, own):
    shared = {name: value for name, value in arguments.items() if name in ("threshold", "num_steps")}
    expected = own(model, [problem.prompt for problem in PROBLEMS], ROOM, **shared)
    lm = MinirecLM(**arguments)
    assert lm.generate_until(questions()) == texts(expected)
    assert lm.get_model_info()["new_tokens"] == sum(len(g.tokens) for g in expected)


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 4}, {"engine": "sequence", "batch_size": 2}])
def test_an_answer_ends_before_the_first_stop_text(arguments):
    whole = MinirecLM().generate_until(questions())
    lm = MinirecLM(**arguments)
    assert lm.generate_until(questions([" so ", "="])) == [text.split(" so ")[0].split("=")[0] for text in whole]
    spoken = lm.get_model_info()["new_tokens"]
    assert spoken < sum(len(text.split()) for text in whole) / 2, "and nothing much is generated beyond it"
    assert lm.generate_until(questions("=")) == [text.split("=")[0] for text in whole]
    assert lm.generate_until(questions("zebra")) == whole, "letters are no stop text"
    assert lm.generate_until(questions([])) == whole


def test_a_stop_text_that_lies_across_tokens_is_found():
    (whole,) = MinirecLM().generate_until(questions()[:1])
    number = whole.split(" = ")[1].split()[0]
    assert len(task_tokenizer().encode(number).ids) > 1, "digits are tokens"
    (text,) = MinirecLM().generate_until(questions([f"= {number}"])[:1])
    assert text == whole.split(f"= {number}")[0]


def test_the_task_s_arguments_go_to_the_sampler_and_sampling_is_reproducible(model):
    heat = dict(temperature=1.5, do_sample=True, top_k=20)
    expected = autoregressive.generate(
        model, [p.prompt for p in PROBLEMS], 24, seed=5, temperature=1.5, top_k=20
    )  # fmt: skip
    first, again = (MinirecLM(seed=5, batch_size=n).generate_until(questions(max_gen_toks=24, **heat)) for n in (1, 8))
    assert first == again == texts(expected)
    assert MinirecLM(seed=6).generate_until(questions(max_gen_toks=24, **heat)) != first
    cold = MinirecLM(seed=5).generate_until(questions(max_gen_toks=24, temperature=1.5, do_sample=False))
    assert cold == texts(autoregressive.generate(model, [p.prompt for p in PROBLEMS], 24, seed=5))
    fast = questions(inner_steps=3, exit_threshold=5.0, max_gen_toks=24)
    expected = diffusion_forcing.generate(
        model, [p.prompt for p in PROBLEMS], 24, inner_steps=3, exit_threshold=5.0
    )  # fmt: skip
    assert MinirecLM(sampler="diffusion_forcing").generate_until(fast) == texts(expected)


@pytest.mark.parametrize("arguments", [{}, {"engine": "depth", "batch_size": 2}])
def test_repeated_questions_get_answers_of_their_own(arguments):
    one, other = questions(temperature=4.0, do_sample=True, max_gen_toks=16)[:2]
    answers = MinirecLM(seed=2, **arguments).generate_until([one, one, other, one])
    assert len({answers[0], answers[1], answers[3]}) == 3
    assert answers[1] == MinirecLM(seed=3).generate_until([one])[0]
    assert answers[2] == MinirecLM(seed=2).generate_until([other])[0]


def test_questions_of_different_tasks_share_a_call():
    short, long = questions(max_gen_toks=5)[:3], questions(["="])[:3]
    lm = MinirecLM(batch_size=4)
    mixed = lm.generate_until([short[0], long[0], short[1], long[1], short[2], long[2]])
    assert mixed[::2] == lm.generate_until(short) and mixed[1::2] == lm.generate_until(long)


def test_a_long_prompt_loses_its_beginning(model):
    room, ids = 20, PROBLEMS[0].prompt
    (text,) = MinirecLM(max_length=len(ids) + 10).generate_until(questions(max_gen_toks=room)[:1])
    expected = autoregressive.generate(model, ids[-(len(ids) + 10 - room) :], room)
    assert text == task_tokenizer().decode(expected.tokens)


# --- likelihood ---------------------------------------------------------------------------------------------------


def plain(model, ids: list[int], start: int, num_steps: int | None = None) -> tuple[float, bool]:
    """Log-probability of ids[start:] after ids[:start], token by token, and whether each is the likeliest."""
    logp = model(torch.tensor([ids]), num_steps=num_steps).logits[0].log_softmax(-1)
    likely = [logp[t - 1, ids[t]].item() for t in range(start, len(ids))]
    return sum(likely), all(logp[t - 1].argmax() == ids[t] for t in range(start, len(ids)))


@pytest.mark.parametrize("arguments", [{}, {"batch_size": 3}, {"batch_size": 64, "num_steps": 3}])
def test_likelihoods_are_those_of_a_plain_forward_pass(model, arguments):
    pairs = [(p.text, " " + p.solution) for p in PROBLEMS[:3]]
    row = tasks.heldout(1, family="automaton", level=2)[0]
    pairs += [(row.text, row.solution), (row.text, row.solution[:4]), ("", "Mia has"), (row.text + " 0", "1 1")]
    pairs += [(row.text, digit) for digit in "0123"]  # differ in the last token alone
    # the same four tokens in front of the last one, cut at another place
    pairs += [("Mia has 1 2", "3 4"), ("Mia has 1 2 3", "5"), ("Mia has 1 2 3", "4")]
    encode, expected = task_tokenizer().encode, []
    with torch.inference_mode():
        for context, continuation in pairs:
            ids, start = [1, *encode(context + continuation).ids], 1 + len(encode(context).ids)
            expected.append(plain(model, ids, start, arguments.get("num_steps")))
    answers = MinirecLM(**arguments).loglikelihood(ask("loglikelihood", *pairs))
    for pair, (likely, greedy), (own, own_greedy) in zip(pairs, answers, expected, strict=True):
        assert likely == pytest.approx(own, rel=1e-4, abs=1e-4) and greedy == own_greedy, pair
    assert {greedy for _, greedy in answers} == {True, False}


@pytest.mark.parametrize("max_length", [4, 5, 9, 512])
def test_every_token_of_a_text_is_predicted_once_in_windows(model, max_length):
    strings = ["Mia has 1 2 pears", "Tom finds 3 more coins. How many coins does Tom have?", "so", PROBLEMS[0].text]
    expected = []
    with torch.inference_mode():
        for string in strings:
            ids, total, done = [1, *task_tokenizer().encode(string).ids], 0.0, 1
            while done < len(ids):  # the next max_length tokens, or as many as there are, after what still fits
                end = min(done + max_length, len(ids))
                window = ids[max(0, end - max_length - 1) : end]
                total += plain(model, window, len(window) - (end - done))[0]
                done = end
            expected.append(total)
    for batch_size in (1, 3):
        lm = MinirecLM(max_length=max_length, batch_size=batch_size)
        answers = lm.loglikelihood_rolling(ask("loglikelihood_rolling", *((string,) for string in strings)))
        assert answers == pytest.approx(expected, rel=1e-4)


def test_a_continuation_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="a continuation has 9 tokens; max_length is 4"):
        MinirecLM(max_length=4).loglikelihood(ask("loglikelihood", ("Mia", " has 1 2 3 4 5 6 7 8")))


# --- the harness --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    lines = [{"text": p.text, "answer": p.answer} for p in PROBLEMS]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = TASK.replace("DATA", json.dumps(str(folder / "words.jsonl"))).replace("ROOM", str(ROOM))
    (folder / "minirec_words.yaml").write_text(text)
    return folder


COMMAND = ["--model", "minirec", "--tasks", "minirec_words", "--log_samples", "--model_args"]


def results_in(folder) -> tuple[float, dict, list[dict]]:
    """Exact match, the settings, and the samples in the order of the problems."""
    (results,) = folder.rglob("results_*.json")
    (samples,) = folder.rglob("samples_*.jsonl")
    found = json.loads(results.read_text())
    samples = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found["results"]["minirec_words"]["exact_match,answer"], found["config"], samples


@pytest.mark.parametrize("arguments", ["sampler=diffusion_forcing", "engine=depth,threshold=0.3"])
def test_exact_match_of_the_harness_is_our_own_count(model, task_folder, tmp_path, monkeypatch, capsys, arguments):
    own = diffusion_forcing.generate if "sampler" in arguments else adaptive_exit.generate
    options = {} if "sampler" in arguments else {"threshold": 0.3}
    generations = own(model, [p.prompt for p in PROBLEMS], ROOM, **options)
    right = [p.is_correct(g.tokens) for p, g in zip(PROBLEMS, generations, strict=True)]
    assert Counter(right).keys() == {True, False}
    command = [*COMMAND, f"pretrained=tiny,{arguments}", "--include_path", str(task_folder), "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command, "--output_path", str(tmp_path)])
    lm_eval_adapter.main()
    exact, config, samples = results_in(tmp_path)
    assert exact == sum(right) / len(right)
    assert [sample["exact_match"] for sample in samples] == right
    assert [sample["resps"] for sample in samples] == [[[text]] for text in texts(generations)]
    assert config["new_tokens"] == sum(len(g.tokens) for g in generations)
    assert "minirec_words" in capsys.readouterr().out


def test_two_processes_have_the_results_of_one(task_folder, tmp_path, monkeypatch, torchrun):
    # 3 of the problems: one process has one more than the other, which repeats one in its stead
    command = [*COMMAND, "pretrained=tiny", "--include_path", str(task_folder), "--limit", "3", "--output_path"]
    two = torchrun("-m", "minirec.tools.lm_eval_adapter", *command, str(tmp_path / "two"))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("|minirec_words|") == 1, "one process reports"
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command, str(tmp_path / "one")])
    lm_eval_adapter.main()
    (exact, _, samples), (other, _, gathered) = (results_in(tmp_path / name) for name in ("one", "two"))
    assert exact == other
    assert [(s["doc_id"], s["filtered_resps"]) for s in samples] == [
        (s["doc_id"], s["filtered_resps"]) for s in gathered
    ]


def test_the_cache_of_the_harness_answers_without_the_model(task_folder, tmp_path, monkeypatch):
    manager = lm_eval.tasks.TaskManager(include_path=str(task_folder))
    arguments = dict(tasks=["minirec_words"], task_manager=manager, limit=3, use_cache=str(tmp_path / "cache"))
    arguments |= dict(bootstrap_iters=0, log_samples=False)
    first = lm_eval.simple_evaluate(model="minirec", model_args="pretrained=tiny", **arguments)
    monkeypatch.setattr(MinirecLM, "_generate", lambda *_, **__: pytest.fail("generated again"))
    again = lm_eval.simple_evaluate(model="minirec", model_args="pretrained=tiny", **arguments)
    assert again["results"] == first["results"]


def test_lm_eval_finds_the_model_by_its_entry_point():
    from importlib.metadata import entry_points

    (entry,) = (e for e in entry_points(group="lm_eval.models") if e.name == "minirec")
    assert entry.load() is MinirecLM is get_model("minirec")


# --- conversations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A random model with a tokenizer and a template in the layout of Huginn's."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    ids = huginn_special_ids(320)
    shape = dict(n_embd=16, n_heads=2, intermediate_size=24, vocab_size=320, block_size=256, mean_recurrence=2)
    shape |= dict(n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1)
    config = RecurrentConfig(**shape, bos_token_id=ids["begin_text"], eos_token_id=ids["end_text"])
    checkpoint.make_random(config, folder, generation_config={"eos_token_id": [ids["end_text"]]})
    stand_in_tokenizer(320).save(str(folder / "tokenizer.json"))
    template = {"bos_token": "<|begin_text|>", "chat_template": HUGINN_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(template))
    return folder


def test_a_conversation_is_written_as_the_template_says(chatty):
    lm = MinirecLM(str(chatty))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    text = lm.apply_chat_template(messages)
    assert text == (
        "<|begin_text|><|begin_header|>system<|end_header|>\n\nBe brief.<|end_turn|>"
        "<|begin_header|>user<|end_header|>\n\nWhy?<|end_turn|><|begin_header|>Huginn<|end_header|>\n\n"
    )
    begun = [*messages, {"role": "assistant", "content": "Because\n"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant<|end_header|>\n\nBecause")
    ids, begin = lm.tok_encode(text), huginn_special_ids(320)["begin_text"]
    assert ids.count(begin) == 1 and ids[0] == begin == lm.tok_encode("Why?")[0]
    assert lm.tok_encode("Why?", add_special_tokens=False) == list(b"Why?") or begin not in lm.tok_encode(
        "Why?", add_special_tokens=False
    )
    assert lm.prefix_token_id == begin and lm.eot_token_id == huginn_special_ids(320)["end_text"]
    assert "/" not in lm.tokenizer_name


def test_the_end_of_a_turn_ends_an_answer(chatty, monkeypatch):
    end = huginn_special_ids(320)["end_turn"]
    lm, stops = MinirecLM(str(chatty)), []
    question = ask("generate_until", (lm.apply_chat_template([{"role": "user", "content": "?"}]), {"max_gen_toks": 4}))

    def generate(model, prompts, room, *, stop_tokens, **options):
        stops.append(set(stop_tokens))
        generation = autoregressive.generate(model, prompts[0], room, stop_tokens=stop_tokens)
        generation.tokens = [*b"ok", end]
        return [generation]

    monkeypatch.setitem(lm_eval_adapter.SAMPLERS, "autoregressive", generate)
    assert lm.generate_until(question) == ["ok"] or stops == [{end, lm.eot_token_id}]
    assert stops == [{end, lm.eot_token_id}]


def test_a_model_without_a_template_cannot_chat():
    with pytest.raises(ValueError, match="has no chat template"):
        MinirecLM().apply_chat_template([{"role": "user", "content": "?"}])


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "beam"}, "sampler is 'beam'; it must be one of 'autoregressive', 'adaptive_exit'"),
        ({"engine": "fast"}, "engine is 'fast'; it must be one of 'static'"),
        ({"engine": "depth", "sampler": "speculative"}, "sampler is 'speculative' and engine 'depth'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; it must be a whole number, at least 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "int4"}, "dtype is 'int4'; it must be one of 'float32'"),
        ({"max_length": 513}, "max_length is 513; it must be from 2 to the model's context, 512"),
        ({"draft_steps": 3}, "draft_steps is 3; sampler autoregressive knows fast, "),
        ({"engine": "depth", "inner_steps": 3}, "inner_steps is 3; engine depth knows chunk, "),
        ({"pretrained": "no/such/folder"}, "no/such/folder"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        MinirecLM(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_gen_toks": 512}, "max_gen_toks is 512; it must be from 1 to below max_length, 512"),
        ({"num_beams": 4}, "num_beams is 4; sampler autoregressive knows"),
        ({"temperature": -1.0, "do_sample": True}, "temperature is -1.0"),
    ],
)
def test_a_bad_argument_of_a_task_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MinirecLM().generate_until(questions(**kwargs)[:1])
