"""What happens in a pass, as pure data: steps, their order and their dependencies. Knows no tensors."""
