"""The rows of the evaluated run: short questions and shorter replies."""

from helpers import adapter_runs as material

ROWS = [{"prompt": text[:9], "completion": text[::-1][:7]} for text in material.questions(12)]
