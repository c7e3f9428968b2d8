# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "luthier @ file:///wheels/luthier-0.1.0-py3-none-any.whl",
#     "torch==2.13.0",
#     "transformers==5.23.0",
#     "trl==1.16.0",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
#     "bitsandbytes==0.50.2",
#     "huggingface_hub==2.4.0",
# ]
# ///
"""Train a recipe on the GPUs of Hugging Face Jobs, and push the result to the hub.

Needs: credit for Jobs, `hf auth login` with a token that may write, and luthier as a wheel:

    pip wheel --no-deps --wheel-dir dist .
    hf jobs uv run --flavor a100-large --timeout 12h --secrets HF_TOKEN -v ./dist:/wheels \
        launch/hf_jobs.py --to USER/NAME recipe=qlora_llama

With several GPUs (`--flavor a100x4`), each gets a copy of the model (DDP). Everything after the
script except `--to` is passed to `luthier train` unchanged. A job's disk is deleted with the job:
whatever is not pushed is lost, and your data must be on the hub (`dataset.path=USER/NAME`).
"""

import subprocess
import sys

RUN = "output_dir=run"
"""The run's folder, so that the push knows it."""


def train_command(words: list[str], gpus: int) -> list[str]:
    """Return the command that trains on this number of GPUs."""
    train = ["-m", "luthier", "train", *words, RUN]
    if gpus < 2:
        return [sys.executable, *train]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, "--multi_gpu", "--num_processes", str(gpus), "--main_process_port=0", *train]


def main(words: list[str]) -> int:
    """Train, and push if the first argument is `--to`; returns the exit code."""
    repository = None
    if words[:1] == ["--to"]:
        repository, words = "".join(words[1:2]), words[2:]
    if repository == "" or not words or any(word.startswith("output_dir=") for word in words):
        print("usage: hf_jobs.py [--to USER/NAME] recipe=NAME [key=value ...]", file=sys.stderr)
        print("output_dir is set by the script.", file=sys.stderr)
        return 2
    # Counted in another process, because one that looks at the GPUs holds memory on the first.
    count = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True)
    code = subprocess.run(train_command(words, int(answer.stdout or 0))).returncode
    if code or repository is None:
        return code
    push = [sys.executable, "-m", "luthier", "push", "run", "--to", repository]
    return subprocess.run(push).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
