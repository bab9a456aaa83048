"""Fields of chats that would change the answer and are not implemented, of OpenAI's and other servers' requests.

Each has the values that change nothing, which are accepted. A field in no table is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Table = Mapping[str, tuple[Any, ...]]

GENERATION: Table = {
    # which weights are used; this server's fields are `gamma` and `persona_phase`
    "adapter": (),
    "adapter_id": (),
    "lora": ([],),
    "lora_path": (),
    "phase": (),
    "steering": (),
    "strength": (),
    # the prompt
    "prompt_embeds": (),
    "truncate": (),
    "truncate_prompt_tokens": (),
    # which tokens are allowed
    "allowed_token_ids": (),
    "bad_words": ([],),
    "ebnf": (),
    "grammar": (),
    "guided_choice": (),
    "guided_decoding": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "regex": (),
    "structural_tag": (),
    "structured_outputs": (),
    # how tokens are sampled
    "best_of": (1,),
    "custom_logit_processor": (),
    "do_sample": (True,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "early_stopping": (False,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mirostat": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repeat_penalty": (1,),
    "samplers": (),
    "tfs": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical": (1,),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "watermark": (False,),
    "xtc_probability": (0,),
    # where the answer ends
    "max_length": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "min_new_tokens": (0,),
    "n_predict": (-1,),
    "num_predict": (-1,),
    "stop_regex": ([],),
    "stop_sequences": ([],),
    # how the answer is shown
    "no_stop_trim": (False,),
    "return_tokens_as_token_ids": (False,),
    "top_n_tokens": (0,),
}
TEMPLATE: Table = {
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
}
TEMPLATE_FIELDS: Table = {  # of chats, which other APIs do not have
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
}
CHAT: Table = {
    **GENERATION,
    **TEMPLATE,
    "add_special_tokens": (False,),
    "audio": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "input": (),
    "instructions": ("",),
    "modalities": (["text"],),
    "prediction": (),
    "prompt": (),
    "suffix": ("",),
    "system": ("",),
    "web_search_options": (),
}
MESSAGE: Table = {"audio": (), "function_call": (), "prefix": (False,)}
