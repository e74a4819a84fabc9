"""Triton kernels of pylora, reached only through `pylora.dispatch`.

The host functions of an op are in `<op>.py` and `<op>_backward.py`; the other files hold what the
ops share. The folder is installed as `pylora.kernels`. A Python that is started in the repository
root would also find it as the top-level package `kernels`, which would hide the Hugging Face
package of that name from bitsandbytes and transformers. Importing the folder under another name
therefore fails as it would fail for a missing package.
"""

if __name__ != "pylora.kernels":
    raise ImportError(f"this folder is the package pylora.kernels, not {__name__!r}")
