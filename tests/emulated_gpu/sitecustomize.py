"""Python imports this by its name when it starts: whoever has the folder in PYTHONPATH has a GPU."""

from importlib.util import find_spec

if find_spec("torch"):
    import emulated_gpu  # noqa: F401
