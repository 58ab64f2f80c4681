"""Other published families of looped language models, each written as a difference to `minirec.recurrent_block`.

    file          family                            prelude  injection            between loops  coda   KV heads
    raven.py      Raven: retrofitted Llama, OLMo-2  yes      linear [s; e]        nothing        yes    grouped
    parcae.py     Parcae                            yes      decay s, add B e     nothing        yes    all
    ouro.py       Ouro                              no       none: s starts as e  norm           no     grouped
    nanbeige.py   Nanbeige4.2                       no       none: s starts as e  norm           no     grouped

`llama.py` holds the layer that three of them are made of.  A family brings a config, which reads the keys of its
published config.json, and a model, whose parameters have the names of its published tensors.  Every sampler and the
engine run it through the same three methods: prelude, recur, coda.  Notebook: 11_other_families.
"""

from __future__ import annotations

from minirec.config import RecurrentConfig
from minirec.families.nanbeige import Nanbeige, NanbeigeConfig
from minirec.families.ouro import Ouro, OuroConfig
from minirec.families.parcae import Parcae, ParcaeConfig
from minirec.families.raven import Raven, RavenConfig
from minirec.recurrent_block import RecurrentDepthLM

MODELS = {
    RecurrentConfig: RecurrentDepthLM,
    RavenConfig: Raven,
    ParcaeConfig: Parcae,
    OuroConfig: Ouro,
    NanbeigeConfig: Nanbeige,
}


def model_of(config: RecurrentConfig) -> RecurrentDepthLM:
    """A fresh model of the family that a config is of."""
    return MODELS[type(config)](config)
