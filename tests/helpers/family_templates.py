"""Small templates in the shapes of families whose own templates are not at hand.

Each writes what decides the tokens of a reply as its family does, and nothing else.
"""

ROLE_ENDS = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'tool' %}<|observation|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and (loop.last or messages[loop.index0 + 1].role != 'user') %}"
    "<think>{{ m.reasoning_content }}{% endif %}</think>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>"
    "<arg_value>{{ v }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
"""GLM-4.7, Spark 2.5: turns end in the next role's token, and close a thought they do not open."""

ROLE_ENDS_STANDING_HEADER = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>"
)
"""GLM-Edge: the header of a reply stands behind every render."""

CLOSED_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}"
    "<|CHATBOT_TOKEN|>{% if m.tool_calls %}<|START_ACTION|>{% for c in m.tool_calls %}"
    "{{ c.function.name }}:{{ c.function.arguments | tojson }};{% endfor %}<|END_ACTION|>"
    "{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    "{% elif m.role == 'user' %}<|USER_TOKEN|>{{ m.content }}"
    "{% else %}<|SYSTEM_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    "{% if add_generation_prompt %}<|START_THINKING|><|END_THINKING|>{% endif %}"
)
"""Command R7B: the prompt closes a thought, and a header stands behind every render."""

OPENED_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}"
    "<|CHATBOT_TOKEN|>{% if m.reasoning_content %}<|START_THINKING|>{{ m.reasoning_content }}"
    "<|END_THINKING|>{% endif %}<|START_TEXT|>{{ m.content }}<|END_TEXT|>"
    "{% else %}<|USER_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>"
    "{% endif %}"
)
"""Cohere2 MoE: the prompt opens a thought that only turns with reasoning have."""

NO_HEADER_BEHIND_RESULT = (
    "<s>{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]"
    "{% elif m.role == 'user' %}<|user_start|>{{ m.content }}<|user_end|>{% else %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|assistant_start|>{% endif %}"
    "{% if m.reasoning_content %}<|inner_prefix|>{{ m.reasoning_content }}<|inner_suffix|>"
    "{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}<|tools_prefix|>{% for c in m.tool_calls %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|tools_suffix|>"
    "{% if loop.last %}<|assistant_end|>{% endif %}{% else %}<|assistant_end|>{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
)
"""Apertus: a turn goes on behind a tool's result, where the prompt writes a header."""

THOUGHT_IN_WORDS = (
    "<|begin_system|>{% for t in tools or [] %}{{ t | string }}{% endfor %}\n"
    "{% for m in messages %}<|begin_{{ m.role }}|>\n"
    "{% if m.reasoning_content and loop.last %}{{ m.reasoning_content }}\n[BEGIN FINAL RESPONSE]\n"
    "{% endif %}{{ m.content }}\n{% if m.role == 'assistant' %}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|begin_assistant|>\nHere are my reasoning steps:\n{% endif %}"
)
"""Apriel: tools as Python writes them, and a prompt that leads to a thought in words."""

STOP_ONLY_IN_HISTORY = (
    "{% for m in messages %}<|hy_{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content and (loop.last or keep_thoughts) %}"
    "<think>{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}"
    "{{ m.content }}{% if not loop.last %}<|hy_eos|>{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|hy_assistant|><think>{% endif %}"
)
"""Hy3: the stop token stands only between turns, and history drops thoughts."""

HEADLESS_PROMPT = (
    "{% set ns = namespace(moved='') %}{% for m in messages %}{% if m.role == 'tool' %}"
    "<|tool_response>{{ m.content }}<tool_response|>{{ ns.moved }}"
    "{% if loop.last %}<turn|>\n{% endif %}"
    "{% elif m.role == 'assistant' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|turn>model\n{% endif %}"
    "{% if m.tool_calls %}{% set ns.moved = m.content %}<|tool_call>"
    "{{ m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})"
    "<tool_call|>"
    "{% if loop.last %}{{ m.content }}<|tool_response>{% endif %}"
    "{% else %}{{ m.content }}<turn|>\n{% endif %}"
    "{% else %}<|turn>user\n{{ m.content }}<turn|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model\n{% endif %}"
)
"""Gemma 4: content beside a call moves behind the result, and closes the turn there."""

CALL_WITHOUT_STOP = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}"
    "<|CHATBOT_TOKEN|>{{ m.content }}{% if m.tool_calls %}Action:{% for c in m.tool_calls %}"
    " {{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}\n"
    "{% else %}<|END_OF_TURN_TOKEN|>{% endif %}{% elif m.role == 'user' %}<|USER_TOKEN|>"
    "{{ m.content }}<|END_OF_TURN_TOKEN|>{% else %}<|SYSTEM_TOKEN|>{{ m.content }}"
    "<|END_OF_TURN_TOKEN|>{% endif %}{% endfor %}"
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Write 'Action:' and what to do.<|END_OF_TURN_TOKEN|>"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
"""Command R+ with tools: nothing ends a call but the next turn, and instructions stand last."""

SPACE_EATING_HEADER = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
"""Phi-3: role tokens take the white space behind them."""

FAMILY_TEMPLATES = {
    "role ends (GLM-4.7, Spark 2.5)": ROLE_ENDS,
    "standing header (GLM-Edge)": ROLE_ENDS_STANDING_HEADER,
    "closed thought (Command R7B)": CLOSED_THOUGHT,
    "opened thought (Cohere2 MoE)": OPENED_THOUGHT,
    "no header behind a result (Apertus)": NO_HEADER_BEHIND_RESULT,
    "thought in words (Apriel)": THOUGHT_IN_WORDS,
    "stop only in history (Hy3)": STOP_ONLY_IN_HISTORY,
    "prompt without a header (Gemma 4)": HEADLESS_PROMPT,
    "call without a stop (Command R+)": CALL_WITHOUT_STOP,
    "header that takes white space (Phi-3)": SPACE_EATING_HEADER,
}
