"""What the compiler cannot be brought to do well: the decoder for CPUs (C++), the loss on NVIDIA GPUs (Triton)."""
