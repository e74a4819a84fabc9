"""Triton kernels of pylora, one op a file, reached only through `pylora.dispatch`.

The folder is installed as `pylora.kernels`. A Python started in the repository root would also find
it as the top-level package `kernels` and hide the Hugging Face package of that name, which
bitsandbytes and transformers probe for; importing it under any other name therefore fails like a
missing package.
"""

if __name__ != "pylora.kernels":
    raise ImportError(f"this folder is the package pylora.kernels, not {__name__!r}")
