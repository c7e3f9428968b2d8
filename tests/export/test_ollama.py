"""Chat templates as Ollama's Modelfile writes them: equal, or none at all."""

import json
import shutil
import subprocess

import pytest

from helpers.chatml import CHATML
from luthier.chat.template import ChatTemplate
from luthier.export.ollama import modelfile, probe_conversations, render_probe, translate_template

DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
GO_CHATML = (
    '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
    "{{ end }}{{ end }}<|im_start|>assistant\n"
)


def renderer(source):
    template = ChatTemplate(source, TOKENS, "2026-01-01")
    return lambda messages, asks: str(template.render(messages, None, asks))


def test_chatml_is_written_as_go_writes_it():
    assert translate_template(renderer(CHATML), None) == GO_CHATML


def test_a_default_system_prompt_stands_where_there_is_none():
    go = translate_template(renderer(DEFAULT + CHATML), None)
    assert go == "{{ if not .System }}<|im_start|>system\nBe kind.<|im_end|>\n{{ end }}" + GO_CHATML


def test_the_bos_token_is_left_to_ollama():
    assert translate_template(renderer("{{ bos_token }}" + CHATML), "<s>") == GO_CHATML


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("{{ m.content }}", "{{ m.content | trim }}"),
        CHATML.replace("m.content", "m.content.split('</think>')[-1]"),
        "{% for m in messages %}[{{ loop.index }}]{{ m.role }}: {{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('System role not supported') }}",
        CHATML.replace("<|im_end|>", '"""'),
        CHATML.replace("<|im_end|>", "{{ '{{' }}"),
    ],
    ids=[
        "strips white space", "drops reasoning from history", "numbers its turns",
        "writes the last turn otherwise", "refuses a role", "writes what ends a Modelfile's text",
        "writes what Go reads",
    ],
)  # fmt: skip
def test_there_is_none_for_a_template_that(source):
    assert translate_template(renderer(source), None) is None


def test_real_templates_are_translated_or_not(assets_templates):
    folder = assets_templates
    found = {
        name: translate_template(renderer((folder / f"{name}.jinja").read_text()), None) is not None
        for name in ("hub/smollm2", "hub/qwen1_5_qwen2", "hub/llama3", "hub/gemma3", "hub/qwen3")
    }
    assert found == {
        "hub/smollm2": True, "hub/qwen1_5_qwen2": True, "hub/llama3": False, "hub/gemma3": False,
        "hub/qwen3": False,
    }  # fmt: skip


def test_a_modelfile_has_template_and_stops():
    assert modelfile("a\nb\n", "./merged", ["<|im_end|>", 'say "x"']) == (
        'FROM ./merged\nTEMPLATE """a\nb\n"""\nPARAMETER stop "<|im_end|>"\n'
        'PARAMETER stop """say "x""""\n'
    )


GO = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }
type Case struct {
	Template string
	Messages []Message
}

func main() {
	var cases []Case
	json.NewDecoder(os.Stdin).Decode(&cases)
	out := []string{}
	for _, c := range cases {
		var system []string
		for _, m := range c.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		var b strings.Builder
		t := template.Must(template.New("").Parse(c.Template))
		data := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": c.Messages}
		if err := t.Execute(&b, data); err != nil {
			panic(err)
		}
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_itself_writes_the_same(tmp_path, assets_templates):
    (tmp_path / "main.go").write_text(GO)
    names = ("hub/smollm2", "hub/qwen1_5_qwen2", "llama_cpp_tests/phi_4")
    real = [(assets_templates / f"{name}.jinja").read_text() for name in names]
    renderers = [renderer(source) for source in (DEFAULT + CHATML, *real)]
    templates = [translate_template(jinja, None) for jinja in renderers]
    cases = [
        {"Template": go, "Messages": talk} for go in templates for talk in probe_conversations()
    ]
    done = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    written = json.loads(done.stdout)
    assert written == [jinja(talk, True) for jinja in renderers for talk in probe_conversations()]
    assert written == [render_probe(go, talk) for go in templates for talk in probe_conversations()]
