"""Fields of OpenAI's other requests than chats that would change the answer and are not implemented."""

from __future__ import annotations

from masquerade.generation.unsupported import GENERATION, TEMPLATE, TEMPLATE_FIELDS, Table

COMPLETIONS: Table = {
    **GENERATION,
    "add_special_tokens": (True,),
    "max_completion_tokens": (),
    "messages": ([],),
    "response_format": ({"type": "text"},),
    "return_full_text": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}
EMBEDDINGS: Table = {
    "adapter": (),
    "adapter_id": (),
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "embedding_types": (["float"],),
    "input_type": (),
    "instruction": ("",),
    "lora": ([],),
    "lora_path": (),
    "messages": ([],),
    "normalize": (True,),
    "output_dimensionality": (),
    "phase": (),
    "prompt": ("",),
    "prompt_name": (),
    "steering": (),
    "strength": (),
    "task": (),
    "truncate": (),
    "truncate_prompt_tokens": (),
}
TOKENIZE: Table = {**TEMPLATE, "tool_choice": ("auto",)}
BATCH: Table = {"output_expires_after": ()}
JOB: Table = {"integrations": ([],), "name": ()}
DETOKENIZE: Table = {"skip_special_tokens": (False,)}
RESPONSES: Table = {
    **{name: values for name, values in GENERATION.items() if name != "max_output_tokens"},
    **TEMPLATE,
    **TEMPLATE_FIELDS,
    "audio": (),
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "prediction": (),
    "prompt": (),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "system": ("",),
    "truncation": ("disabled",),
    "web_search_options": (),
}
