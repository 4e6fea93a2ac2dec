"""From gradients to weight updates."""
