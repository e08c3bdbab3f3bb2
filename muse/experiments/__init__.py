"""Small experiments on a CPU: the demo (docs/demo.md), the ablations, the gradient study."""
