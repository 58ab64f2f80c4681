"""What the tests share: one thread, fixed hypothesis examples, the official numbers, small random models."""

import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from minirec import RecurrentConfig, RecurrentDepthLM

torch.set_num_threads(1)
settings.register_profile("minirec", deadline=None, derandomize=True, database=None, max_examples=20)
settings.load_profile("minirec")


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
