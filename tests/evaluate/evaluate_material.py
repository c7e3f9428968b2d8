"""The rows of the evaluated run: short questions and shorter replies."""

import infer_material as material

ROWS = [{"prompt": text[:9], "completion": text[::-1][:7]} for text in material.questions(12)]
