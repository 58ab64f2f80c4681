"""The standard benchmarks: a model of lm-eval (EleutherAI's evaluation harness) that decodes with minirec.

    python -m minirec.tools.lm_eval_adapter --model minirec --tasks gsm8k_cot \\
        --model_args pretrained=tomg-group-umd/huginn-0125,sampler=diffusion_forcing,dtype=bfloat16

is `lm_eval` with one model more.  Up to 0.4.13 lm-eval sees only models that something has imported; later ones find
this one by its entry point, and there `lm_eval --model minirec ...` does.  lm-eval brings the tasks, the few-shot
prompts and the metrics; here is what it asks of a model:

    generate_until          text after a prompt, up to a stop text    any sampler, or the batching engine
    loglikelihood           how likely a continuation is              plain forward passes, `num_steps` deep
    loglikelihood_rolling   how likely a whole text is                the same, one window after the other

Under torchrun (`torchrun --nproc-per-node 2 -m minirec.tools.lm_eval_adapter ...`) lm-eval deals out the problems of
a task and collects the answers.  Which commands give the tables of arXiv 2510.14961: benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from minirec import adaptive_exit, autoregressive, diffusion_forcing, lossless_wavefront, speculative
from minirec.continuous_batching import MODES, Engine, Stage
from minirec.decoding import Generation, Options, stop_tokens
from minirec.files import checkpoint
from minirec.files.tokenizer import ChatTemplate, read_tokenizer
from minirec.tools import processes
from minirec.training import place

log = logging.getLogger(__name__)
SAMPLERS: dict[str, Callable] = {
    "autoregressive": autoregressive.generate,
    "adaptive_exit": adaptive_exit.generate,
    "speculative": speculative.generate,
    "lossless_wavefront": lossless_wavefront.generate,
    "diffusion_forcing": diffusion_forcing.generate,
}
# arguments of samplers and engine that are not for whoever evaluates, or have another name here
TAKEN = {
    "self",
    "model",
    "prompt",
    "max_new_tokens",
    "options",
    "num_steps",
    "seed",
    "stop_tokens",
    "on_token",
    "trace",
}
TAKEN |= {"slots", "max_length", "mode", "on_pass", "clock"}


@register_model("minirec")
class MinirecLM(TemplateLM):
    """A checkpoint and a way to decode, for lm-eval; its `--model_args` are the arguments here.

    pretrained, revision, dtype, device: as for `minirec.files.checkpoint.load`, dtype by name; a GPU that is not
    there is the CPU, since lm-eval asks for one unless told otherwise.  sampler: the name of a sampler's module.
    engine: instead of a sampler, a mode of the batching engine ("depth", "wavefront", ...), with batch_size slots.
    num_steps: recurrence steps, for likelihoods too (None: the config's mean_recurrence).  batch_size: prompts decoded
    or texts read at once.
    max_length: tokens of prompt and answer together, at most the model's context, which is what None says; a longer
    prompt loses its beginning.  max_gen_toks: tokens of an answer where the task does not say.  seed: of initial states
    and of sampling; the second answer to the same prompt gets the next one.  options: any other argument of the
    sampler, or of the engine and its requests.  A task may set them too, by its `generation_kwargs`; `--gen_kwargs` on
    the command line is the same.

    A bad argument is a ValueError that names it.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        sampler: str | None = None,
        engine: str | None = None,
        num_steps: int | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str = "cuda",
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        seed: int = 0,
        **options,
    ):
        super().__init__()
        if sampler is not None and engine is not None:
            raise ValueError(f"sampler is {sampler!r} and engine {engine!r}; the engine has a sampler of its own")
        if engine not in (None, *MODES):
            raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(map(repr, MODES))}")
        self.sampler, self.engine = sampler or "autoregressive", engine
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}; it must be one of {', '.join(map(repr, SAMPLERS))}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be a whole number, at least 1")
        if isinstance(dtype, str) and dtype not in checkpoint.DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(map(repr, checkpoint.DTYPES))}")
        self.options = self._checked(options)
        self.num_steps, self.batch_size, self.seed, self.max_gen_toks = num_steps, int(batch_size), seed, max_gen_toks
        self._device = processes.join("cpu" if device.startswith("cuda") and not torch.cuda.is_available() else device)
        self._rank, self._world_size = place()
        self.pretrained, self.folder = pretrained, checkpoint.locate(pretrained, revision)
        self.tokenizer = read_tokenizer(self.folder)
        self.template: ChatTemplate | None = None
        self.model = checkpoint.load(pretrained, device=self._device, dtype=dtype, revision=revision)
        context = self.model.config.block_size
        self.max_length = context if max_length is None else max_length
        if not 2 <= self.max_length <= context:
            raise ValueError(f"max_length is {max_length}; it must be from 2 to the model's context, {context}")
        self.speeds: list[tuple[int, float, int]] = []  # of every batch: tokens, seconds, passes of all its prompts

    def _checked(self, options: dict) -> dict:
        """Options that sampler or engine know; another one is a ValueError."""
        functions: list[Callable] = [SAMPLERS[self.sampler]] if self.engine is None else [Engine, Engine.submit]
        known = {name for f in functions for name in inspect.signature(f).parameters}
        known = (known | {field.name for field in dataclasses.fields(Options)}) - TAKEN
        for name in options.keys() - known:
            of = f"sampler {self.sampler}" if self.engine is None else f"engine {self.engine}"
            raise ValueError(f"{name} is {options[name]!r}; {of} knows {', '.join(sorted(known))}")
        return options

    # --- text and tokens ---

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval names its files of prepared requests after."""
        return self.pretrained.replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text that has nothing before it: the begin token, or the end token if there is none."""
        begin = self.model.config.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, with the begin token first unless it is there already or is not wanted."""
        ids, begin = self.tokenizer.encode(string, add_special_tokens=False).ids, self.model.config.bos_token_id
        return ids if add_special_tokens is False or begin is None or ids[:1] == [begin] else [begin, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation up to where the model goes on: after, or within, its last message."""
        if self.template is None:
            self.template = ChatTemplate(self.folder, self.tokenizer)
        text = self.template.render(chat_history, add_generation_prompt)
        if not add_generation_prompt:  # the last message is the beginning of an answer
            begun = chat_history[-1]["content"].strip()
            text = text[: text.rindex(begun) + len(begun)]
        return text

    # --- likelihood ---

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """(texts, context ids, continuation ids) -> log-probability of the continuation, and whether it is greedy's."""
        # longest first; of requests that differ in their last token alone, one is run
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        answers = []
        bar = tqdm(total=len(requests), desc="likelihoods", disable=True if disable_tqdm or self.rank else None)
        for chunk in order.get_batched(n=self.batch_size):
            rows = []
            for _, context, continuation in chunk:
                if len(continuation) > self.max_length:
                    raise ValueError(f"a continuation has {len(continuation)} tokens; max_length is {self.max_length}")
                rows.append((context + continuation)[-self.max_length - 1 : -1])
            tokens = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)  # what pads is behind, and unseen
            for row, ids in zip(tokens, rows, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            logits = self.model(tokens.to(self.device), num_steps=self.num_steps).logits  # (B, T, V)
            for run, ids, row in zip(chunk, rows, logits, strict=True):
                logp = row[len(ids) - len(run[2]) : len(ids)].log_softmax(-1)  # (C, V)
                for texts, continuation, _ in order.get_cache(*run, logp[None]):  # all requests that this row answers
                    asked = torch.tensor(continuation, device=logp.device)[:, None]  # (c, 1), c at most C
                    likely = logp[-len(asked) :].gather(-1, asked).sum().item()
                    greedy = torch.equal(logp[-len(asked) :].argmax(-1, keepdim=True), asked)
                    answers.append((likely, greedy))
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
                    bar.update()
        bar.close()
        return order.get_original(answers)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; each token is predicted once, from as much before it as a window shows."""
        windows = []  # of all texts, so that a batch may hold those of several
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(pair)) for pair in pairs]
        parts = self._loglikelihood_tokens([(None, *window) for _, *window in windows], disable_tqdm)
        sums = [0.0] * len(requests)
        for (number, *_), (likely, _) in zip(windows, parts, strict=True):
            sums[number] += likely
        for request, likely in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, likely)
        return sums

    # --- generation ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each prompt, up to the first of its stop texts, which is left out."""
        before: Counter = Counter()
        todo = []  # (prompt, generation_kwargs, how often both have come before)
        for prompt, kwargs in (request.args for request in requests):
            todo.append((prompt, kwargs, before[prompt, str(kwargs)]))
            before[prompt, str(kwargs)] += 1
        order = Collator(
            todo,
            sort_fn=lambda job: (-len(self.tok_encode(job[0])), job[0]),
            group_by="gen_kwargs",
            group_fn=lambda job: job[1],
        )
        stop = stop_tokens(self.model) | (set() if self.template is None else {self.template.end} - {None})
        answers = []
        bar = tqdm(total=len(requests), desc="generating", disable=True if disable_tqdm or self.rank else None)
        # the engine refills its slots, so it takes all that have the same arguments
        for chunk in order.get_batched(n=self.batch_size if self.engine is None else max(1, len(requests))):
            kwargs = normalize_gen_kwargs(chunk[0][1], self.max_gen_toks)
            until, room = [end for end in kwargs.pop("until") if end], kwargs.pop("max_gen_toks")
            if not 1 <= room < self.max_length:
                raise ValueError(f"max_gen_toks is {room}; it must be from 1 to below max_length, {self.max_length}")
            kwargs.pop("do_sample")  # greedy is temperature 0
            options = self.options | self._checked(kwargs)
            prompts = [maybe_truncate(self.tok_encode(prompt), room, self.max_length)[0] for prompt, *_ in chunk]
            seeds = [self.seed + repeat for *_, repeat in chunk]
            done = self._generate(prompts, room, seeds, stop, until, bar, **options)
            for (prompt, kwargs, _), generation in zip(chunk, done, strict=True):
                tokens = generation.tokens[:-1] if generation.tokens[-1] in stop else generation.tokens
                answers.append(postprocess_generated_text(self.tokenizer.decode(tokens), until, None))
                self.cache_hook.add_partial("generate_until", (prompt, kwargs), answers[-1])
        bar.close()
        if self.rank == 0 and requests:
            log.info("speed of this process: %s", self.get_model_info())
        return order.get_original(answers)

    def _generate(self, prompts: list[list[int]], room: int, seeds, stop, until, bar, **options) -> list[Generation]:
        """Continue prompts, each until a stop token, a stop text or `room` tokens."""
        said: list[list[int]] = [[] for _ in prompts]

        def go_on(token: int, row: int) -> bool:
            said[row].append(token)
            text = self.tokenizer.decode(said[row], skip_special_tokens=False) if until else ""
            return not any(end in text for end in until)

        started = time.perf_counter()
        if self.engine is None:
            shared = dict(num_steps=self.num_steps, seed=seeds, stop_tokens=stop, on_token=go_on)
            done = SAMPLERS[self.sampler](self.model, prompts, room, **shared, **options)
            bar.update(len(prompts))
            passes = max(generation.passes for generation in done)
        else:
            of_engine = inspect.signature(Engine.__init__).parameters.keys() & options.keys()
            engine = Engine(
                self.model,
                slots=min(self.batch_size, len(prompts)),
                max_length=max(map(len, prompts)) + room,
                mode=self.engine,
                num_steps=self.num_steps,
                **{name: options.pop(name) for name in of_engine},
            )
            ids = [
                engine.submit(ids, room, seed=seed, stop_tokens=stop, on_token=partial(go_on, row=row), **options)
                for row, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
            ]
            for event in engine.stream():
                bar.update(event.finished)
            done = [engine.requests[id].generation for id in ids]
            passes = engine.passes[Stage.RECUR]
        self.speeds.append((sum(len(g.tokens) for g in done), time.perf_counter() - started, passes))
        return done

    def get_model_info(self) -> dict:
        """For the results: speed of the batches so far, prompts included; with batch_size 1, of the prompts."""
        if not self.speeds:
            return {}
        tokens, _, passes = map(sum, zip(*self.speeds, strict=True))
        median = statistics.median(n / seconds for n, seconds, _ in self.speeds)
        return {"median_tokens_per_second": median, "passes_per_token": passes / tokens, "new_tokens": tokens}

    # --- several processes ---

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other."""
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat([part.reshape(-1, *part.shape[1:]) for part in parts])

    def gather_object(self, obj, dst: int = 0) -> list | None:
        """The objects of all processes, in their order, for process dst."""
        parts = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst)
        return parts

    def barrier(self) -> None:
        """Wait for the others."""
        dist.barrier()


def main() -> None:
    """`lm_eval` with this model among the others."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    processes.leave()


if __name__ == "__main__":
    main()
