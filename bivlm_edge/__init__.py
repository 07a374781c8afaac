"""Vision-language models on edge devices at two bits per weight or fewer."""

from bivlm_edge._ops_library import custom_ops_library

__version__ = "0.1.0"

__all__ = ["__version__", "custom_ops_library"]
