"""The parts, one table per kind. Imported as ``celo_nnx.components``."""

if __name__ != "celo_nnx.components":
    raise ImportError("import celo_nnx.components, not components: the folder is mapped into the package")
