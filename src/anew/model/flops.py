"""Number of parameters of a model and of floating-point operations of a training step.

    count_parameters(GPTConfig())          # 124,475,904
    flops_per_token(GPTConfig(), 1024)     # 798 million, forward and backward

Both are computed from the shape of the network; nothing is built or run.
"""

from anew.config.schema import GPTConfig


def count_parameters(config: GPTConfig) -> int:
    """Return the number of parameters, padding rows of the vocabulary included."""
    C = config.n_embd
    rows = config.padded_vocab_size + config.n_positions
    embeddings = rows * C
    block = 12 * C * C + 13 * C  # four matrices, their biases and two layer norms
    final_norm = 2 * C
    return embeddings + config.n_layer * block + final_norm


def flops_per_token(config: GPTConfig, seq_len: int, causal: bool = True) -> int:
    """Return the floating-point operations of one token, forward and backward.

    For 124M at T = 1024 this is 798 million, or 855 million if `causal` is false: attention of
    every token to every other is then counted.

    Only matrix products count. A multiply-add is two operations, and the backward pass costs twice
    the forward pass. This gives 6 for each weight of the blocks and of the padded head, and
    12 x layers x C x (mean number of keys that a query sees) for attention.
    """
    C = config.n_embd
    mean_keys = (seq_len + 1) / 2 if causal else seq_len
    blocks = 6 * config.n_layer * 12 * C * C
    head = 6 * config.padded_vocab_size * C
    attention = 12 * config.n_layer * C * mean_keys
    return int(blocks + head + attention)
