"""What the tests share: one thread, no windows, fixed hypothesis examples, official numbers, small random models."""

import os

# Before anything counts the cores.  Kernels and processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from minirec import RecurrentConfig, RecurrentDepthLM

torch.set_num_threads(1)
matplotlib.use("Agg")  # no window; MPLBACKEND would reach the notebooks' kernels and replace their inline figures
settings.register_profile("minirec", deadline=None, derandomize=True, database=None, max_examples=20)
settings.load_profile("minirec")


@pytest.fixture(scope="session")
def torchrun():
    """`torchrun("-m", "minirec.tools.cli", ...)`: what two processes of this print and return, once both have ended."""

    def run(*command: str) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        process = subprocess.Popen([*launcher, *command], env=environment, **pipes)
        try:
            printed = process.communicate(timeout=900)  # against processes that wait for each other for ever
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, *printed)

    return run


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Numbers computed with the official implementation; see golden/README.md."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden(golden_folder):
    """`golden("b_ar")`: the tensors of one golden file by name, and the cases that its JSON describes."""

    @functools.cache
    def load(name: str) -> tuple[dict, dict]:
        cases = json.loads((golden_folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(golden_folder / f"{name}.safetensors")
        integers = (torch.int32, torch.int16, torch.uint8)  # stored narrow, used as int64
        return {k: t.long() if t.dtype in integers else t for k, t in tensors.items()}, cases

    return load


@pytest.fixture(scope="session")
def golden_model(golden_folder) -> RecurrentDepthLM:
    """The model that the golden numbers were computed with, as the official code saved it."""
    return RecurrentDepthLM.from_pretrained(golden_folder / "model").requires_grad_(False)


@pytest.fixture(scope="session")
def small_model():
    """A factory of small random models: `small_model(seed, n_layers_in_coda=2)`.

    float64, so that rounding, which depends on the shape of a batch, cannot decide between two tokens.  The weights
    are larger than a fresh model's and no norm or offset is trivial: tokens vary, and every term counts.
    """

    @functools.cache
    def build(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes) -> RecurrentDepthLM:
        shape = dict(n_embd=16, n_heads=2, intermediate_size=24, vocab_size=23, block_size=48, mean_recurrence=4)
        shape |= dict(n_layers_in_prelude=1, n_layers_in_recurrent_block=1, n_layers_in_coda=1, mean_backprop_depth=2)
        model = RecurrentDepthLM(RecurrentConfig(**(shape | sizes))).to(dtype).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.dim() == 1:
                p.copy_(1 + 0.15 * noise)
            elif "wte" in name or "qk_bias" in name:
                p.copy_(0.4 * noise)
            else:
                p.copy_(noise / p.shape[1] ** 0.5)
        model.transformer.adapter.weight[:, : model.config.n_embd] *= 0.5  # so that the recurrence settles
        return model

    return build


@pytest.fixture(scope="session")
def distance():
    """Relative Frobenius distance of a tensor from the one that is right."""
    return lambda ours, right: ((ours - right).norm() / right.norm()).item()


RULE_30 = {"111": "0", "110": "0", "101": "0", "100": "1", "011": "1", "010": "1", "001": "1", "000": "0"}


@pytest.fixture(scope="session")
def stages_by_hand():
    """`stages_by_hand(text)`: the words of an automaton or hops problem's answer after each step, from its text alone.

    Only the words count: the tokenizer drops the arrows, so a text that it gave back has none.
    """

    def work_out(text: str) -> list[list[str]]:
        words = re.findall(r"\w+", text)
        if words[0] == "Run":
            _, steps, _, _, row = words
            rows = [row]
            for _ in range(int(steps)):
                before = "00" + rows[-1]  # a cell hangs on the two before it and on itself
                rows.append("".join(RULE_30[before[i : i + 3]] for i in range(len(row))))
            return [[row] for row in rows[1:]]
        follow = words.index("Follow")
        starts = words[follow + 1 :]
        next_of = dict(zip(words[:follow:2], words[1:follow:2], strict=True))
        at, stages = starts, []
        while any(place in next_of for place in at):
            at = [next_of[place] for place in at]  # a KeyError where one way is longer than another
            stages.append([place for pair in zip(starts, at, strict=True) for place in pair])
        return stages

    return work_out
