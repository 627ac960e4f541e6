"""Quantize an LLM once instead of at the start of every run.

    python scripts/quantize_llm.py base_models/Qwen2.5-3B base_models/Qwen2.5-3B-nf4

writes a folder for --llm_model_path with the same NF4 weights that --load_in_4bit computes. The folder takes about a
third of the disk space, and loading it needs no 16-bit weights in memory. The forecasts are the same.
"""

import shutil
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.signals import leave
from utils.errors import UserError
from utils.llm.choice import load_pretrained, quiet_transformers
from utils.llm.loading import nf4
from utils.system.files import UNFINISHED, rename, unfinished_name
from utils.system.gpu import default_device, is_gpu


def quantize(argv: list[str] | None) -> None:
    """Load an LLM, quantize its weights to NF4, and write the target folder once it is complete."""
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder or Hub id of the LLM")
    parser.add_argument("target", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    started, source, target = time.perf_counter(), args.source, args.target
    if target.exists():
        raise UserError(f"{target} already exists: name a new folder")
    config = load_pretrained(AutoConfig, source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{source} is already quantized: pass it to --llm_model_path directly")
    device = default_device() if is_gpu(default_device()) else torch.device("cpu")
    # Load in the precision of the files: --load_in_4bit quantizes the same numbers.
    options = {"config": config, "dtype": "auto", "quantization_config": nf4(torch.float32), "device_map": {"": device}}
    model, tokenizer = load_pretrained(AutoModel, source, **options), load_pretrained(AutoTokenizer, source)
    for leftover in target.parent.glob(f"{target.name}.*{UNFINISHED}"):
        shutil.rmtree(leftover, ignore_errors=True)  # gigabytes of a run that was killed
    unfinished = unfinished_name(target)
    try:
        unfinished.mkdir(parents=True)
        with quiet_transformers():
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        rename(unfinished, target)
    except OSError as problem:
        raise UserError(f"cannot write {target}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # only exists after a failure
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"wrote {target}: {size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")
    print(f"use it with --llm_model_path {target}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit code 0 success, 2 invalid input (one line), 130 interrupted."""
    return exit_code_of(lambda: quantize(argv), "the folder was not written")


if __name__ == "__main__":
    leave(main)
