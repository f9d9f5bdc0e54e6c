"""The C++ engine of nearfar; `_core` is the compiled extension (`_core.pyi` its committed signature)."""
