"""Small chat templates in the manner of model families: what they have in common with the real ones is how tools,
calls and results are written.
"""

HERMES = r"""
{{- bos_token }}
{%- if tools %}
  {{- '<|system|>' }}
  {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\n\n' }}{%- endif %}
  {{- 'You may call functions:\n<tools>' }}
  {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
  {{- '\n</tools>\nFor each call answer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|end|>' }}
{%- endif %}
{%- for m in messages %}
  {%- if m['role'] == 'tool' %}
    {%- if messages[loop.index0 - 1]['role'] != 'tool' %}{{- '<|user|>' }}{%- endif %}
    {{- '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{- '<|end|>' }}{%- endif %}
  {%- elif m['role'] != 'system' or not tools %}
    {{- '<|' + m['role'] + '|>' + m['content'] }}
    {%- for call in m['tool_calls'] or [] %}
      {{- '\n<tool_call>\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
      {{- call['function']['arguments'] | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

LLAMA = r"""
{{- bos_token }}
{%- set ns = namespace(tools=tools) %}
{%- for m in messages %}
  {%- if m['tool_calls'] %}
    {%- if m['tool_calls'] | length != 1 %}{{- raise_exception('only single tool-calls at once') }}{%- endif %}
    {%- set call = m['tool_calls'][0]['function'] %}
    {{- '<|assistant|>{"name": "' + call['name'] + '", "parameters": ' }}
    {{- call['arguments'] | tojson }}
    {{- '}<|end|>' }}
  {%- elif m['role'] == 'tool' %}
    {{- '<|user|>' }}{{- m['content'] | tojson }}{{- '<|end|>' }}
  {%- elif m['role'] == 'user' and ns.tools %}
    {{- '<|user|>Given the following functions, please respond with a JSON for a function call. ' }}
    {{- 'Format: {"name": function name, "parameters": dictionary of argument name and its value}.\n' }}
    {%- for tool in ns.tools %}{{- tool | tojson }}{{- '\n' }}{%- endfor %}
    {{- m['content'] + '<|end|>' }}
    {%- set ns.tools = none %}
  {%- else %}
    {{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""

XML_CALLS = HERMES.replace("</tool_call><|end|>", "</tool_call> or <function=...><|end|>")
UNREADABLE = HERMES.replace("tool_call>", "call>")

QWEN3 = HERMES.replace(  # it thinks unless told otherwise
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
    r"""
{%- if add_generation_prompt %}
  {{- '<|assistant|>' }}
  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}""",
)
R1 = HERMES.replace(  # it always thinks
    "{{- '<|assistant|>' }}{%- endif %}",
    r"{{- '<|assistant|><think>\n' }}{%- endif %}{#- </think> -#}",
)
