"""Chat templates of Axolotl -> template here with the same text.

Compared by rendering conversations of one and two rounds, with and without a system turn, with the files in
src/axolotl/utils/chat_templates/templates of Axolotl 0.18.0. Conversations with tool calls may differ.
"""

SAME_TEXT = {
    "aya": "cohere",
    "chatml": "chatml",
    "cohere": "cohere",
    "deepseek_v3": "deepseekv3",
    "falcon_h1": "lfm2",
    "gemma": "gemma",
    "gemma3": "gemma3",
    "gemma3n": "gemma3",
    "gemma4": "gemma4",
    "gemma4_unified": "gemma4",
    "llama3": "llama3",
    "nemotron_h": "chatml",
    "qwen2_vl": "qwen2_5_vl",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3",
    "qwen_25": "qwen2_5",
}
# Prompt formats that older versions named in `conversation`.
CONVERSATIONS = {"chatml": "chatml", "llama-3": "llama3", "llama3": "llama3", "vicuna_v1.1": "vicuna"}
