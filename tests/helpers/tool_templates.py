"""Chat templates with tools, as small as they can be, and tools that a model may call."""

HEAD = (
    "{% for t in tools or [] %}<|im_start|>system\n{{ t | tojson }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
)
CALLS = (
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n"
)
TAIL = (
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
LAST_THINK = (
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
)

PLAIN = HEAD + CALLS + TAIL
"""Knows no reasoning."""
KEEPING = HEAD + THINK + CALLS + TAIL
"""Shows the reasoning of all turns."""
REWRITING = HEAD + LAST_THINK + CALLS + TAIL
"""Strips the reasoning from earlier turns."""

TOOLS_FILE = '''
import time


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def fail(a: int) -> int:
    """Fail.

    Args:
        a: A number.
    """
    raise RuntimeError("no luck")


def sleep(a: int) -> int:
    """Never return.

    Args:
        a: A number.
    """
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass


async def add_later(a: int, b: int) -> dict:
    """Add two numbers, later.

    Args:
        a: The first number.
        b: The second number.
    """
    return {"sum": a + b}


def undocumented(a: int) -> int:
    return a


def untyped(a):
    """Lack a hint.

    Args:
        a: A number.
    """
    return a


class Counter:
    """Counts to a goal that each row sets."""

    def __init__(self):
        self.resets = 0

    def reset(self, goal, **columns):
        self.goal, self.count = goal, 0
        self.resets += 1
        return f" Goal: {goal}."

    def count_up(self, by: int) -> str:
        """Count up.

        Args:
            by: How far.
        """
        self.count += by
        return f"at {self.count}"

    def get_reward(self):
        return float(self.count == self.goal)
'''


def call(name, **arguments):
    """The text of a call in these templates."""
    import json

    return f'<tool_call>{{"name": "{name}", "arguments": {json.dumps(arguments)}}}</tool_call>'
