"""minirec: recurrent-depth (looped) language models, small enough to read and fast enough to use."""

from minirec.config import RecurrentConfig
from minirec.recurrent_block import RecurrentDepthLM

__all__ = ["RecurrentConfig", "RecurrentDepthLM"]
__version__ = "0.1.0"
