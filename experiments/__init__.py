"""Experiments as data: one file a variant, a task preset or a grid. Imported as ``celo_nnx.experiments``."""

if __name__ != "celo_nnx.experiments":
    raise ImportError("import celo_nnx.experiments, not experiments: the folder is mapped into the package")
