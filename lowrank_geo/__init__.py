"""Train PyTorch models whose weights stay on the manifold of rank-r matrices."""
