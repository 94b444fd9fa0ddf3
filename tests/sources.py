"""Python sources as trees."""

import ast
import gc


def parsed(text: str) -> ast.Module:
    """Parsed without the garbage collector: where it runs meanwhile and ends other objects, Python
    3.11 may fail with a SystemError ("AST constructor recursion depth mismatch")."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if enabled:
            gc.enable()
