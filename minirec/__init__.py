"""minirec: recurrent-depth (looped) language models, small enough to read and fast enough to use."""

from minirec.config import RecurrentConfig
from minirec.files import checkpoint
from minirec.recurrent_block import RecurrentDepthLM

__all__ = ["RecurrentConfig", "RecurrentDepthLM"]
__version__ = "0.1.0"

# Loading knows every kind of model, a model knows nothing of files: so they meet here.
RecurrentDepthLM.from_pretrained = staticmethod(checkpoint.load)
RecurrentDepthLM.save_pretrained = checkpoint.save
