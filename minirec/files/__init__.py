"""What minirec reads and writes: checkpoints, tokenizers, runs of training; and what the machine has room for."""
