"""How to install what is missing, in the words that every error and `superpoint doctor` use."""

from __future__ import annotations

WHERE = "in your clone of superpoint-trt"
"""The package is on no registry yet, so its extras install from a clone only."""


def install_hint(*extras: str) -> str:
    """Says which command installs optional parts of this package.

    Args:
        extras: names of extras in pyproject.toml ("torch", "tensorrt", "rtx", "report"); any one of them will do.

    Returns:
        "pip install '.[torch]' (in your clone of superpoint-trt)", to be put into a sentence.
    """
    commands = " or ".join(f"pip install '.[{extra}]'" for extra in extras)
    return f"{commands} ({WHERE})"
