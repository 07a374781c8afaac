"""Run an exported model: onnxruntime, numpy, pillow and tokenizers, no torch."""

from bivlm_edge.pictures import open_picture
from bivlm_edge.runtime.answer import Answerer
from bivlm_edge.runtime.generate import Generation
from bivlm_edge.runtime.kv_cache import KvCache
from bivlm_edge.runtime.preprocess import Picture, preprocess
from bivlm_edge.runtime.prompt import PromptBuilder
from bivlm_edge.runtime.sampling import greedy, top_p_sampler
from bivlm_edge.runtime.session import VlmSession, load

__all__ = [
    "Answerer",
    "Generation",
    "KvCache",
    "Picture",
    "PromptBuilder",
    "VlmSession",
    "greedy",
    "load",
    "open_picture",
    "preprocess",
    "top_p_sampler",
]
