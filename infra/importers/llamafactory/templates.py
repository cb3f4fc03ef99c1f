"""Templates of LLaMA-Factory -> template here with the same text.

Compared by rendering conversations of one and two rounds, with and without a system turn, with
src/llamafactory/data/template.py of LLaMA-Factory 0.9.6.dev0. Conversations with tool calls may differ.
"""

SAME_TEXT = {
    "chatml": "chatml",
    "cpm4": "lfm2",
    "falcon_h1": "lfm2",
    "gemma": "gemma3",
    "gemma2": "gemma3",
    "gemma3": "gemma3",
    "gemma3n": "gemma3",
    "intern_s1": "lfm2",
    "llama3": "llama3",
    "qwen": "qwen2_5",
    "qwen2_vl": "qwen2_5_vl",
    "qwen3_5_nothink": "chatml",
    "qwen3_nothink": "chatml",
    "qwen3_vl_nothink": "chatml",
    "smollm": "chatml",
    "yi": "chatml",
}
