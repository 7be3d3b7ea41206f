"""celo_nnx: learned optimizers from interchangeable parts."""
